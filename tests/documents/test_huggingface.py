"""Datasets of the Hugging Face library, in memory, from a folder, and streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import flexcache
from flexcache.documents import load_dataset, open_documents
from flexcache.errors import ConfigError, DocumentsError
from tests.corpora import build_store, lengths, token_documents
from tests.pipelines.conftest import checkpoint, config, corpus  # noqa: F401
from tests.pipelines.test_cli import run
from tests.recording.test_recorder import shard_hashes

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


def test_a_folder_is_a_dataset_by_name_whole_or_streamed(folder: Path) -> None:
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
    assert store.provenance.documents["dataset"]["split"] == "train"
    run(capsys, "capture", config, "-q", *options)
    estimate = ["--set", f"documents={{dataset: {folder}}}", "--set", "max_tokens=40", "--tokens-per-second", "1000"]
    told = json.loads(run(capsys, "estimate", config, "-q", "--json", *estimate))
    assert told["plan"]["rows"] == pytest.approx(40)
    text = run(capsys, "capture", config, "-q", *options, "--set", "documents.split=test", status=1)
    assert "cannot be opened" in text
    text = run(capsys, "capture", config, "-q", "--set", "documents={split: train}", status=2)
    assert "must name one place" in text


def test_errors_of_a_dataset_by_name_say_what_is_wrong(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize("named", [datasets.DatasetDict, datasets.IterableDatasetDict, dict])
def test_several_splits_are_refused_by_name(named: Any) -> None:
    one = datasets.Dataset.from_list(TEXTS)
    splits = {"train": one, "test": one}
    if named is datasets.IterableDatasetDict:
        splits = {name: split.to_iterable_dataset() for name, split in splits.items()}
    with pytest.raises(DocumentsError, match=r"several splits(.|\n)*train, test(.|\n)*documents\['train'\]"):
        open_documents(named(splits))


def test_a_name_without_a_split_is_refused_with_the_splits(folder: Path) -> None:
    with pytest.raises(DocumentsError, match="several splits"):
        load_dataset(str(folder), split=None)  # type: ignore[arg-type]


LABELS: dict[str, tuple[Any, Any]] = {
    "text": ("x", datasets.Value("string")),
    "number": (3, datasets.Value("int64")),
    "struct": ({"k": [1]}, {"k": datasets.List(datasets.Value("int64"))}),
}


def _streams(records: list[dict[str, Any]], feature: Any, folder: Path) -> dict[str, Any]:
    path = folder / "stream.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    stated = datasets.Features({"text": datasets.Value("string"), "label": feature})
    read = datasets.load_dataset("json", data_files=str(path), split="train", streaming=True)
    stream = datasets.IterableDataset.from_generator
    return {
        "a generator": stream(lambda: iter(records)),
        "a generator with features": stream(lambda: iter(records), features=stated),
        "JSON Lines": read,
        "JSON Lines, mapped": read.map(lambda record: {"text": record["text"]}),
    }


@pytest.mark.parametrize("batch_rows", [2, 1024])
@pytest.mark.parametrize("kind", LABELS)
def test_labels_that_are_null_at_the_start_of_a_stream_are_read(kind: str, batch_rows: int, tmp_path: Path) -> None:
    label, feature = LABELS[kind]
    records = [{"text": f"t{n}", "label": None if n != 5 else label} for n in range(7)]
    for name, stream in _streams(records, feature, tmp_path).items():
        store = build_store(
            tmp_path / f"{name}.zarr",
            open_documents(stream, batch_rows=batch_rows),
            tokenizer=lambda texts: [[len(text)] for text in texts],
        )
        found = {line["text"]: line["label"] for line in store.documents.to_pylist()}
        assert found == {record["text"]: record["label"] for record in records}, name


def test_a_stream_may_leave_out_keys_if_its_first_documents_have_them() -> None:
    stream = datasets.IterableDataset.from_generator(lambda: iter([{"text": "a"}, {"text": "b", "label": 1}]))
    (batch,) = open_documents(stream).batches()
    assert batch["label"].to_pylist() == [None, 1]
    with pytest.raises(DocumentsError, match="'label' is missing in the first documents"):
        list(open_documents(stream, batch_rows=1).batches())
    assert len(list(open_documents(stream, batch_rows=1, labels=[]).batches())) == 2


def test_a_stream_whose_labels_change_their_type_is_refused() -> None:
    records = [{"text": "a", "label": None}] * 3 + [{"text": "b", "label": "x"}, {"text": "c", "label": 5}]
    stream = datasets.IterableDataset.from_generator(lambda: iter(records))
    with pytest.raises(DocumentsError, match="incompatible types"):
        open_documents(stream)
    with pytest.raises(DocumentsError, match=r"'label' has values that do not fit(.|\n)*string"):
        list(open_documents(stream, batch_rows=1).batches())


@pytest.mark.parametrize("kind", ["in memory", "streamed", "of a generator"])
def test_class_labels_keep_their_numbers_and_their_names(kind: str, tmp_path: Path) -> None:
    classes, tags = datasets.ClassLabel(names=["no", "yes"]), datasets.ClassLabel(names=["O", "B"])
    features = datasets.Features(
        {"tokens": datasets.List(datasets.Value("int32")), "label": classes, "tags": datasets.List(tags)}
    )
    records = [
        {"tokens": [5, 6], "label": None, "tags": [0, 1]},
        {"tokens": [7], "label": 1, "tags": []},
        {"tokens": [8], "label": -1, "tags": None},
    ]
    made = datasets.Dataset.from_list(records, features=features)
    source = {
        "in memory": made,
        "streamed": made.to_iterable_dataset(),
        "of a generator": datasets.IterableDataset.from_generator(lambda: iter(records), features=features),
    }[kind]
    documents = open_documents(source)
    assert documents.labels == ("label", "label_name", "tags", "tags_name")
    found = sorted(build_store(tmp_path / "run.zarr", documents).documents.to_pylist(), key=lambda line: line["id"])
    assert [line["label"] for line in found] == [None, 1, -1]
    assert [line["label_name"] for line in found] == [None, "yes", None]
    assert [line["tags_name"] for line in found] == [["O", "B"], [], None]
    # as versions without names described it, so that their stores resume
    assert set(documents.describe()["columns"]) == {"id", "tokens", "label", "tags"}
    assert open_documents(source, labels=["label_name"]).labels == ("label_name",)
    own = made.map(lambda record: {"label_name": "own"})
    assert open_documents(own, labels=["label_name"]).batches().__next__()["label_name"].to_pylist() == ["own"] * 3


def test_a_transform_is_refused_and_each_remedy_works() -> None:
    def upper(batch: dict[str, list[str]]) -> dict[str, list[str]]:
        return {"text": [text.upper() for text in batch["text"]]}

    def texts(dataset: Any) -> list[str]:
        return [row["text"] for batch in open_documents(dataset).batches() for row in batch.to_pylist()]

    plain = datasets.Dataset.from_dict({"text": ["a", "b"]})
    transformed = plain.with_transform(upper)
    derived = [transformed.select(range(1)), transformed.shuffle(seed=0), transformed.select_columns(["text"])]
    for dataset in (transformed, *derived, datasets.concatenate_datasets([transformed, transformed])):
        with pytest.raises(DocumentsError, match=r"has a transform[\s\S]*dataset.map[\s\S]*with_format\(None\)"):
            open_documents(dataset)
    assert texts(plain.map(upper, batched=True)) == ["A", "B"]
    assert texts(transformed.with_format(None)) == ["a", "b"]
    assert texts(plain.with_format("numpy")) == ["a", "b"]
