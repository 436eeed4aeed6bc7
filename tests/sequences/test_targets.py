"""Targets of a decoder, shifted right together with their choice of rows and their labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

import flexcache
from flexcache.errors import DocumentsError
from flexcache.options import DecoderInputs
from flexcache.sequences.encoded import Encoded, list_array
from flexcache.sequences.targets import shift_right, split_target
from tests.models import tiny

TOKENS = list_array(np.array([5, 6, 7, 8, 9], np.int32), np.array([3, 0, 2]))
ENCODED = Encoded(
    pa.RecordBatch.from_pydict({"id": pa.array(["a", "b", "c"]), "tokens": TOKENS}), TOKENS, np.zeros(3, bool)
)


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (DecoderInputs(start=1), [[1, 5, 6], [], [1, 8]]),
        (DecoderInputs(start="last"), [[7, 5, 6], [], [9, 8]]),
        (DecoderInputs(inputs="as_given"), [[5, 6, 7], [], [8, 9]]),
    ],
)
def test_targets_are_shifted_behind_the_start_token(inputs: DecoderInputs, expected: list[list[int]]) -> None:
    assert shift_right(ENCODED, inputs).tokens.to_pylist() == expected


def test_choice_and_labels_move_with_the_shifted_token() -> None:
    kept = np.array([True, False, True, False, True])
    labels = {"name": pa.array([["a", "b", "c"], [], ["d", "e"]])}
    encoded = replace(ENCODED, kept=kept, labels=labels)
    moved = shift_right(encoded, DecoderInputs(start=1))
    assert moved.kept is not None
    assert moved.kept.tolist() == [False, True, False, False, False]
    assert moved.labels["name"].to_pylist() == [[None, "a", "b"], [], [None, "d"]]
    given = shift_right(encoded, DecoderInputs(inputs="as_given"))
    assert given.kept is kept
    assert given.labels is labels
    assert shift_right(ENCODED, DecoderInputs(start=1)).kept is None


@pytest.mark.parametrize(
    "column",
    [
        {"target": pa.array([1, 2])},
        {"target_tokens": pa.array(["x", "y"])},
        {"target_tokens": pa.array([[1, None], [2]])},
    ],
)
def test_invalid_targets_are_refused(column: dict[str, pa.Array]) -> None:
    with pytest.raises(DocumentsError, match="does not hold targets"):
        split_target(pa.RecordBatch.from_pydict({"id": pa.array(["a", "b"]), "text": pa.array(["x", "y"])} | column))
    chats = pa.RecordBatch.from_pydict({"id": pa.array(["a"]), "messages": pa.array([[]])})
    with pytest.raises(DocumentsError, match="a chat cannot have a target"):
        split_target(chats)


def test_texts_are_read_by_the_encoder_and_targets_by_the_decoder(tokenizer: Any, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    span = [{"start": 4, "end": 7, "label": "animal"}]
    texts = [
        {"id": "a", "text": "the lazy dog", "target": "the fox", "names": span, "label": 1},
        {"id": "b", "text": "fox", "target": "the dog jumps", "names": span, "label": 0},
    ]
    options: dict[str, Any] = {"token_labels": ["names"], "layers": [0], "progress": False}
    store = flexcache.capture(tiny("t5"), tokenizer, texts, tmp_path / "run.zarr", **options)
    lines = {store.documents["id"][line["document"]].as_py(): line for line in store.tokens.to_pylist()}
    ids = {name: tokenizer(text)["input_ids"] for name, text in (("a", "the lazy dog"), ("b", "fox"))}
    assert {name: line["context"] for name, line in lines.items()} == ids
    read = {"a": "the fox", "b": "the dog jumps"}
    assert {name: line["tokens"] for name, line in lines.items()} == {
        name: [0, *tokenizer(text)["input_ids"][:-1]] for name, text in read.items()
    }
    assert lines["a"]["names"] == [None, None, None, "animal"]
    assert store.documents.sort_by("id")["target"].to_pylist() == ["the fox", "the dog jumps"]
    assert store.token_labels == ("names",)
    options |= {"keep_text": False, "rows": {"character_spans": "names"}}
    hashed = flexcache.capture(tiny("t5"), tokenizer, texts, tmp_path / "hashed.zarr", **options)
    assert {"text_xxh3_128", "target_xxh3_128"} <= set(hashed.documents.column_names)
    assert not {"text", "target"} & set(hashed.documents.column_names)
    assert sorted(hashed.coordinates["token_id"].values.tolist()) == sorted(tokenizer("fox dog")["input_ids"][1:-1])
