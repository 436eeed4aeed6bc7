"""One contract for every statistic: merging two states equals one pass over the rows of both."""

from __future__ import annotations

import importlib
import json
import pickle
import pkgutil

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

import analysis
from analysis.readout.examples import TopRows
from analysis.statistics.covariance import Covariance
from analysis.statistics.kept_rows import Rows
from analysis.statistics.moments import Moments
from analysis.statistics.onepass import RowBlock, State, Statistic
from analysis.statistics.onepass.statistic import state_of_blocks
from analysis.statistics.outliers import Extremes
from analysis.statistics.quantiles import Histogram, Sorted

FEATURES, ROWS = 3, 40
EXAMPLES: list[Statistic] = [
    Moments(),
    Covariance(),
    Rows(ROWS),
    Histogram(),
    Sorted((0.1, 0.5), ROWS),
    Extremes(largest=4),
    TopRows((0, 2), count=5),
]
"""One of each kind; add new statistics here to test them against the contract."""


def blocks(sizes: list[int], seed: int) -> list[RowBlock]:
    random = np.random.default_rng(seed)
    values = random.normal(size=(sum(sizes), FEATURES)).astype(np.float32)
    found, start = [], 0
    for size in sizes:
        rows = np.arange(start, start + size)
        found.append(RowBlock(values[rows], rows, rows % 7, rows % 5, rows // 7))
        start += size
    return found


def answer(statistic: Statistic, state: State) -> xr.Dataset:
    with np.errstate(all="ignore"):  # moments of one row have no variance
        return statistic.result(state)


def test_every_kind_of_statistic_is_held_to_the_contract() -> None:
    for module in pkgutil.walk_packages(analysis.__path__, "analysis."):
        if "replay" not in module.name:
            importlib.import_module(module.name)
    kinds = {kind for kind in Statistic.__subclasses__() if kind.__module__.startswith("analysis.")}
    assert kinds == {type(statistic) for statistic in EXAMPLES}


@pytest.mark.parametrize("statistic", EXAMPLES, ids=lambda s: type(s).__name__)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4), cut=st.integers(0, 4), seed=st.integers(0, 99))
def test_merging_states_equals_one_pass(statistic: Statistic, sizes: list[int], cut: int, seed: int) -> None:
    rows = blocks(sizes, seed)
    whole = state_of_blocks(statistic, FEATURES, rows)
    first, second = (state_of_blocks(statistic, FEATURES, part) for part in (rows[:cut], rows[cut:]))
    before = pickle.dumps((first, second))
    merged = statistic.merge(pickle.loads(pickle.dumps(first)), second)
    xr.testing.assert_allclose(answer(statistic, merged), answer(statistic, whole), rtol=1e-9, atol=1e-12)
    assert pickle.dumps((first, second)) == before, "merge changed a state"


@pytest.mark.parametrize("statistic", EXAMPLES, ids=lambda s: type(s).__name__)
def test_states_are_arrays_of_the_stated_size_and_descriptions_are_json(statistic: Statistic) -> None:
    state = [np.asarray(values) for values in state_of_blocks(statistic, FEATURES, blocks([ROWS], 0)).values()]
    assert all(values.dtype != object for values in state)
    assert sum(values.nbytes for values in state) <= 4 * statistic.state_bytes(FEATURES) + 4096
    assert json.loads(json.dumps(statistic.describe()))
