"""Token targets, targets of several labels, and rows of documents, compared with plain numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis import probes
from analysis.dataset import targets
from analysis.dataset.probe_dataset import build_dataset
from flexcache.errors import AnalysisError
from tests.analysis.stores import value_store

QUICK: dict[str, Any] = {"resamples": 20, "progress": False, "mdl": False}
LENGTHS = [int(n) for n in np.random.default_rng(0).integers(3, 9, 60)]


@pytest.fixture(scope="module")
def token_store(tmp_path_factory: pytest.TempPathFactory) -> Any:
    rng = np.random.default_rng(1)
    values = rng.normal(size=(2, sum(LENGTHS), 6))
    labels = {
        "tags": [[["red", "blue"], ["red"], [], None][i % 4] for i in range(60)],
        "spans": [[{"start": 1, "end": 3, "label": "name"}] if i % 2 else [] for i in range(60)],
    }
    path: Path = tmp_path_factory.mktemp("tokens") / "run.zarr"
    return value_store(path, values, LENGTHS, labels=labels, vocabulary=7)


def coordinates(store: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(store.coordinates[name].values) for name in targets.COORDINATES}


def test_coordinates_and_functions_are_token_targets(token_store: Any) -> None:
    told = coordinates(token_store)
    dataset = build_dataset(token_store, "resid_post", targets.coordinate("token_id"))
    assert dataset.rows == "all"
    assert [dataset.classes[code] for code in dataset.y] == told["token_id"].tolist()
    late = targets.function("late", lambda t: np.where(t["position"] == 0, None, t["position"] > 2))
    dataset = build_dataset(token_store, "resid_post", late)
    kept = told["position"] > 0
    assert dataset.dropped["tokens without a target"] == (~kept).sum()
    assert np.array_equal(dataset.y.astype(bool), told["position"][kept] > 2)
    assert np.array_equal(dataset.row, np.flatnonzero(kept))
    assert np.array_equal(dataset.read_layer(1), token_store.read("resid_post", layer=1, rows=np.flatnonzero(kept)))
    assert len(np.unique(dataset.group)) == 60


def test_spans_label_tokens_and_documents_stay_in_one_fold(token_store: Any) -> None:
    told = coordinates(token_store)
    odd = np.array(
        [span == [{"start": 1, "end": 3, "label": "name"}] for span in token_store.documents["spans"].to_pylist()]
    )
    expected = odd[told["document"]] & (told["position"] >= 1) & (told["position"] < 3)
    dataset = build_dataset(token_store, "resid_post", targets.spans("spans", outside="none"))
    assert dataset.classes == ("name", "none")
    assert np.array_equal(dataset.y == 0, expected)
    with pytest.raises(AnalysisError, match="one value only"):
        build_dataset(token_store, "resid_post", targets.spans("spans"))
    with pytest.raises(AnalysisError, match="holds no spans"):
        build_dataset(token_store, "resid_post", targets.spans("tags"))


def test_each_of_several_labels_is_a_target(token_store: Any) -> None:
    tags = token_store.documents["tags"].to_pylist()
    found = targets.read(token_store, "tags")
    assert [target.name for target in found] == ["tags=blue", "tags=red"]  # type: ignore[union-attr]
    for target, word in zip(found, ("blue", "red")):
        dataset = build_dataset(token_store, "resid_post", target)
        assert dataset.n_documents == 45
        assert dataset.y.tolist() == [int(word in tag) for tag in tags if tag is not None]
    sweeps = probes.sweeps(
        token_store, found, ["resid_post"], {"ridge": probes.Ridge(), "mean": probes.MassMean()}, **QUICK
    )
    assert list(sweeps) == [
        (f"tags={word}", "resid_post", name) for word in ("blue", "red") for name in ("ridge", "mean")
    ]
    alone = probes.sweep(token_store, found[1], "resid_post", probes.Ridge(), **QUICK)
    assert alone.results.equals(sweeps["tags=red", "resid_post", "ridge"].results)


@pytest.mark.parametrize(("words", "missing"), [(["red", "blue"], None), ([1.0, 2.0], float("nan"))])
def test_a_null_in_a_list_of_words_is_ignored(array_store: Any, words: list[Any], missing: Any) -> None:
    lists = [words, [words[0], missing], [missing], None]
    store = array_store(np.zeros((1, 4, 2)), [1] * 4, tags=lists)
    found = targets.labels(store, "tags")
    assert [target.name for target in found] == [f"tags={word}" for word in sorted(words)]
    assert [target.values(store).to_pylist() for target in found] == [
        [None if held is None else word in held for held in lists] for word in sorted(words)
    ]


@pytest.mark.parametrize("position", [0, 4, -1, -5])
def test_a_position_selects_the_row_of_that_token(token_store: Any, position: int) -> None:
    even = targets.labels(token_store, "tags")[0]
    dataset = build_dataset(token_store, "resid_post", even, rows=position)
    ids = token_store.documents["id"].to_pylist()
    for sample in range(dataset.n_samples):
        document = ids[dataset.source[dataset.document[sample]]]
        assert dataset.row is not None
        assert token_store.rows(document=document, position=position).tolist() == [dataset.row[sample]]
    lengths = token_store.documents["n_tokens"].to_numpy()
    known = np.array([tag is not None for tag in token_store.documents["tags"].to_pylist()])
    there = lengths > position if position >= 0 else lengths >= -position
    assert dataset.n_samples == (known & there).sum()
    assert dataset.dropped.get("no such token", 0) == (known & ~there).sum()


def test_the_maximum_and_the_tokens_of_a_document_equal_numpy(token_store: Any, monkeypatch: Any) -> None:
    from analysis.dataset import probe_dataset

    target = targets.labels(token_store, "tags")[0]
    monkeypatch.setattr(probe_dataset, "BLOCK", 5)
    largest = build_dataset(token_store, "resid_post", target, rows="max")
    together = build_dataset(token_store, "resid_post", target, rows="tokens")
    found, matrices = largest.read_layer(1), together.read_layer(1)
    for at, line in enumerate(largest.source):
        document = token_store.documents["id"][int(line)].as_py()
        rows = token_store.read("resid_post", layer=1, rows=token_store.rows(document=document))
        assert np.array_equal(found[at], rows.max(0))
        assert np.array_equal(matrices[at], rows)


def test_invalid_token_targets_are_refused(token_store: Any) -> None:
    with pytest.raises(AnalysisError, match="tokens have no 'tokenid'"):
        targets.coordinate("tokenid")
    with pytest.raises(AnalysisError, match="cannot be read from the mean"):
        build_dataset(token_store, "resid_post", targets.coordinate("position"), rows="mean")
    with pytest.raises(AnalysisError, match="another number of values"):
        build_dataset(token_store, "resid_post", targets.function("short", lambda told: [1, 2]))
    with pytest.raises(AnalysisError, match='expected: rows="tokens"'):
        probes.sweep(
            token_store, targets.labels(token_store, "tags")[0], "resid_post", probes.AttentionPooled(), **QUICK
        )
