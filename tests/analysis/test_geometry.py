from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA as SklearnPCA  # noqa: N811
from sklearn.linear_model import LinearRegression, LogisticRegression

import flexcache
from analysis.statistics import erasure, geometry
from analysis.statistics.covariance import Covariance
from flexcache.errors import AnalysisError
from flexcache.store.read.row_alignment import matching_rows, rows_in
from tests.analysis.stores import value_store
from tests.analysis.test_moments import LENGTHS, block, by_token


def cloud(rows: int, seed: int = 0, features: int = 6) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(rows, features)) @ rng.normal(size=(features, features)) + 50 * rng.normal(size=features)
    values[0, 0] = 24523.0
    return values.astype(np.float32)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> flexcache.Store:
    values = np.stack([cloud(sum(LENGTHS), seed) for seed in (1, 2)])
    labels = {"label": [("no", "yes", "maybe")[i % 3] for i in range(len(LENGTHS))]}
    path = tmp_path_factory.mktemp("stores") / "s.zarr"
    return value_store(path, values, LENGTHS, labels=labels)


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.integers(2, 80), st.integers(1, 79))
def test_covariance_of_parts_equals_numpy_on_the_whole(seed: int, rows: int, cut: int) -> None:
    values, codes = cloud(rows, seed), np.random.default_rng(seed).integers(-1, 3, rows)
    statistic, cut = Covariance(groups=by_token(3)), min(cut, rows - 1)
    a = statistic.update(statistic.zero(6), block(values[:cut], codes[:cut]))
    b = statistic.update(statistic.zero(6), block(values[cut:], codes[cut:]))
    found = statistic.result(statistic.merge(a, b))
    kept = values[codes >= 0].astype(np.float64)
    assert int(found["n"]) == len(kept)
    if len(kept) > 1:
        expected = np.cov(kept.T)
        np.testing.assert_allclose(found["covariance"], expected, rtol=1e-10, atol=1e-10 * np.abs(expected).max())
        np.testing.assert_allclose(found["mean"], kept.mean(0), rtol=1e-10)
    for group in range(3):
        own = values[codes == group].astype(np.float64)
        if len(own):
            np.testing.assert_allclose(found["group_mean"][group], own.mean(0), rtol=1e-10, atol=1e-8)


def test_components_and_spectrum_are_those_of_scikit_learn(store: flexcache.Store) -> None:
    found = geometry.pca(store, "resid_post", progress=False)
    for layer in (0, 1):
        rows = store.read("resid_post", layer).astype(np.float64)
        expected = SklearnPCA().fit(rows)
        at = found.sel(layer=layer)
        top = expected.explained_variance_[0]
        assert int(at["n"]) == len(rows)
        np.testing.assert_allclose(at["variance"], expected.explained_variance_, rtol=1e-10, atol=1e-10 * top)
        np.testing.assert_allclose(np.abs((at["direction"].values * expected.components_).sum(1)), 1, atol=1e-8)
        p = expected.explained_variance_ratio_
        np.testing.assert_allclose(at["effective_rank"], np.exp(-(p * np.log(p)).sum()), rtol=1e-9)
        np.testing.assert_allclose(at["participation_ratio"], p.sum() ** 2 / (p**2).sum(), rtol=1e-10)
        sign = np.sign((at["direction"].values * expected.components_).sum(1))
        np.testing.assert_allclose(geometry.projected(rows, at), expected.transform(rows) * sign, atol=1e-6)


@pytest.mark.parametrize("kind", ["pca", "zca"])
def test_whitened_rows_have_unit_covariance(store: flexcache.Store, kind: str) -> None:
    found = geometry.pca(store, "resid_post", progress=False).sel(layer=1)
    white = geometry.whitened(store.read("resid_post", 1), found, kind)  # type: ignore[arg-type]
    np.testing.assert_allclose(np.cov(white.T), np.eye(6), atol=1e-6)
    np.testing.assert_allclose(white.mean(0), 0, atol=1e-8)


def test_a_sample_reports_its_number_of_rows(store: flexcache.Store) -> None:
    found = geometry.pca(store, "resid_post", rows=400, components=2, progress=False)
    n = int(found["n"][0])
    assert 200 < n < 800
    assert found["direction"].shape == (2, 2, 6)
    again = geometry.pca(store, "resid_post", rows=400, components=2, progress=False, workers=1)
    assert again.identical(found)


def test_projections_are_a_store_of_the_same_tokens(store: flexcache.Store, tmp_path: Path) -> None:
    found = geometry.pca(store, "resid_post", progress=False)
    small = geometry.project(store, found, tmp_path / "pca.zarr", components=3)
    assert small.arrays["resid_post"].features == 3
    assert small.layers("resid_post") == (0, 1)
    assert small.documents["label"].to_pylist().count("yes") == store.documents["label"].to_pylist().count("yes")
    place = rows_in(store, small)
    assert sorted(place.tolist()) == list(range(store.n_rows))
    for layer in (0, 1):
        expected = geometry.projected(store.read("resid_post", layer, place), found.sel(layer=layer), 3)
        np.testing.assert_allclose(small.read("resid_post", layer), expected, rtol=1e-6, atol=1e-3)
    with pytest.raises(AnalysisError, match="cannot be projected"):
        geometry.project(store, found.isel(kept=slice(0, 2)), tmp_path / "no.zarr", components=3)


def test_rows_in_another_order_are_matched_by_document_and_position(tmp_path: Path) -> None:
    lengths = [5, 9, 30, 2, 17, 8]
    values = np.arange(sum(lengths), dtype=np.float32)[None, :, None]
    one = value_store(tmp_path / "a.zarr", values, lengths, batch_tokens=32)
    two = value_store(tmp_path / "b.zarr", values, lengths, batch_tokens=4096, seed=5)
    place = rows_in(one, two)
    assert not np.array_equal(place, np.arange(len(place)))
    np.testing.assert_array_equal(one.read("resid_post", 0, place), two.read("resid_post", 0))
    fewer = value_store(tmp_path / "c.zarr", values[:, :14], lengths[:2])
    assert (matching_rows(fewer, one) >= 0).sum() == 14
    with pytest.raises(AnalysisError, match="not in the other store"):
        rows_in(fewer, one)
    short = value_store(tmp_path / "e.zarr", values, lengths, max_length=4)
    assert (matching_rows(short, one) >= 0).sum() == sum(min(length, 4) for length in lengths)
    other = value_store(tmp_path / "d.zarr", values, lengths, vocabulary=7)
    with pytest.raises(AnalysisError, match="different tokens"):
        rows_in(one, other)


def test_after_leace_no_linear_predictor_beats_a_constant(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, len(LENGTHS))
    owner = np.repeat(labels, LENGTHS)
    values = rng.normal(size=(1, len(owner), 8)) @ rng.normal(size=(8, 8)) + 4 * np.eye(3, 8)[owner] + 7
    values[0, 5, 2] = 24523.0
    store = value_store(tmp_path / "s.zarr", values, LENGTHS, labels={"label": labels.tolist()})
    found = erasure.leace(store, "resid_post", "label", progress=False)
    assert int(found["rank"][0]) == 2
    rows = store.read("resid_post", 0).astype(np.float64)
    classes = store.documents["label"].to_numpy()[store.coordinates["document"].values]
    erased = erasure.erase(rows, found.sel(layer=0))
    target = np.eye(3)[classes] - np.eye(3)[classes].mean(0)
    before, after = rows - rows.mean(0), erased - erased.mean(0)
    np.testing.assert_allclose(after.T @ target / len(rows), 0, atol=1e-9 * np.abs(before.T @ target / len(rows)).max())
    assert LinearRegression().fit(rows, target).score(rows, target) > 0.2
    assert abs(LinearRegression().fit(erased, target).score(erased, target)) < 1e-10
    scaled = erased / erased.std(0)
    majority = np.bincount(classes).max() / len(classes)
    assert LogisticRegression(max_iter=200).fit(scaled, classes).score(scaled, classes) == pytest.approx(majority)
    # least change: the removed part lies in the span of two directions, and erasing twice equals erasing once
    np.testing.assert_allclose(erasure.erase(erased, found.sel(layer=0)), erased, rtol=1e-8, atol=1e-8)
    assert np.linalg.matrix_rank(rows - erased, tol=1e-6 * np.abs(rows).max()) == 2


def test_leace_of_singular_rows_and_of_one_class(tmp_path: Path) -> None:
    lengths = [3, 4]
    values = np.random.default_rng(0).normal(size=(1, 7, 20))
    store = value_store(tmp_path / "s.zarr", values, lengths, labels={"label": ["a", "b"], "same": ["x", "x"]})
    found = erasure.leace(store, "resid_post", "label", progress=False).sel(layer=0)
    rows = store.read("resid_post", 0).astype(np.float64)
    erased = erasure.erase(rows, found)
    classes = store.coordinates["document"].values
    np.testing.assert_allclose(erased[classes == 0].mean(0), erased[classes == 1].mean(0), atol=1e-10)
    with pytest.raises(AnalysisError, match="nothing to erase"):
        erasure.leace(store, "resid_post", "same", progress=False)
