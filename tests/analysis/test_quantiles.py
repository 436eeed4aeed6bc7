from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from analysis.statistics import quantiles
from analysis.statistics.quantiles import Histogram
from flexcache.errors import AnalysisError
from tests.analysis.stores import value_store
from tests.analysis.test_moments import LENGTHS, block

arrays = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 50), st.integers(1, 3)),
    elements=st.one_of(
        st.floats(-(2.0**100), 2.0**100, width=32), st.floats(-1, 1, width=32), st.sampled_from([0.0, -0.0, 24523.0])
    ),
)
levels = st.lists(st.floats(0, 1), min_size=1, max_size=4)


def parts(statistic: Histogram, values: np.ndarray, cut: int) -> dict[str, np.ndarray]:
    states = [statistic.zero(values.shape[1])]
    held = [part for part in (values[:cut], values[cut:]) if len(part)]
    states.extend(statistic.update(statistic.zero(values.shape[1]), block(part)) for part in held)
    total = states[0]
    for state in states[1:]:
        total = statistic.merge(total, state)
    return total


@settings(max_examples=80)
@given(arrays, levels, st.integers(0, 50), st.integers(10, 15))
def test_quantiles_are_within_the_stated_error_of_numpy(
    values: np.ndarray, asked: list[float], cut: int, bits: int
) -> None:
    statistic = Histogram(tuple(asked), bits)
    found = statistic.result(parts(statistic, values, cut))
    expected = np.quantile(values.astype(np.float64), asked, axis=0, method="inverted_cdf")
    slack = float(found["error"]) * np.abs(expected) + 1e-37  # below the smallest normal number bins are of one width
    assert (np.abs(found["value"].values - expected) <= slack * 1.0001).all()
    assert (found["low"].values <= expected).all()
    assert (found["high"].values >= expected).all()


@settings(max_examples=12)
@given(arrays, levels, st.integers(0, 50))
def test_sixteen_bits_are_exact_for_bfloat16(values: np.ndarray, asked: list[float], cut: int) -> None:
    stored = values.astype(ml_dtypes.bfloat16).astype(np.float32)
    statistic = Histogram(tuple(asked), 16)
    found = statistic.result(parts(statistic, stored, cut))
    exact = np.quantile(stored, asked, axis=0, method="inverted_cdf")
    np.testing.assert_array_equal(found["value"].values, exact.astype(np.float64))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_exact_quantiles_of_a_store_are_those_of_numpy(dtype: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(2, sum(LENGTHS), 3)) ** 3
    store = value_store(tmp_path / "s.zarr", values, LENGTHS, dtype=dtype)
    found = quantiles.compute(store, "resid_post", [0.1, 0.5, 0.999], exact=True, progress=False)
    rough = quantiles.compute(store, "resid_post", [0.1, 0.5, 0.999], progress=False)
    for layer in (0, 1):
        rows = store.read("resid_post", layer)
        expected = np.quantile(rows, [0.1, 0.5, 0.999], axis=0, method="inverted_cdf")
        np.testing.assert_array_equal(found["value"].sel(layer=layer), expected)
        np.testing.assert_allclose(rough["value"].sel(layer=layer), expected, rtol=0.0626)
        for power in (-3, 0, 2):
            share = (np.abs(rows) < 2.0**power).mean(0)
            np.testing.assert_allclose(rough["below"].sel(layer=layer, magnitude=power), share)


@settings(max_examples=30)
@given(arrays, st.integers(10, 14))
def test_the_histogram_is_that_of_numpy(values: np.ndarray, bits: int) -> None:
    statistic = Histogram(bits=bits)
    found = statistic.result(parts(statistic, values, 3))
    ends = [*found["bin_low"].values[1:], np.inf]
    for feature in range(values.shape[1]):
        column = values[:, feature].astype(np.float64)
        column = np.where(column < 0, -np.nextafter(-column, np.inf), column)  # a bin holds its end towards 0
        expected = np.bincount(np.searchsorted(ends, column, side="right"), minlength=len(ends))
        np.testing.assert_array_equal(found["count"].values[:, feature], expected)


def test_invalid_quantiles_and_bits_are_refused() -> None:
    with pytest.raises(AnalysisError, match="from 0 to 1"):
        Histogram((1.5,))
    with pytest.raises(AnalysisError, match="10 to 16 bits"):
        Histogram(bits=20)
