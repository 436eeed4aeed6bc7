"""The tokens of documents, with the place of each in its text if an option needs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from flexcache.documents.columns import content_of
from flexcache.documents.messages import unpack_messages
from flexcache.errors import ConfigError, DocumentsError
from flexcache.images.encoded import decode_image
from flexcache.options import SequenceOptions
from flexcache.plan import ranges
from flexcache.sequences.chats import check_template, find_tokens, generated_tokens, render_chat
from flexcache.sequences.encoded import Encoded, list_array
from flexcache.sequences.special_tokens import AddedTokens, added_tokens
from flexcache.sequences.token_columns import is_spans

Tokenizer = Callable[..., Any]
"""A tokenizer of transformers, any function from a list of texts to a list of token lists, or an `ImageInput`."""


def encode_documents(
    batch: pa.RecordBatch, tokenizer: Tokenizer | None, options: SequenceOptions, *, special: bool | None = None
) -> Encoded:
    """Return the tokens of documents.

    A document that is one sequence is truncated to ``options.max_length``; packed documents get no special tokens.

    Parameters
    ----------
    special
        Add special tokens to texts as ``options.special_tokens`` says; by default unless documents are packed. Texts of
        rendered chats have them already.

    Raises
    ------
    DocumentsError
        Texts without a tokenizer; a tokenizer that does not return one list for each text.
    ConfigError
        Places of tokens in the text are needed, and the tokenizer does not know them; ``special_tokens`` is set, and
        the tokenizer is a plain function.

    Examples
    --------
    >>> batch = pa.RecordBatch.from_pydict({"id": ["a"], "text": ["cat"]})
    >>> encode_documents(batch, lambda texts: [list(text.encode()) for text in texts], SequenceOptions()).flat.tolist()
    [99, 97, 116]
    """
    limit = options.max_length if options.whole else None
    content = content_of(batch)
    if options.chat is not None and content != "messages":
        raise ConfigError(
            "chat has options of a chat template, and the documents are not chats",
            expected="documents with messages",
            found=content,
            remedy="leave chat out, or give messages",
        )
    if content == "image":
        return _encode_images(batch, tokenizer)
    if content == "tokens":
        return _truncate_tokens(batch, limit)
    if tokenizer is None:
        raise DocumentsError(
            "the documents are texts or chats, but there is no tokenizer",
            expected="a tokenizer, or documents with tokens",
            remedy="pass the model's tokenizer; with tokenizer=None each document needs a list of tokens",
        )
    if content == "messages":
        return _encode_chats(batch, tokenizer, options, limit)
    texts = batch.column(1).to_pylist()
    places = _needs_places(batch, tokenizer, options)
    _check_special_tokens(tokenizer, options)
    special = (options.packing is None if special is None else special) and options.special_tokens != "never"
    lists, offsets = _call_tokenizer(tokenizer, texts, places, special=special)
    if len(lists) != len(texts):
        raise DocumentsError(
            "the tokenizer did not return one token list for each text",
            expected=f"{len(texts)} lists",
            found=f"{len(lists)}",
        )
    added = added_tokens(tokenizer) if special and options.special_tokens == "auto" else AddedTokens()
    doubled = np.array([added.count_doubled(item) for item in lists], np.int64).reshape(-1, 2)
    for place in np.flatnonzero(doubled.any(axis=1)):
        kept = slice(doubled[place, 0], len(lists[place]) - doubled[place, 1])
        lists[place] = lists[place][kept]
        if places:
            offsets[place] = offsets[place][kept]
    truncated = np.array([limit is not None and len(item) > limit for item in lists], dtype=bool)
    for place in np.flatnonzero(truncated):
        first = int(doubled[place, 0])
        shorter, where = _call_tokenizer(tokenizer, [texts[place]], places, limit and limit + first, special)
        lists[place] = shorter[0][first:][:limit]
        if places:
            offsets[place] = where[0][first:][:limit]
    characters = _joined(map(_pairs, offsets), np.zeros((0, 2), np.int64)) if places else None
    lengths = np.array([len(item) for item in lists], np.int64)
    tokens = list_array(_joined(lists, np.zeros(0, np.int32)), lengths)
    return Encoded(batch, tokens, truncated, characters, doubled=np.asarray(doubled.any(axis=1)))


def _encode_images(batch: pa.RecordBatch, image_input: Any) -> Encoded:
    """Return the tokens of images, which have no ids; each image is decoded here, so that a damaged one is found."""
    if not hasattr(image_input, "tokens_of"):
        raise DocumentsError(
            "the documents are images, and there is no image processor to read them",
            expected="flexcache.capture with a vision transformer and its image processor",
            found=type(image_input).__name__,
            remedy="capture them; a forward of your own takes documents of texts or tokens",
        )
    for name, image in zip(batch.column("id").to_pylist(), batch.column(1)):
        decode_image(image.as_py(), f"document {name!r}")
    lengths = np.full(len(batch), image_input.patches.tokens, np.int64)
    return Encoded(batch, list_array(image_input.tokens_of(len(batch)), lengths), np.zeros(len(batch), bool))


def _encode_chats(batch: pa.RecordBatch, tokenizer: Any, options: SequenceOptions, limit: int | None) -> Encoded:
    """Return the tokens of chats; the template writes all special tokens, so the tokenizer adds none."""
    check_template(tokenizer, options.chat)
    given = [unpack_messages(messages) for messages in batch.column(1).to_pylist()]
    names = batch.column("id").to_pylist()
    chats = [render_chat(tokenizer, chat, name, options.chat) for chat, name in zip(given, names)]
    lists, offsets = _call_tokenizer(tokenizer, [chat.text for chat in chats], True, special=False)
    whole = np.array([len(tokens) for tokens in lists], np.int64)
    kept = whole if limit is None else np.minimum(whole, limit)
    places = [_pairs(found) for found in offsets]
    told = [
        find_tokens(chat, found, generated_tokens(tokenizer, chat, conversation, tokens, options.chat))
        for chat, found, conversation, tokens in zip(chats, places, given, lists)
    ]
    flat, characters, turn, part = (
        _joined((values[:count] for values, count in zip(column, kept.tolist())), empty)
        for column, empty in (
            (lists, np.zeros(0, np.int32)),
            (places, np.zeros((0, 2), np.int64)),
            ([turn for turn, _ in told], np.zeros(0, np.int64)),
            ([part for _, part in told], np.zeros(0, np.int8)),
        )
    )
    return Encoded(batch, list_array(flat, kept), kept < whole, characters, chats, turn, part)


def _check_special_tokens(tokenizer: Tokenizer, options: SequenceOptions) -> None:
    """Raise ConfigError if a plain function is asked to add special tokens or to leave them out."""
    if options.special_tokens != "auto" and not hasattr(tokenizer, "convert_tokens_to_ids"):
        raise ConfigError(
            f"special_tokens: {options.special_tokens} cannot be applied",
            expected="a tokenizer of transformers",
            found=f"{type(tokenizer).__name__}, which decides itself what it adds to a text",
            remedy="leave special_tokens out",
        )


def _truncate_tokens(batch: pa.RecordBatch, limit: int | None) -> Encoded:
    tokens = batch.column(1)
    starts, lengths = tokens.offsets.to_numpy()[:-1], np.diff(tokens.offsets.to_numpy())
    kept = lengths if limit is None else np.minimum(lengths, limit)
    flat = tokens.values.to_numpy(zero_copy_only=False)[ranges(starts, kept)]
    return Encoded(batch, list_array(flat, kept), kept < lengths)


def _needs_places(batch: pa.RecordBatch, tokenizer: Tokenizer, options: SequenceOptions) -> bool:
    """Return True if spans of characters are used; raise ConfigError if the tokenizer cannot place tokens in a text."""
    labels = [name for name in options.token_labels if name in batch.schema.names]
    by_spans = any(is_spans(batch.schema.field(name).type) for name in labels)
    needed = by_spans or (options.choice is not None and options.choice.character_spans is not None)
    if needed and not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            "the tokenizer does not return the places of tokens in the text",
            expected="a fast tokenizer of transformers, for spans of characters",
            found=type(tokenizer).__name__,
            remedy="give spans of tokens instead, with documents of tokens",
        )
    return needed


def _call_tokenizer(
    tokenizer: Tokenizer, texts: list[str], places: bool, max_length: int | None = None, special: bool = True
) -> tuple[list[Any], list[Any]]:
    """Return the tokens of texts, and their places in the text if *places*."""
    if not hasattr(tokenizer, "convert_tokens_to_ids"):  # a plain callable
        return list(tokenizer(texts)), []
    options: dict[str, Any] = {"truncation": True, "max_length": max_length} if max_length is not None else {}
    if not special:
        options["add_special_tokens"] = False
    if places:
        options["return_offsets_mapping"] = True
    found = tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False, **options)
    return list(found["input_ids"]), list(found["offset_mapping"]) if places else []


def _joined(parts: Any, empty: np.ndarray) -> np.ndarray:
    """Return arrays one after the other in the type of *empty*, which is the result for no arrays."""
    return np.concatenate([empty, *(np.asarray(part, empty.dtype) for part in parts)])


def _pairs(offsets: Any) -> np.ndarray:
    return np.asarray(offsets, np.int64).reshape(-1, 2)
