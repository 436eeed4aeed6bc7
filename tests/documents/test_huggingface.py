"""Datasets of the Hugging Face library, in memory, from a folder, and streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import flexcache
from flexcache.documents import open_documents
from flexcache.documents.huggingface import load_dataset
from flexcache.errors import ConfigError, DocumentsError
from tests.corpora import build_store, lengths, token_documents
from tests.pipelines.conftest import checkpoint, config, corpus  # noqa: F401
from tests.pipelines.test_cli import run
from tests.recorder.test_recorder import shard_hashes

datasets = pytest.importorskip("datasets")

RECORDS = token_documents(lengths(50))
TEXTS = [{"id": f"t{i}", "text": f"w{4 + i} w5 w6", "label": ("no", "yes")[i % 2]} for i in range(30)]


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "texts"
    path.mkdir()
    (path / "train.jsonl").write_text("\n".join(map(json.dumps, TEXTS)))
    return path


def streamed(records: list[dict[str, Any]], shards: int = 3) -> Any:
    return datasets.Dataset.from_list(records).to_iterable_dataset(num_shards=shards)


@pytest.mark.parametrize("kind", ["in memory", "streamed", "of a generator"])
def test_a_dataset_gives_the_store_of_the_same_list(kind: str, tmp_path: Path) -> None:
    made = {
        "in memory": lambda: datasets.Dataset.from_list(RECORDS),
        "streamed": lambda: streamed(RECORDS),
        "of a generator": lambda: datasets.IterableDataset.from_generator(lambda: iter(RECORDS)),
    }[kind]()
    documents = open_documents(made, batch_rows=7)
    assert documents.count == (50 if kind == "in memory" else None)
    assert documents.labels == ("label", "score")
    assert documents.describe()["kind"] == "dataset"
    store = build_store(tmp_path / "set.zarr", documents)
    plain = build_store(tmp_path / "list.zarr", RECORDS)
    assert shard_hashes(store.path) == shard_hashes(plain.path)
    assert store.documents.equals(plain.documents)


def test_only_the_columns_that_are_asked_for_are_read() -> None:
    records = [{**item, "image": b"large"} for item in RECORDS]
    documents = open_documents(streamed(records), labels=["score"])
    assert [name for batch in documents.batches() for name in batch.schema.names][:3] == ["id", "tokens", "score"]


def test_a_folder_by_name_whole_or_streamed(folder: Path) -> None:
    whole = open_documents(load_dataset(str(folder), split="train[:5]"))
    assert (whole.count, whole.labels) == (5, ("label",))
    assert whole.describe()["dataset"] == {"name": str(folder), "split": "train[:5]"}
    stream = open_documents(load_dataset(str(folder), streaming=True))
    assert stream.count is None
    assert [text for batch in stream.batches() for text in batch["text"].to_pylist()] == [t["text"] for t in TEXTS]


def test_max_tokens_ends_the_corpus_at_the_document_that_reaches_them(tmp_path: Path) -> None:
    sizes = [len(item["tokens"]) for item in RECORDS]
    for most in (1, sum(sizes[:7]), sum(sizes[:7]) + 1, sum(sizes), sum(sizes) + 5):
        store = build_store(tmp_path / f"{most}.zarr", open_documents(RECORDS, batch_rows=4), max_tokens=most)
        expected = next((n for n in range(1, 51) if sum(sizes[:n]) >= most), 50)
        assert sorted(store.documents["source_index"].to_pylist()) == list(range(expected))


def test_a_stream_without_end_is_read_as_far_as_needed(tmp_path: Path) -> None:
    read: list[int] = []

    def endless() -> Iterator[dict[str, Any]]:
        for number in range(10**9):
            read.append(number)
            yield {"id": f"d{number}", "tokens": [5, 6, 7, 8]}

    documents = open_documents(datasets.IterableDataset.from_generator(endless), batch_rows=10)
    store = build_store(tmp_path / "run.zarr", documents, max_tokens=400)
    assert store.n_rows == 400
    assert max(read) < 130


def test_a_capture_by_the_name_of_a_dataset(
    folder: Path,
    config: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--set", f"documents={{dataset: {folder}, streaming: true}}", "--set", "max_tokens=40"]
    run(capsys, "capture", config, "-q", *options)
    store = flexcache.open("run.zarr")
    assert store.plan["documents"] == 14
    assert store.provenance["documents"]["dataset"]["split"] == "train"
    run(capsys, "capture", config, "-q", *options)
    estimate = ["--set", f"documents={{dataset: {folder}}}", "--set", "max_tokens=40", "--tokens-per-second", "1000"]
    told = json.loads(run(capsys, "estimate", config, "-q", "--json", *estimate))
    assert told["plan"]["rows"] == pytest.approx(40)
    text = run(capsys, "capture", config, "-q", *options, "--set", "documents.split=test", status=1)
    assert "cannot be opened" in text
    text = run(capsys, "capture", config, "-q", "--set", "documents={split: train}", status=2)
    assert "must say one place" in text


def test_mistakes_say_what_is_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DocumentsError, match="train"):
        load_dataset(str(folder), split="tset")
    with pytest.raises(DocumentsError, match="cannot be opened"):
        load_dataset(str(folder / "nowhere"))
    (folder / "train.jsonl").write_text('{"text": "a"}\n{"text": ')
    with pytest.raises(DocumentsError, match="cannot be read"):
        list(open_documents(load_dataset(str(folder), streaming=True)).batches())
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"flexcache-activations\[datasets\]"):
        load_dataset(str(folder))
