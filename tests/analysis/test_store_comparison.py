"""Comparisons of two stores, against numpy and scikit-learn on the same rows."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

import flexcache
from analysis import moments
from analysis.comparison import compare_stores, load
from analysis.dataset.aligned_store import align_stores
from analysis.statistics.difference import Difference
from analysis.statistics.onepass import RowBlock
from flexcache.errors import AnalysisError
from flexcache.store import rows_in
from tests.analysis.stores import value_store
from tests.analysis.test_similarity import hsic

LENGTHS = [5, 9, 1, 12, 7, 3, 8, 11, 2, 6] * 3
LABELS = [number % 2 for number in range(len(LENGTHS))]
DEPTH, FEATURES = 2, 6


def numbers(seed: int = 0, noise: float = 0.0) -> np.ndarray:
    """Values of every layer and token, that depend on the label, with noise of another seed for each layer."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(DEPTH, sum(LENGTHS), FEATURES))
    values[..., 0] += 6 * np.repeat(LABELS, LENGTHS)
    values *= rng.uniform(0.1, 30, sum(LENGTHS))[:, None]
    added = noise * np.random.default_rng(seed + 1).normal(size=values.shape) * np.abs(values).mean(-1, keepdims=True)
    return (values + added).astype(np.float32)


def pair(tmp_path: Path, **second: Any) -> tuple[flexcache.Store, flexcache.Store]:
    """A float32 store, and one of noisy values whose units, batches and order of rows differ."""
    one = value_store(tmp_path / "one.zarr", numbers(), LENGTHS, labels={"label": LABELS})
    settings: dict[str, Any] = {"values": numbers(1, 0.1), "batch_tokens": 64, **second}
    return one, value_store(tmp_path / "two.zarr", settings.pop("values"), LENGTHS, **settings)


def close(found: Any, expected: float, rel: float = 1e-6) -> bool:
    return float(found) == pytest.approx(expected, rel=rel)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("scheduler", ["threads", "synchronous"])
def test_distances_equal_those_of_numpy_for_stores_of_other_order_and_dtype(
    tmp_path: Path, dtype: str, scheduler: str
) -> None:
    one, two = pair(tmp_path, dtype=dtype)
    there = rows_in(two, one)
    assert (there != np.arange(len(there))).any()
    found = compare_stores(one, two, scheduler=scheduler, progress=False)["resid_post"]
    for layer in range(DEPTH):
        a, b = one.read("resid_post", layer).astype(float), two.read("resid_post", layer, there).astype(float)
        at = found.sel(layer=layer)
        error = np.linalg.norm(a - b, axis=1) / np.linalg.norm(a, axis=1)
        cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert close(at["error"], np.linalg.norm(a - b) / np.linalg.norm(a))
        assert close(at["cosine"], cosine.mean())
        assert close(at["error_largest"], error.max())
        assert int(at["row"]) == error.argmax()
        assert close(at["error_median"], np.quantile(error, 0.5, method="inverted_cdf"), 8e-3)
        assert close(at["error_high"], np.quantile(error, 0.99, method="inverted_cdf"), 8e-3)
        assert close(1 - at["cosine_low"], np.quantile(1 - cosine, 0.99, method="inverted_cdf"), 8e-3)
        later = one.coordinates["position"].values > 0
        assert int(at["cka_rows"]) == later.sum()
        a, b = a[later], b[later]
        assert close(at["cka"], hsic(a, b) / np.sqrt(hsic(a, a) * hsic(b, b)), 1e-5)
        assert int(at["n"]) == len(error)
        assert int(at["equal"]) == int(at["zero"]) == 0


def test_a_store_has_no_distance_from_its_copy(tmp_path: Path) -> None:
    one, _ = pair(tmp_path)
    shutil.copytree(tmp_path / "one.zarr", tmp_path / "copy.zarr")
    comparison = compare_stores(one, tmp_path / "copy.zarr", progress=False)
    assert "  resid_post 0: 0; 1.0000" in repr(comparison).splitlines()
    found = comparison["resid_post"]
    assert (found["equal"] == found["n"]).all()
    assert float(abs(found[["error", "error_largest"]]).to_array().max()) == 0
    assert np.allclose(found[["cka", "cosine", "cosine_low"]].to_array(), 1)


def test_small_distances_by_cosine_are_exact_where_the_cosine_rounds_to_one() -> None:
    one = np.array([[1.0, 0.0]], np.float32)
    block = RowBlock(one, *[np.arange(1)] * 4)
    block.other = np.array([[1.0, 1e-6]], np.float32)
    statistic = Difference()
    assert float(statistic.update(statistic.zero(2), block)["apart"]) == pytest.approx(5e-13, rel=1e-3)


def test_rows_of_zeros_are_counted_and_have_no_relative_error() -> None:
    numbered = np.arange(3)
    block = RowBlock(np.array([[0, 0], [3, 4], [0, 5]], np.float32), *[numbered] * 4)
    block.other = np.array([[0, 0], [3, 5], [0, 0]], np.float32)
    statistic = Difference()
    found = statistic.result(statistic.update(statistic.zero(2), block))
    assert (int(found["n"]), int(found["zero"]), int(found["equal"])) == (3, 2, 1)
    assert close(found["error"], np.sqrt(26 / 50))
    assert close(found["error_largest"], 0.2)
    empty = statistic.result(statistic.update(statistic.zero(2), block.select_rows(numbered[:1])))
    assert np.isnan([float(empty[name]) for name in ("error", "error_median", "cosine", "cosine_low")]).all()


def folds_of_documents(store: flexcache.Store) -> np.ndarray:
    """The fold of each document, as scikit-learn splits them in the order of the corpus."""
    order = np.argsort(store.documents["source_index"].to_numpy())
    y = store.documents["label"].to_numpy()[order]
    fold = np.empty(len(y), int)
    for number, (_, test) in enumerate(StratifiedKFold(3, shuffle=True, random_state=4).split(y, y)):
        fold[order[test]] = number
    return fold


def test_probes_of_one_store_are_scored_on_the_other_with_the_same_folds(tmp_path: Path) -> None:
    one, two = pair(tmp_path, dtype="float16")
    probe = LogisticRegression(C=0.1)
    found = compare_stores(one, two, target="label", probe=probe, cv=3, seed=4, resamples=20, progress=False)
    scores = found["resid_post"]["score"]
    last = (one.documents["row_start"].to_numpy() + one.documents["n_rows"].to_numpy() - 1).astype(int)
    fold, y = folds_of_documents(one), one.documents["label"].to_numpy()
    for layer in range(DEPTH):
        a, b = one.read("resid_post", layer, last), two.read("resid_post", layer, rows_in(two, one)[last])
        said = np.zeros((3, len(y)), int)
        for number in range(3):
            rest, test = fold != number, fold == number
            probes = [LogisticRegression(C=0.1).fit(values[rest].astype(float), y[rest]) for values in (a, b)]
            for trial, (fitted, values) in enumerate(((probes[0], a), (probes[1], b), (probes[0], b))):
                said[trial, test] = fitted.predict(values[test].astype(float))
        assert scores.sel(layer=layer).values == pytest.approx((said == y).mean(1))
    data = found["resid_post"]
    assert np.allclose(data["difference"], data["score"] - data["score"].sel(trial="first"))
    assert (data["score_low"] <= data["score"]).all()
    assert (data["difference_low"] <= data["difference"]).all()


@pytest.mark.parametrize("rows", ["last", "mean"])
def test_probes_of_negated_values_keep_their_score_and_those_of_the_first_store_lose_it(
    tmp_path: Path, rows: str
) -> None:
    one, two = pair(tmp_path, values=-numbers())
    found = compare_stores(one, two, target="label", rows=rows, cv=3, resamples=20, progress=False)["resid_post"]
    first, second, across = (found["score"].sel(trial=name).values for name in ("first", "second", "first on second"))
    assert np.allclose(first, second)
    assert (first > 0.8).all()
    assert (across < first - 0.2).all()
    assert np.allclose(found["cka"], 1, atol=1e-5)
    assert (found["difference_high"].sel(trial="first on second") < 0).all()


def test_labels_are_those_of_the_first_store(tmp_path: Path) -> None:
    one, two = pair(tmp_path)
    assert "label" not in two.documents.column_names
    found = compare_stores(one, two, target="label", cv=2, resamples=20, progress=False)
    assert found["resid_post"].attrs["samples"] == len(LENGTHS)


def test_stores_of_other_documents_tokens_or_rows_are_refused_by_what_differs(tmp_path: Path) -> None:
    one, _ = pair(tmp_path)
    fewer = value_store(tmp_path / "fewer.zarr", numbers()[:, : sum(LENGTHS[:-2])], LENGTHS[:-2])
    with pytest.raises(AnalysisError, match=r"2 documents that only it has \(d28, d29\)"):
        compare_stores(one, fewer)
    longer = value_store(tmp_path / "longer.zarr", np.ones((1, sum(LENGTHS) + 1, 2)), [*LENGTHS[:-1], LENGTHS[-1] + 1])
    with pytest.raises(AnalysisError, match="position 6 of 'd29' is only there"):
        compare_stores(longer, one)
    with pytest.raises(AnalysisError, match="192 rows, all of each document"):
        compare_stores(one, longer)
    others = value_store(tmp_path / "others.zarr", numbers(), LENGTHS, vocabulary=7)
    with pytest.raises(AnalysisError, match="different tokens at the same position"):
        compare_stores(one, others)
    last = value_store(tmp_path / "last.zarr", numbers(), LENGTHS, rows="last")
    with pytest.raises(AnalysisError, match="last of each document"):
        compare_stores(one, last)
    mean = value_store(tmp_path / "mean.zarr", numbers(), LENGTHS, rows="mean")
    with pytest.raises(AnalysisError, match="rows: last in the first; rows: mean in the second"):
        compare_stores(last, mean)


def test_what_only_one_store_has_is_named_and_skipped(tmp_path: Path) -> None:
    one, _ = pair(tmp_path)
    deeper = value_store(tmp_path / "deeper.zarr", np.repeat(numbers(), 2, 0), LENGTHS)
    found = compare_stores(one, deeper, progress=False)
    assert found["resid_post"]["layer"].values.tolist() == [0, 1]
    assert found.skipped == {"resid_post, layer 2, 3": "only in the second store"}
    with pytest.raises(AnalysisError, match="no site and layer in common"):
        compare_stores(deeper, one, layers=[3])
    with pytest.raises(AnalysisError, match="neither store has a site 'resid_pots'"):
        compare_stores(one, deeper, "resid_pots")
    with pytest.raises(AnalysisError, match="compare_stores has no argument 'folds'"):
        compare_stores(one, deeper, folds=3)


def test_only_cka_is_defined_for_layers_of_other_widths(tmp_path: Path) -> None:
    wide = np.concatenate([numbers(), numbers()], axis=-1)
    one, two = pair(tmp_path, values=wide)
    found = compare_stores(one, two, target="label", progress=False)
    assert set(found["resid_post"].data_vars) == {"cka", "cka_rows"}
    assert np.allclose(found["resid_post"]["cka"], 1, atol=1e-5)
    assert found.skipped == {"resid_post": "6 features in the first store, 12 in the second: only CKA is defined"}
    assert isinstance(found.plot(), Figure)


def test_rows_that_one_store_has_not_committed_are_left_out(tmp_path: Path) -> None:
    one, two = pair(tmp_path)
    (tmp_path / "two.zarr" / "ledger" / "0" / "0.json").unlink()
    two = flexcache.open(tmp_path / "two.zarr")
    found = compare_stores(one, two, progress=False)["resid_post"]
    there = rows_in(two, one)
    held = np.isin(there, two.committed_rows)
    a, b = one.read("resid_post", 1)[held], two.read("resid_post", 1, there[held])
    assert int(found["n"].sel(layer=1)) == held.sum() == one.n_rows - two.shard_rows > 0
    assert close(found["error"].sel(layer=1), np.linalg.norm(a - b) / np.linalg.norm(a))
    (tmp_path / "two.zarr" / "ledger" / "0" / "1.json").unlink()
    with pytest.raises(AnalysisError, match="no row that both have committed"):
        compare_stores(one, tmp_path / "two.zarr")


def test_a_comparison_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    one, two = pair(tmp_path)
    found = compare_stores(one, two, target="label", cv=2, resamples=20, progress=False)
    found.save(tmp_path / "results")
    again = load(tmp_path / "results")
    assert again["resid_post"].identical(found["resid_post"])
    assert again.skipped == found.skipped
    assert again.provenance["stores"] == ["one.zarr", "two.zarr"]
    again.plot(tmp_path / "picture.svg")
    text = (tmp_path / "picture.svg").read_text()
    assert "<svg" in text


def test_an_aligned_store_reads_the_rows_of_the_other(tmp_path: Path) -> None:
    one, two = pair(tmp_path)
    aligned = align_stores(one, two)
    assert np.array_equal(aligned.read("resid_post", 1), two.read("resid_post", 1, rows_in(two, one)))
    assert np.array_equal(aligned.read("resid_post", 0, slice(3, 9)), aligned.read("resid_post", 0)[3:9])
    assert aligned.documents is one.documents
    assert aligned.provenance is two.provenance


def test_statistics_of_int8_stores_are_those_of_the_decoded_values(tmp_path: Path) -> None:
    _, two = pair(tmp_path, dtype="int8")
    found = moments.compute(two, "resid_post", layers=[1], progress=False)
    assert np.allclose(found["variance"][0], two.read("resid_post", 1).astype(float).var(0, ddof=1))
