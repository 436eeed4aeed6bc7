from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics.pairwise import cosine_similarity

from analysis.statistics import outliers
from analysis.statistics.onepass import RowBlock
from analysis.statistics.outliers import Extremes
from tests.analysis.stores import value_store
from tests.analysis.test_moments import LENGTHS


def rows_of(values: np.ndarray, position: np.ndarray, start: int = 0) -> RowBlock:
    numbers = np.arange(start, start + len(values))
    return RowBlock(values.astype(np.float32), numbers, position, numbers, numbers)


@settings(max_examples=50)
@given(st.integers(0, 2**31), st.integers(3, 60), st.integers(1, 59))
def test_extremes_of_parts_equal_numpy_and_scikit_learn_on_the_whole(seed: int, n: int, cut: int) -> None:
    rng, cut = np.random.default_rng(seed), min(cut, n - 1)
    values = rng.integers(-4, 5, (n, 5)) * 10.0 ** rng.integers(0, 3, 5)
    position = rng.integers(0, 3, n)
    statistic = Extremes(3)
    a = statistic.update(statistic.zero(5), rows_of(values[:cut], position[:cut]))
    b = statistic.update(statistic.zero(5), rows_of(values[cut:], position[cut:], cut))
    found = statistic.result(statistic.merge(a, b))
    for part, chosen in (("first", position == 0), ("rest", position > 0)):
        own, at = values[chosen], found.sel(part=part)
        assert int(at["n"]) == len(own)
        for feature in range(5):
            order = sorted(np.flatnonzero(chosen), key=lambda row: (-abs(values[row, feature]), row))[:3]
            got = at["row"].values[: len(order), feature]
            np.testing.assert_array_equal(np.abs(values[got, feature]), np.abs(values[order, feature]))
            np.testing.assert_array_equal(at["value"].values[: len(order), feature], values[got, feature])
            assert (at["row"].values[len(order) :, feature] == -1).all()
        if len(own) > 1:
            cosine = cosine_similarity(own)
            mean = (cosine.sum() - np.trace(cosine)) / (len(own) * (len(own) - 1))
            assert float(at["cosine"]) == pytest.approx(mean, rel=1e-10, abs=1e-12)
            np.testing.assert_allclose(at["nonzero"], (own != 0).mean(0))
            np.testing.assert_allclose(at["positive"], (own > 0).mean(0))


def test_planted_outliers_are_found(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(2, sum(LENGTHS), 12))
    starts = np.cumsum([0, *LENGTHS])[:-1]
    values[1, starts, 7] = 24523.0  # a massive activation at the first token of every document
    values[1, :, 3] += 40.0  # a rogue dim
    values[:, :, 5] = 0.0  # dead
    values[0, :, 9] = 1e-5  # silent beside the others
    values[1, :, 10] = np.sign(values[1, :, 10]) * (1 + np.abs(values[1, :, 10]))  # always on
    store = value_store(tmp_path / "s.zarr", values, LENGTHS)
    found = outliers.compute(store, "resid_post", progress=False)
    lines = outliers.massive(found, store)
    assert lines
    assert {(line["layer"], line["dim"], line["position"], line["value"]) for line in lines} == {(1, 7, 0, 24523.0)}
    assert (
        lines[0]["document"]
        == store.documents["id"][int(store.coordinates["document"].values[lines[0]["row"]])].as_py()
    )
    rest = found.sel(part="rest", layer=1)
    assert int(rest["rogue"]) == 3
    assert float(rest["rogue_share"]) > 0.9
    assert found["dead"].sel(layer=0).values.nonzero()[0].tolist() == [5, 9]
    assert found["dead"].sel(layer=1).values.nonzero()[0].tolist() == [5]
    assert found["always_on"].sel(layer=1, feature=[3, 10]).values.all()
    assert float(found["median"][0]) == pytest.approx(np.median(np.abs(store.read("resid_post", 0))), rel=0.5)
