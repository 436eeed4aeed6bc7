"""The tokens of documents, with where they are in the text and whether they were truncated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from flexcache.documents.columns import content_of
from flexcache.errors import ConfigError, DocumentsError
from flexcache.images.encoded import decode
from flexcache.options import SequenceOptions
from flexcache.plan import ranges
from flexcache.sequences.chat import Chat, check_template, generated, render, turns

Tokenizer = Callable[..., Any]


@dataclass(frozen=True)
class Encoded:
    """A batch of documents as tokens.

    Attributes
    ----------
    tokens : list<int32> array, shape (documents,), without nulls
    truncated : ndarray of bool, shape (documents,)
    characters : ndarray of int64, shape (tokens, 2), or None
        First character of each token in its text and the one after its last, 0 and 0 for a token that was added; None
        where nothing asks for them, or the documents are tokens.
    chats : list of Chat, or None
        Where the documents are messages.
    turn : ndarray of int64, shape (tokens,), or None
        Which of its chat's messages each token belongs to, -1 for none.
    """

    tokens: pa.ListArray
    truncated: np.ndarray
    characters: np.ndarray | None = None
    chats: list[Chat] | None = None
    turn: np.ndarray | None = None

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document: int64, shape (documents,)."""
        return np.diff(self.tokens.offsets.to_numpy()).astype(np.int64)

    @cached_property
    def starts(self) -> np.ndarray:
        """Place of each document's first token among those of all: int64, shape (documents,)."""
        return np.cumsum(self.lengths) - self.lengths

    @cached_property
    def flat(self) -> np.ndarray:
        """The tokens of all documents, one after the other: int32."""
        return np.asarray(self.tokens.flatten().to_numpy(zero_copy_only=False))

    @cached_property
    def document(self) -> np.ndarray:
        """The document of each token: int64, shape (tokens,)."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)


def encode(batch: pa.RecordBatch, tokenizer: Tokenizer | None, options: SequenceOptions) -> Encoded:
    """Return the tokens of documents, truncated where each is a sequence, without special ones where packed.

    Raises
    ------
    DocumentsError
        Texts without a tokenizer; a tokenizer that does not return one list a text.
    ConfigError
        Places of tokens in the text are asked for, and the tokenizer does not know them.
    """
    limit = options.max_length if options.whole else None
    content = content_of(batch)
    if content == "image":
        return _seen(batch, tokenizer)
    if content == "tokens":
        return _given(batch.column(1), limit)
    if tokenizer is None:
        raise DocumentsError(
            "the documents are texts or chats, but there is no tokenizer",
            expected="a tokenizer, or documents with tokens",
            remedy="pass the model's tokenizer; with tokenizer=None each document needs a list of tokens",
        )
    if content == "messages":
        return _chats(batch, tokenizer, limit)
    texts = batch.column(1).to_pylist()
    places = _needs_places(batch, tokenizer, options)
    lists, offsets = _encode(tokenizer, texts, places, special=options.packing is None)
    if len(lists) != len(texts):
        raise DocumentsError(
            "the tokenizer did not return one token list a text",
            expected=f"{len(texts)} lists",
            found=f"{len(lists)}",
        )
    truncated = np.array([limit is not None and len(item) > limit for item in lists], dtype=bool)
    for place in np.flatnonzero(truncated):
        shorter, where = _encode(tokenizer, [texts[place]], places, limit)
        lists[place] = shorter[0][:limit]
        if places:
            offsets[place] = where[0][:limit]
    flat = np.concatenate([np.zeros(0, np.int32), *(np.asarray(item, np.int32) for item in lists)])
    characters = np.concatenate([np.zeros((0, 2), np.int64), *map(_pairs, offsets)]) if places else None
    return Encoded(list_array(flat, np.array([len(item) for item in lists], np.int64)), truncated, characters)


def _seen(batch: pa.RecordBatch, reader: Any) -> Encoded:
    """Return the tokens of images, which have no ids; each image is decoded, so that a damaged one shows now."""
    if not hasattr(reader, "tokens_of"):
        raise DocumentsError(
            "the documents are images, and nothing says what a model makes of them",
            expected="flexcache.capture with a vision transformer and its image processor",
            found=type(reader).__name__,
            remedy="capture them; a forward of your own takes documents of texts or tokens",
        )
    for name, image in zip(batch.column("id").to_pylist(), batch.column(1)):
        decode(image.as_py(), f"document {name!r}")
    lengths = np.full(len(batch), reader.patches.tokens, np.int64)
    return Encoded(list_array(reader.tokens_of(len(batch)), lengths), np.zeros(len(batch), bool))


def _chats(batch: pa.RecordBatch, tokenizer: Any, limit: int | None) -> Encoded:
    """Return the tokens of chats; the template has all special tokens, so the tokenizer adds none."""
    check_template(tokenizer)
    given = batch.column(1).to_pylist()
    chats = [render(tokenizer, messages, name) for messages, name in zip(given, batch.column("id").to_pylist())]
    lists, offsets = _encode(tokenizer, [chat.text for chat in chats], True, special=False)
    whole = np.array([len(tokens) for tokens in lists], np.int64)
    kept = whole if limit is None else np.minimum(whole, limit)
    places = [_pairs(found) for found in offsets]
    turn = [
        turns(chat, found, generated(tokenizer, messages, tokens))[:count]
        for chat, found, messages, tokens, count in zip(chats, places, given, lists, kept.tolist())
    ]
    flat = np.concatenate([np.zeros(0, np.int32), *(np.array(t[:n], np.int32) for t, n in zip(lists, kept.tolist()))])
    characters = np.concatenate([np.zeros((0, 2), np.int64), *(p[:n] for p, n in zip(places, kept.tolist()))])
    turned = np.concatenate([np.zeros(0, np.int64), *turn])
    return Encoded(list_array(flat, kept), kept < whole, characters, chats, turned)


def list_array(flat: np.ndarray, lengths: np.ndarray) -> pa.ListArray:
    """Return values, one document's after the other's, as a list<int32> array."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, pa.int32()))


def is_spans(kind: pa.DataType) -> bool:
    """Whether a column holds lists of ``{start, end, …}``."""
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_struct(kind.value_type):
        return False
    return {"start", "end"} <= {kind.value_type.field(i).name for i in range(kind.value_type.num_fields)}


def _given(tokens: pa.ListArray, limit: int | None) -> Encoded:
    starts, lengths = tokens.offsets.to_numpy()[:-1], np.diff(tokens.offsets.to_numpy())
    kept = lengths if limit is None else np.minimum(lengths, limit)
    flat = tokens.values.to_numpy(zero_copy_only=False)[ranges(starts, kept)]
    return Encoded(list_array(flat, kept), kept < lengths)


def _needs_places(batch: pa.RecordBatch, tokenizer: Tokenizer, options: SequenceOptions) -> bool:
    labels = [name for name in options.token_labels if name in batch.schema.names]
    by_spans = any(is_spans(batch.schema.field(name).type) for name in labels)
    needed = by_spans or (options.choice is not None and options.choice.character_spans is not None)
    if needed and not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            "the tokenizer does not say where in the text its tokens are",
            expected="a fast tokenizer of transformers, for spans of characters",
            found=type(tokenizer).__name__,
            remedy="give spans of tokens instead, with documents of tokens",
        )
    return needed


def _pairs(offsets: Any) -> np.ndarray:
    return np.asarray(offsets, np.int64).reshape(-1, 2)


def _encode(
    tokenizer: Tokenizer, texts: list[str], places: bool, max_length: int | None = None, special: bool = True
) -> tuple[list[Any], list[Any]]:
    """Return the tokens of texts, and where in the text they are, if that is asked for."""
    if not hasattr(tokenizer, "convert_tokens_to_ids"):  # a plain callable
        return list(tokenizer(texts)), []
    options: dict[str, Any] = {"truncation": True, "max_length": max_length} if max_length is not None else {}
    if not special:
        options["add_special_tokens"] = False
    if places:
        options["return_offsets_mapping"] = True
    found = tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False, **options)
    return list(found["input_ids"]), list(found["offset_mapping"]) if places else []
