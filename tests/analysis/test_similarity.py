from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.cross_decomposition import CCA
from sklearn.metrics.pairwise import cosine_similarity

from analysis.statistics import similarity
from analysis.survey import survey
from flexcache.errors import AnalysisError
from tests.analysis.stores import value_store
from tests.analysis.test_moments import LENGTHS


def hsic(x: np.ndarray, y: np.ndarray) -> float:
    """Return unbiased HSIC with linear kernels by the formula of Song et al. (2012), with explicit sums over rows.

    The sums cancel almost wholly for few rows, so they have more digits than float64.
    """
    n = len(x)
    x, y = x.astype(np.longdouble), y.astype(np.longdouble)
    k, m = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    one = np.ones(n, np.longdouble)
    middle = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return float((np.trace(k @ m) + middle - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3)))


@settings(max_examples=40)
@example(57250, 4, 1, 1)
@given(st.integers(0, 2**31), st.integers(4, 30), st.integers(1, 8), st.integers(1, 8))
def test_cka_is_the_ratio_of_unbiased_hsic(seed: int, n: int, d: int, e: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) + 3
    y = x @ rng.normal(size=(d, e)) + rng.normal(size=(n, e))
    found = similarity.between({"x": x, "y": y}, permutations=0)
    expected = hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))
    assert float(found["cka"].sel(one="x", two="y")) == pytest.approx(expected, rel=1e-8, abs=1e-8)
    assert float(found["cka"].sel(one="y", two="y")) == pytest.approx(1)


def test_independent_noise_has_no_similarity_and_a_large_p() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 300)), rng.normal(size=(60, 300))
    found = similarity.between({"x": x, "y": y}, permutations=60).sel(one="x", two="y")
    biased = np.linalg.norm(x.T @ y) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))
    assert biased > 0.7
    assert abs(float(found["cka"])) < 0.1
    for measure in similarity.MEASURES:
        assert float(found[f"{measure}_p"]) > 0.05
        assert 0 < float(found[f"{measure}_null"]) < 0.2


def test_similar_matrices_exceed_their_null_distribution() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 5))
    found = similarity.between({"x": x}, {"turned": 3 * x @ np.linalg.qr(rng.normal(size=(5, 5)))[0]}, permutations=50)
    assert float(found["cka"][0, 0]) == pytest.approx(1)
    assert float(found["cca"][0, 0]) == pytest.approx(1)
    assert float(found["cka_p"][0, 0]) == pytest.approx(1 / 51)
    assert float(found["cka_null"][0, 0]) < 0.2


def test_cca_and_cosine_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(200, 3))
    y = x + rng.normal(size=(200, 3))
    found = similarity.between({"x": x, "y": y}, permutations=0).sel(one="x", two="y")
    a, b = CCA(3, max_iter=5000, tol=1e-12).fit_transform(x, y)
    expected = np.mean([np.corrcoef(a[:, i], b[:, i])[0, 1] ** 2 for i in range(3)])
    assert float(found["cca"]) == pytest.approx(expected, rel=1e-6)
    assert float(found["cosine"]) == pytest.approx(np.diag(cosine_similarity(x, y)).mean(), rel=1e-10)
    unequal = similarity.between({"x": x, "z": x[:, :2]}, permutations=3)
    assert np.isnan(unequal["cosine"].sel(one="x", two="z"))


def test_layers_of_one_store_and_of_two_stores_are_compared(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=(sum(LENGTHS), 6))
    values = np.stack([base, base + rng.normal(size=base.shape), rng.normal(size=base.shape)])
    one = value_store(tmp_path / "a.zarr", values, LENGTHS)
    two = value_store(tmp_path / "b.zarr", values, LENGTHS, seed=9, batch_tokens=512)
    found = similarity.compute(one, "resid_post", rows=300, permutations=20, progress=False)
    assert found["one"].values.tolist() == ["resid_post 0", "resid_post 1", "resid_post 2"]
    assert 100 < found.attrs["n"] < 700
    cka = found["cka"].values
    np.testing.assert_allclose(cka, cka.T, atol=1e-12)
    assert cka[0, 1] > 0.4 > 0.1 > abs(cka[0, 2])
    with pytest.raises(AnalysisError, match="did you mean resid_post"):
        similarity.compute(one, ["resid_post", "resid_pots"], progress=False)
    joined = similarity.stores(one, two, "resid_post", rows=300, permutations=0)
    np.testing.assert_allclose(np.diag(joined["cka"]), 1)
    np.testing.assert_allclose(np.diag(joined["cosine"]), 1)
    swapped = np.arange(sum(LENGTHS))
    assert not np.array_equal(one.read("resid_post", 0, swapped), two.read("resid_post", 0, swapped))


def test_matrices_with_different_rows_are_refused() -> None:
    with pytest.raises(AnalysisError, match="cannot be compared"):
        similarity.between({"x": np.zeros((5, 2)), "y": np.zeros((6, 2))})
    with pytest.raises(AnalysisError, match="cannot be compared"):
        similarity.between({"x": np.zeros((3, 2))})


def dependent(rng: np.random.Generator, lengths: list[int]) -> np.ndarray:
    """Return rows that scatter around a random mean of their document."""
    owner = np.repeat(np.arange(len(lengths)), lengths)
    return np.asarray(2 * rng.normal(size=(len(lengths), 4))[owner] + rng.normal(size=(len(owner), 4)))


@pytest.mark.parametrize("lengths", [[8] * 12, [1 + 2 * (i % 5) for i in range(15)]])
def test_independent_matrices_of_dependent_rows_are_rejected_at_the_level_of_the_test(lengths: list[int]) -> None:
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    by_document, by_row = [], []
    for _ in range(120):
        pair = {"x": dependent(rng, lengths)}, {"y": dependent(rng, lengths)}
        by_document.append(similarity.between(*pair, documents=owner, permutations=19)["cka_p"].item())
        by_row.append(similarity.between(*pair, permutations=19)["cka_p"].item())
    assert np.mean(np.array(by_row) <= 0.05) > 0.9
    assert np.mean(np.array(by_document) <= 0.05) < 0.11  # 120 draws of 0.05 exceed this in 1 case of 250
    assert 0.4 < np.mean(by_document) < 0.62


def test_the_null_of_documents_is_that_of_permuted_blocks() -> None:
    rng = np.random.default_rng(1)
    lengths = [3, 5, 4, 1, 6]
    x, y = dependent(rng, lengths), dependent(rng, lengths)
    owner, starts = np.repeat(np.arange(5), lengths), np.cumsum([0, *lengths])
    found = similarity.between({"x": x}, {"y": y}, documents=owner, permutations=2000)
    rows = np.concatenate([np.arange(starts[d], starts[d] + 3) for d in (0, 1, 2, 4)])
    assert (found.attrs["null_documents"], found.attrs["null_rows"], found.attrs["n"]) == (4, 12, 19)
    values = []
    for order in itertools.permutations((0, 1, 2, 3)):
        moved = np.concatenate([rows.reshape(4, 3)[d] for d in order])
        values.append(hsic(x[rows], y[moved]) / np.sqrt(hsic(x[rows], x[rows]) * hsic(y[rows], y[rows])))
    assert found["cka_p"].item() == pytest.approx(np.mean(np.array(values) >= values[0] - 1e-12), abs=0.04)
    assert min(abs(found["cka_null"].item() - np.array(values))) < 1e-9
    assert found["cka"].item() == pytest.approx(hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y)))


def test_one_document_has_no_null_and_an_undefined_cosine_no_p() -> None:
    x = np.random.default_rng(0).normal(size=(12, 3))
    found = similarity.between({"x": x, "z": x[:, :2]}, documents=np.zeros(12), permutations=5)
    assert np.isnan(found["cka_p"]).all()
    assert np.isnan(found["cka_null"]).all()
    unequal = similarity.between({"x": x, "z": x[:, :2]}, permutations=5).sel(one="x", two="z")
    assert np.isnan(unequal["cosine_p"])
    assert float(unequal["cka_p"]) > 0
    with pytest.raises(AnalysisError, match="documents cannot be used"):
        similarity.between({"x": x}, documents=[1, 2])


@pytest.mark.parametrize("wrong", [{"permutations": -1}, {"seed": -1}, {"permutations": 2.5}])
def test_numbers_that_cannot_be_used_are_refused(wrong: dict[str, Any]) -> None:
    x = np.eye(5)
    with pytest.raises(AnalysisError, match=f"{next(iter(wrong))} cannot be used"):
        similarity.between({"x": x}, **wrong)


def test_stores_and_surveys_permute_their_documents(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    lengths = [9] * 16
    values = np.stack([dependent(rng, lengths) for _ in range(2)])
    store = value_store(tmp_path / "a.zarr", values, lengths)
    other = value_store(tmp_path / "b.zarr", values[::-1], lengths, seed=3)
    told = [
        similarity.compute(store, "resid_post", permutations=19, progress=False),
        similarity.stores(store, other, "resid_post", permutations=19),
        survey(store, only="similarity", permutations=19, progress=False)["similarity"],
    ]
    for found in told:
        assert (found.attrs["null_documents"], found.attrs["null_rows"]) == (16, 16 * 8)
    assert float(told[0]["cka_p"][0, 1]) > 0.05
    assert float(told[1]["cka_p"][0, 0]) > 0.05
    assert float(told[1]["cka_p"][0, 1]) == pytest.approx(0.05)
