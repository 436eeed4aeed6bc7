"""One contract for every statistic: merging two states equals one pass over the rows of both."""

from __future__ import annotations

import importlib
import json
import pickle
import pkgutil

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import analysis
from analysis import statistics
from analysis.readout.examples import TopRows
from analysis.statistics.covariance import Covariance
from analysis.statistics.difference import Difference
from analysis.statistics.kept_rows import PairedRows, Rows
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
    PairedRows(ROWS, other_features=FEATURES),
    Difference(),
    Histogram(),
    Sorted((0.1, 0.5), ROWS),
    Extremes(largest=4),
    TopRows((0, 2), count=5),
    TopRows((0, 2), count=5, per_document=1),
]
"""One of each kind; add new statistics here to test them against the contract."""


def blocks(sizes: list[int], seed: int) -> list[RowBlock]:
    random = np.random.default_rng(seed)
    values = random.normal(size=(sum(sizes), FEATURES)).astype(np.float32)
    found, start = [], 0
    for size in sizes:
        rows = np.arange(start, start + size)
        found.append(RowBlock(values[rows], rows, rows % 7, rows % 5, rows // 7))
        found[-1].other = values[rows] * (1 + rows % 3)[:, None] + (rows % 3)[:, None]
        start += size
    return found


def answer(statistic: Statistic, state: State) -> xr.Dataset:
    with np.errstate(all="ignore"):  # moments of one row have no variance
        return statistic.result(state)


def test_every_kind_of_statistic_is_held_to_the_contract() -> None:
    for module in pkgutil.walk_packages(analysis.__path__, "analysis."):
        if "replay" not in module.name:
            importlib.import_module(module.name)
    kinds, below = set[type[Statistic]](), Statistic.__subclasses__()
    while below:
        kinds.update(kind for kind in below if {"update", "merge"} & vars(kind).keys())  # others inherit how they merge
        below = [kind for above in below for kind in above.__subclasses__()]
    kinds = {kind for kind in kinds if kind.__module__.startswith("analysis.")}
    assert kinds == {type(statistic) for statistic in EXAMPLES}


def test_every_statistic_that_is_computed_by_itself_is_exported() -> None:
    for module in pkgutil.iter_modules(statistics.__path__):
        if hasattr(importlib.import_module(f"analysis.statistics.{module.name}"), "compute"):
            assert module.name in analysis.__all__


@pytest.mark.parametrize("statistic", EXAMPLES, ids=lambda s: type(s).__name__)
@settings(max_examples=40)
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


@pytest.mark.parametrize("statistic", EXAMPLES, ids=lambda s: type(s).__name__)
def test_every_value_of_a_result_depends_on_the_rows(statistic: Statistic) -> None:
    """A merge that loses rows passes the other tests if `update` calls it, since all states are then equally wrong."""
    found = []
    for n in range(2, 9):
        rows = blocks([5] * n, n)
        for block in rows:
            block.stored[block.stored < n / 2 - 3] = 0  # the share of zeros varies too
        found.append(answer(statistic, state_of_blocks(statistic, FEATURES, rows)))
    constant = {name for name in found[0] if all(found[0][name].equals(other[name]) for other in found[1:])}
    assert constant <= {"error"}, "a bound that follows from the settings"


@pytest.mark.parametrize("statistic", EXAMPLES, ids=lambda s: type(s).__name__)
def test_merging_the_state_of_no_rows_changes_nothing(statistic: Statistic) -> None:
    state, none = state_of_blocks(statistic, FEATURES, blocks([ROWS], 0)), statistic.zero(FEATURES)
    for merged in (statistic.merge(state, none), statistic.merge(none, state)):
        xr.testing.assert_allclose(answer(statistic, merged), answer(statistic, state), rtol=1e-9, atol=1e-12)
