"""The columns of a tokenized document: tokens, digests of its contents, labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from flexcache.documents.columns import content_of
from flexcache.images.encoded import IMAGE, IMAGE_DIGEST
from flexcache.sequences.encoded import Encoded
from flexcache.sequences.targets import TARGET, TARGET_TOKENS

ENCODER_TOKENS = "tokens of the encoder"
"""The column of a tokenized corpus with the tokens of the encoder; an unlikely name for a label."""


def document_columns(
    batch: pa.RecordBatch, encoded: Encoded, context: Encoded | None, source_index: np.ndarray, keep_text: bool
) -> pa.RecordBatch:
    """Return documents with their tokens and labels.

    Parameters
    ----------
    batch
        The documents as they were read.
    encoded, context
        Their tokens, and those of the encoder of an encoder-decoder model.
    source_index : ndarray of int64, shape (documents,)
    keep_text
        Keep texts, or replace them by ``text_xxh3_128``.
    """
    columns: dict[str, Any] = {
        "id": batch.column("id"),
        "source_index": pa.array(source_index),
        "tokens": encoded.tokens,
    }
    if context is not None:
        columns[ENCODER_TOKENS] = context.tokens
    texts = ("text",) if context is None else ("text", TARGET)
    content = content_of(batch)
    for name in batch.schema.names:
        if name == TARGET_TOKENS and context is not None:  # kept as tokens
            continue
        if name in texts and not keep_text and pa.types.is_string(batch.schema.field(name).type):
            columns[f"{name}_xxh3_128"] = pa.array(text_digests(batch.column(name).to_pylist()), pa.string())
        elif name == content == IMAGE:
            columns |= {IMAGE: batch.column(IMAGE), IMAGE_DIGEST: pa.array(image_digests(batch.column(IMAGE)))}
        elif name == content == "messages":
            chats = [chat.text for chat in encoded.chats or ()]
            columns |= {"text": pa.array(chats)} if keep_text else {"text_xxh3_128": pa.array(text_digests(chats))}
            columns["messages_xxh3_128"] = pa.array(messages_digests(batch.column(1).to_pylist()))
        elif name not in columns and name not in encoded.labels:
            columns[name] = batch.column(name)
    return pa.RecordBatch.from_pydict(columns | encoded.labels)


def text_digests(texts: Sequence[str | None]) -> list[str | None]:
    """Return the XXH3-128 of each text, None for None.

    >>> text_digests(["a cat", None])
    ['2b8f3709fb5984f5cb684ce13fa398fd', None]
    """
    return [None if text is None else xxhash.xxh3_128_hexdigest(text.encode()) for text in texts]


def messages_digests(chats: list[list[dict[str, str]]]) -> list[str]:
    """Return the XXH3-128 of the messages of each chat.

    >>> messages_digests([[{"role": "user", "content": "Hello"}]]) == text_digests(["user\\0Hello"])
    True
    """
    return [
        xxhash.xxh3_128_hexdigest("\0".join(text for m in chat for text in (m["role"], m["content"])).encode())
        for chat in chats
    ]


def image_digests(images: pa.Array) -> list[str]:
    """Return the XXH3-128 of each encoded image.

    >>> image_digests(pa.array([b"a cat"], pa.large_binary())) == text_digests(["a cat"])
    True
    """
    return [xxhash.xxh3_128_hexdigest(image.as_buffer()) for image in images]
