"""The input column of documents: the same for every kind of source; the other columns are labels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
import pytest

import flexcache
from flexcache.documents import open_documents
from flexcache.errors import ConfigError, DocumentsError
from pipelines.config import DocumentsSource
from tests.corpora import build_store
from tests.models import tiny
from tests.vision import arrays, processor, tiny_vision

CHAT = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "that."}]


def sources(records: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    table = pa.Table.from_pylist(records)
    pq.write_table(table, folder / "a.parquet")
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    (folder / "b.json").write_text(json.dumps(records, indent=1))
    found = {"dicts": records, "a generator": iter(records), "a table": table}
    found |= {name: folder / name for name in ("a.parquet", "a.jsonl", "b.json")}
    if not any(pa.types.is_nested(kind) for kind in table.schema.types):
        pcsv.write_csv(table, folder / "c.csv")
        found["c.csv"] = folder / "c.csv"
    return found


@pytest.mark.parametrize(
    ("record", "options", "content", "labels"),
    [
        ({"text": "A", "messages": CHAT}, {}, "text", ("messages",)),
        ({"text": "A", "image": "p.png"}, {}, "text", ("image",)),
        ({"tokens": [5, 6], "messages": CHAT}, {}, "tokens", ("messages",)),
        ({"tokens": [5, 6], "image": "p.png", "target": "t"}, {}, "tokens", ("image", "target")),
        ({"messages": CHAT, "image": "p.png"}, {}, "messages", ("image",)),
        ({"tokens": [5, 6], "text": "A"}, {"text": None}, "tokens", ("text",)),
        ({"tokens": ["w"], "text": "A", "n": 1}, {"tokens": None, "labels": ["n"]}, "text", ("n",)),
        ({"body": "A", "text": "B"}, {"text": "body", "labels": []}, "text", ()),
        ({"body": "A", "messages": CHAT}, {"text": "body"}, "text", ("messages",)),
        ({"chat": CHAT, "text": "B"}, {"messages": "chat", "labels": []}, "messages", ()),
        ({"ids": [5, 6], "text": "B"}, {"tokens": "ids"}, "tokens", ("text",)),
        ({"text": None, "messages": CHAT}, {}, "messages", ()),
        ({"messages": json.dumps(CHAT)}, {}, "messages", ()),
    ],
)
def test_the_input_is_the_same_in_every_kind_of_source(
    record: dict[str, Any], options: dict[str, Any], content: str, labels: tuple[str, ...], tmp_path: Path
) -> None:
    for name, source in sources([record], tmp_path).items():
        documents = open_documents(source, **options)
        assert (documents.content, documents.labels) == (content, labels), name
        (batch,) = documents.batches()
        expected = {"text": "A", "tokens": [5, 6], "messages": CHAT}[content]
        assert batch.column(1).to_pylist() == [expected], name
        assert [batch.column(label).to_pylist() for label in labels] == [[record[label]] for label in labels], name


@pytest.mark.parametrize("tokens", [[5, 6], ["A", "FILM"]])
def test_text_and_tokens_need_a_choice_and_the_remedy_works(tokens: list[Any], tmp_path: Path) -> None:
    record = {"text": "A", "tokens": tokens, "n": 1}
    for name, source in sources([record], tmp_path).items():
        with pytest.raises(DocumentsError, match=r"tokens=None, labels=\['n'\]") as caught:
            open_documents(source)
        assert "text=None" in str(caught.value), name
    with pytest.raises(DocumentsError, match="words are not token ids"):
        open_documents([{"tokens": ["A", "FILM"]}]).batches().__next__()


def characters(texts: list[str]) -> list[list[int]]:
    return [[ord(character) for character in text] for text in texts]


@pytest.mark.parametrize("keep_text", [True, False])
@pytest.mark.parametrize("first", ["text", "tokens"])
def test_a_store_runs_the_input_and_keeps_the_other_columns_as_labels(
    first: str, keep_text: bool, tmp_path: Path
) -> None:
    content = {"text": "AB"} if first == "text" else {"tokens": [65, 66]}
    record = {"id": "a", **content, "messages": CHAT, "image": "p.png", "role": "r", "kept": 1, "batch": 2}
    store = build_store(
        tmp_path / "run.zarr",
        [record],
        tokenizer=characters if first == "text" else None,
        rows={"every": 1},
        keep_text=keep_text,
    )
    assert store.coordinates["token_id"].values.tolist() == [65, 66]
    (line,) = store.documents.to_pylist()
    assert {name: line[name] for name in record if name not in content} == {
        name: value for name, value in record.items() if name not in content
    }
    assert ("text" in line) == (first == "text" and keep_text)


def test_a_capture_of_texts_that_have_messages_too_does_not_ask_for_a_chat_template(tmp_path: Path) -> None:
    texts = [{"id": "a", "text": "AB", "messages": CHAT}, {"id": "b", "text": "C", "messages": None}]
    for number in range(2):  # the second run resumes
        store = flexcache.capture(tiny("llama"), characters, texts, tmp_path / "run.zarr", layers=[0], progress=False)
        assert store.coordinates["token_id"].values.tolist() == [65, 66, 67], number
    assert "chat_template" not in store.provenance.tokenizer


@pytest.mark.parametrize("given", [list, iter, open_documents])
def test_a_vision_transformer_reads_the_image_of_documents_that_also_have_a_text(
    given: Callable[..., Any], tmp_path: Path
) -> None:
    pictures = arrays(2)
    pairs = [{"image": picture, "text": f"caption {n}"} for n, picture in enumerate(pictures)]
    model, quiet = tiny_vision("vit"), {"layers": [0], "progress": False}
    store = flexcache.capture(model, processor(), given(pairs), tmp_path / "pairs.zarr", **quiet)
    alone = flexcache.capture(model, processor(), [{"image": p} for p in pictures], tmp_path / "alone.zarr", **quiet)
    assert np.array_equal(store.read("resid_post", 0), alone.read("resid_post", 0))
    assert sorted(store.documents["text"].to_pylist()) == ["caption 0", "caption 1"]
    with pytest.raises(ConfigError, match="reads images, and the documents are not"):
        flexcache.capture(model, processor(), [{"text": "a"}], tmp_path / "none.zarr", **quiet)


@pytest.mark.parametrize(
    ("record", "options", "name"),
    [
        ({"messages": CHAT, "role": "r"}, {}, "role"),
        ({"messages": CHAT, "turn": 1}, {}, "turn"),
        ({"text": "a", "text_xxh3_128": "h"}, {"keep_text": False}, "text_xxh3_128"),
        ({"tokens": [1], "unit": [1]}, {"token_labels": ["unit"]}, "unit"),
        ({"text": "a", "positions of rows": 1}, {}, "positions of rows"),
        ({"text": "a", "tokens of the encoder": 1}, {}, "tokens of the encoder"),
    ],
)
def test_a_label_with_the_name_of_an_added_column_is_refused(
    record: dict[str, Any], options: dict[str, Any], name: str, tmp_path: Path
) -> None:
    tokenizer = None if "tokens" in record else characters
    with pytest.raises(DocumentsError, match=f"cannot be called {name!r}.*") as caught:
        build_store(tmp_path / "run.zarr", [record], tokenizer=tokenizer, **options)
    assert "labels=[]" in str(caught.value)
    assert not (tmp_path / "run.zarr").exists()


def test_labels_of_tokens_may_have_names_of_columns_that_this_store_does_not_add(tmp_path: Path) -> None:
    record = {"tokens": [5, 6], "context": ["u", "v"], "image": [1, 2]}
    store = build_store(tmp_path / "run.zarr", [record], token_labels=["context", "image"])
    assert store.token_label("context").to_pylist() == ["u", "v"]
    assert store.token_label("image").to_pylist() == [1, 2]


def test_a_column_that_cannot_be_a_label_can_be_left_out() -> None:
    records = [{"text": "a", "image": object(), "n": 1}]
    with pytest.raises(DocumentsError, match="'image'.*") as caught:
        open_documents(records)
    assert "labels=[…]" in str(caught.value)
    assert open_documents(records, labels=["n"]).labels == ("n",)


def test_null_in_a_configuration_excludes_a_column_from_being_the_input(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "A", "tokens": [5], "n": "NA"}))
    path = str(tmp_path / "a.jsonl")
    assert DocumentsSource(path=path, text=None).open().content == "tokens"
    documents = DocumentsSource(path=path, tokens=None, labels=["n"]).open()
    assert (documents.content, documents.labels) == ("text", ("n",))
    (tmp_path / "a.csv").write_text("text,n\nA,NA\n")
    for nulls, kept in (({}, None), ({"csv_nulls": []}, "NA")):
        (batch,) = DocumentsSource(path=str(tmp_path / "a.csv"), **nulls).open().batches()
        assert batch["n"].to_pylist() == [kept]
