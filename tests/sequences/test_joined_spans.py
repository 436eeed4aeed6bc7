"""Spans of characters that are joined to a store give the labels that a capture gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import flexcache
from flexcache.errors import ConfigError, MismatchError, StoreError
from tests.corpora import build_store
from tests.models import tiny
from tests.sequences.conftest import WORDS
from tests.sequences.test_chat import CHATS, TAGGED

TEXTS = [" ".join(WORDS[(number + at) % 8] for at in range(2 + number % 7)) for number in range(12)]
OPTIONS: dict[str, dict[str, Any]] = {
    "whole": {},
    "truncated": {"max_length": 5},
    "windows": {"windows": {"length": 4, "stride": 2}},
    "packed": {"packing": {"length": 16}},
    "chosen": {"rows": {"every": 3}},
}


def spans(text: str, number: int) -> list[dict[str, Any]] | None:
    if number % 5 == 4:
        return None
    middle = len(text) // 2
    return [{"start": 1, "end": middle, "label": "a"}, {"start": middle - 2, "end": middle + 3, "label": f"b{number}"}]


def labelled(documents: list[dict[str, Any]], texts: list[str]) -> list[dict[str, Any]]:
    return [{**d, "piece": spans(text, number)} for number, (d, text) in enumerate(zip(documents, texts, strict=True))]


def table(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"id": d["id"], "piece": d["piece"]} for d in documents][::-1]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_joined_spans_of_characters_equal_captured_ones(
    options: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    documents = [{"id": str(number), "text": text} for number, text in enumerate(TEXTS)]
    with_spans = labelled(documents, TEXTS)
    settings = {"tokenizer": tokenizer, **options}
    captured = build_store(tmp_path / "captured.zarr", with_spans, token_labels=["piece"], **settings)
    joined = build_store(tmp_path / "joined.zarr", documents, **settings)
    joined.join(table(with_spans), token_labels="piece", tokenizer=tokenizer)
    assert joined.token_label("piece").to_pylist() == captured.token_label("piece").to_pylist()
    assert "a" in captured.token_label("piece").to_pylist()


@pytest.mark.parametrize("max_length", [None, 12])
def test_spans_of_rendered_chats_can_be_joined(max_length: int | None, tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = TAGGED
    settings = {"tokenizer": tokenizer, "max_length": max_length}
    joined = build_store(tmp_path / "joined.zarr", CHATS, **settings)
    texts = [joined.documents["text"][joined.documents["id"].to_pylist().index(chat["id"])].as_py() for chat in CHATS]
    with_spans = labelled(CHATS, texts)
    captured = build_store(tmp_path / "captured.zarr", with_spans, token_labels=["piece"], **settings)
    joined.join(table(with_spans), token_labels="piece", tokenizer=tokenizer)
    assert joined.token_label("piece").to_pylist() == captured.token_label("piece").to_pylist()


def test_spans_of_targets_move_with_the_shifted_tokens(tokenizer: Any, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    documents = [{"id": str(n), "text": "the dog", "target": text} for n, text in enumerate(TEXTS[:3])]
    settings: dict[str, Any] = {"sites": ["resid_post"], "layers": [0], "progress": False}
    store = flexcache.capture(tiny("t5"), tokenizer, documents, tmp_path / "run.zarr", **settings)
    store.join(table(labelled(documents, TEXTS[:3])), token_labels="piece", tokenizer=tokenizer)
    found = store.token_label("piece").to_pylist()
    for number, text in enumerate(TEXTS[:3]):
        offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        expected: list[str | None] = [None] * len(offsets)
        for span in spans(text, number) or ():
            for at, (start, end) in enumerate(offsets[:-1]):  # the last target is not read by the decoder
                if start < span["end"] and end > span["start"]:
                    expected[at + 1] = span["label"]
        assert [found[row] for row in store.rows(document=str(number))] == expected


def test_another_tokenizer_or_none_or_no_texts_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    documents = [{"id": str(number), "text": text} for number, text in enumerate(TEXTS)]
    part = table(labelled(documents, TEXTS))
    store = build_store(tmp_path / "run.zarr", documents, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="tokenizer of the store cannot be loaded"):
        store.join(part, token_labels="piece")
    other = tokenizer.__class__(tokenizer_object=tokenizer.backend_tokenizer, unk_token="<unk>")
    other.backend_tokenizer.post_processor = None
    with pytest.raises(MismatchError, match="other tokens than those of the store"):
        store.join(part, token_labels="piece", tokenizer=other)
    assert store.label_tables == {}


def test_spans_of_characters_need_the_texts(tokenizer: Any, tmp_path: Path) -> None:
    documents = [{"id": str(number), "text": text} for number, text in enumerate(TEXTS)]
    store = build_store(tmp_path / "run.zarr", documents, tokenizer=tokenizer, keep_text=False)
    with pytest.raises(StoreError, match="no texts in which spans"):
        store.join(table(labelled(documents, TEXTS)), token_labels="piece", tokenizer=tokenizer)
