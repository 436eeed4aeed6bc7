from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import xarray as xr
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from analysis.dataset.tokens import TokenTypes
from analysis.statistics import moments
from analysis.statistics.moments import Moments
from analysis.statistics.onepass import Grouping, RowBlock
from analysis.statistics.onepass.groups import GroupKey
from flexcache.errors import AnalysisError, ConfigError
from tests.analysis.stores import value_store

LENGTHS = [7, 1, 30, 12, 5, 5, 18, 2, 9, 40, 3, 11] * 10


def block(values: np.ndarray, codes: np.ndarray | None = None) -> RowBlock:
    n = len(values)
    numbers = np.arange(n)
    return RowBlock(values.astype(np.float32), numbers, numbers, numbers if codes is None else codes, numbers)


def by_token(count: int) -> Grouping:
    return Grouping((GroupKey("token_id", "token_id", np.arange(count), table=np.arange(count)),))


def whole(values: np.ndarray) -> dict[str, np.ndarray]:
    """Return moments by numpy and scipy, of float64 values in one array."""
    x = values.astype(np.float32).astype(np.float64)
    norms = np.linalg.norm(x, axis=1)
    return {
        "mean": x.mean(0),
        "variance": x.var(0, ddof=1),
        "min": x.min(0),
        "max": x.max(0),
        "norm_mean": norms.mean(),
        "norm_variance": norms.var(ddof=1),
        "m3": ((x - x.mean(0)) ** 3).mean(0),
        "m4": ((x - x.mean(0)) ** 4).mean(0),
    }


def close(found: Any, expected: np.ndarray, scale: np.ndarray | float = 0.0) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10 * np.max(scale))


values_strategy = hnp.arrays(
    np.float32,
    st.tuples(st.integers(2, 60), st.integers(1, 5)),
    elements=st.one_of(st.floats(-1e4, 1e4, width=32), st.sampled_from([0.0, 0.125, 24523.0, -24523.0, 1e-5])),
)


@settings(max_examples=60)
@given(values_strategy, st.lists(st.integers(0, 60), max_size=6), st.integers(0, 2**32 - 1))
def test_any_blocks_and_any_merge_equal_numpy_on_the_whole(values: np.ndarray, cuts: list[int], seed: int) -> None:
    statistic = Moments()
    ends = sorted({0, len(values), *(c for c in cuts if c < len(values))})
    states = [statistic.update(statistic.zero(values.shape[1]), block(values[a:b])) for a, b in pairwise(ends)]
    rng = np.random.default_rng(seed)
    while len(states) > 1:
        i = int(rng.integers(len(states) - 1))
        states[i : i + 2] = [statistic.merge(states[i], states[i + 1])]
    found, expected = statistic.result(states[0]), whole(values)
    scale = np.abs(values.astype(np.float64)).max()
    for name, power in (("mean", 1), ("variance", 2), ("min", 1), ("max", 1), ("norm_mean", 1), ("norm_variance", 2)):
        close(found[name], expected[name], 1e-2 * scale**power)
    close(states[0]["m3"][0, :-1] / len(values), expected["m3"], 1e-2 * scale**3)
    close(states[0]["m4"][0, :-1] / len(values), expected["m4"], 1e-2 * scale**4)


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 200))
@example(0, 1, 1)
def test_groups_equal_numpy_on_the_rows_of_each(seed: int, groups: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(rows, 3)) * 10.0 ** rng.integers(-3, 4, 3) + rng.normal(size=3) * 100
    codes = rng.integers(-1, groups, rows)
    statistic = Moments(by_token(groups))
    half = rows // 2
    a = statistic.update(statistic.zero(3), block(values[:half], codes[:half])) if half else statistic.zero(3)
    b = statistic.update(statistic.zero(3), block(values[half:], codes[half:]))
    found = statistic.result(statistic.merge(a, b))
    for group in range(groups):
        own = values[codes == group]
        at = found.sel(token_id=group)
        assert int(at["n"]) == len(own)
        if len(own) < 2:
            assert np.isnan(at["variance"]).all()
            continue
        expected = whole(own)
        for name in ("mean", "variance", "min", "max", "norm_mean"):
            close(at[name], expected[name])
        if len(own) > 3:
            exact = own.astype(np.float32).astype(np.float64)
            np.testing.assert_allclose(at["skew"], scipy.stats.skew(exact, axis=0), rtol=1e-9, atol=1e-10)
            np.testing.assert_allclose(at["kurtosis"], scipy.stats.kurtosis(exact, axis=0), rtol=1e-9, atol=1e-10)


@settings(max_examples=60)
@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 300), st.just(2)), elements=st.integers(-99, 99).map(float)),
    st.sampled_from([0.0, 1e5, -3e6]),
    st.integers(0, 299),
)
def test_mean_and_variance_equal_numpy_even_if_the_first_rows_differ_from_the_rest(
    values: np.ndarray, shift: float, cut: int
) -> None:
    values = values.copy()
    values[cut:] += np.float32(shift)
    statistic = Moments(order=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("analysis.statistics.onepass.row_block.PIECE", 2 * (-(-len(values) // 16)))
        found = statistic.result(statistic.update(statistic.zero(2), block(values)))
    exact = values.astype(np.float64)
    np.testing.assert_allclose(found["mean"], exact.mean(0), rtol=1e-12, atol=1e-12)
    if len(values) > 1:
        np.testing.assert_allclose(found["variance"], exact.var(0, ddof=1), rtol=1e-10, atol=1e-10)
    assert set(found.data_vars) == {"n", "mean", "variance"}


def test_one_huge_value_among_small_ones_neither_overflows_nor_cancels() -> None:
    values = np.full((70_000, 2), 0.1, np.float32)
    values[::7, 1] = 0.2
    values[-1, 0] = 24523.0
    statistic = Moments()
    found = statistic.result(statistic.update(statistic.zero(2), block(values)))
    expected = whole(values)
    np.testing.assert_allclose(found["mean"], expected["mean"], rtol=1e-12)
    np.testing.assert_allclose(found["variance"], expected["variance"], rtol=1e-10)
    exact = values.astype(np.float64)
    np.testing.assert_allclose(found["skew"], scipy.stats.skew(exact, axis=0), rtol=1e-10)
    np.testing.assert_allclose(found["kurtosis"], scipy.stats.kurtosis(exact, axis=0), rtol=1e-10)


def test_a_large_mean_does_not_cancel_the_spread() -> None:
    values = (1e6 + np.random.default_rng(0).integers(0, 2, (5000, 3)) * 0.0625).astype(np.float32)
    statistic = Moments(order=2)
    found = statistic.result(statistic.update(statistic.zero(3), block(values)))
    np.testing.assert_allclose(found["variance"], values.astype(np.float64).var(0, ddof=1), rtol=1e-10)
    assert "skew" not in found
    one, two = Moments(order=2), Moments(by_token(2), 2)
    codes = np.arange(len(values)) % 2
    grouped = two.result(two.update(two.zero(3), block(values, codes)))
    for group in (0, 1):
        own = one.result(one.update(one.zero(3), block(values[codes == group])))
        np.testing.assert_allclose(grouped["variance"].sel(token_id=group), own["variance"], rtol=1e-10)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_store_by_layer_position_and_label_equals_numpy(dtype: str, tmp_path: Path) -> None:
    values = np.random.default_rng(1).normal(size=(2, sum(LENGTHS), 6)) + 3
    labels = [["a", "b", None][i] for i in np.random.default_rng(0).integers(0, 3, len(LENGTHS))]
    store = value_store(tmp_path / "s.zarr", values, LENGTHS, dtype=dtype, labels={"label": labels})
    assert store.n_units > 1
    found = moments.compute(
        store, "resid_post", by=["layer", "position", "label"], positions=[0, 1, 10], progress=False
    )
    assert found["mean"].dims == ("layer", "position", "label", "feature")
    assert found["position"].values.tolist() == [0, 1, 10]
    position = store.coordinates["position"].values
    label = np.array([store.documents["label"][int(d)].as_py() for d in store.coordinates["document"].values])
    for layer in (0, 1):
        read = store.read("resid_post", layer).astype(np.float64)
        for low, high in ((0, 1), (1, 10), (10, 99)):
            for name in ("a", "b"):
                chosen = read[(position >= low) & (position < high) & (label == name)]
                at = found.sel(layer=layer, position=low, label=name)
                assert int(at["n"]) == len(chosen)
                np.testing.assert_allclose(at["mean"], chosen.mean(0), rtol=1e-10)
                np.testing.assert_allclose(at["variance"], chosen.var(0, ddof=1), rtol=1e-10)
    pooled = moments.compute(store, "resid_post", by=["token_id"], progress=False)
    assert pooled["mean"].dims == ("token_id", "feature")
    assert int(pooled["n"].sum()) == 2 * store.n_rows


def test_rows_can_be_grouped_by_token_class(tmp_path: Path) -> None:
    values = np.random.default_rng(1).normal(size=(1, sum(LENGTHS), 3))
    store = value_store(tmp_path / "s.zarr", values, LENGTHS)
    types = TokenTypes(("even", "odd"), np.array([0, 1, 0, 1, 0, 1, 0, 1, -1]))
    found = moments.compute(store, "resid_post", by=["layer", "token_type"], token_types=types, progress=False)
    ids, rows = store.coordinates["token_id"].values, store.read("resid_post", 0).astype(np.float64)
    for name, odd in (("even", 0), ("odd", 1)):
        chosen = rows[(ids % 2 == odd) & (ids < 8)]
        at = found.sel(layer=0, token_type=name)
        assert int(at["n"]) == len(chosen)
        np.testing.assert_allclose(at["mean"], chosen.mean(0), rtol=1e-10)


def test_unknown_groups_are_refused_with_the_nearest_name(tmp_path: Path) -> None:
    store = value_store(tmp_path / "s.zarr", np.zeros((1, 6, 2)), [3, 3], labels={"score": [0.5, 1.5]})
    with pytest.raises(AnalysisError, match="did you mean position"):
        moments.compute(store, "resid_post", by=["positoin"])
    with pytest.raises(AnalysisError, match="whole numbers"):
        moments.compute(store, "resid_post", by=["score"])
    with pytest.raises(AnalysisError, match="vocabulary"):
        moments.compute(store, "resid_post", by=["token_type"])
    with pytest.raises(AnalysisError, match="ascending"):
        moments.compute(store, "resid_post", by=["position"], positions=[3, 1])
    with pytest.raises(AnalysisError, match="did you mean resid_post"):
        moments.compute(store, "resid_pots")


def test_one_group_may_be_given_as_a_string(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(2, 12, 3))
    store = value_store(tmp_path / "run.zarr", values, [4, 4, 4], labels={"player": ["a", "b", "a"]})
    one = moments.compute(store, "resid_post", by="player", progress=False)
    several = moments.compute(store, "resid_post", by=["player"], progress=False)
    xr.testing.assert_identical(one, several)
    assert one.sizes["player"] == 2
    xr.testing.assert_identical(
        moments.compute(store, "resid_post", by="layer", progress=False),
        moments.compute(store, "resid_post", progress=False),
    )
    with pytest.raises(ConfigError, match="by cannot be read"):
        moments.compute(store, "resid_post", by=3, progress=False)  # type: ignore[arg-type]
