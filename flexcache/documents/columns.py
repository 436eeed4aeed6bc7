"""Checked columns of documents, in the types that a store keeps: ids, the input, labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from flexcache.documents.arrow_types import can_be_stored, is_list, is_text, label_cast, stored_array, united
from flexcache.documents.ids import invalid_id
from flexcache.documents.messages import MESSAGES, read_messages
from flexcache.documents.roles import ONE_TYPE
from flexcache.errors import DocumentsError
from flexcache.images.encoded import encode_image

MAX_TOKEN = 2**31 - 1
CONTENTS: dict[str, pa.DataType] = {
    "text": pa.string(),
    "tokens": pa.list_(pa.int32()),
    "messages": MESSAGES,
    "image": pa.large_binary(),
}
"""The kinds of input of a document, and their types in the batches."""


def content_of(batch: pa.RecordBatch) -> str:
    """Return the input of documents: ``text``, ``tokens``, ``messages`` or ``image``.

    The input is the second column. A label may have one of these names too, so the position decides.

    >>> content_of(pa.RecordBatch.from_pydict({"id": ["a"], "tokens": [[5]], "text": ["a label"]}))
    'tokens'
    """
    return str(batch.schema.names[1])


def plain_column(array: pa.Array, name: str, where: str) -> pa.Array:
    """Return a column in its `stored_type`.

    Raises
    ------
    DocumentsError
        Its values are damaged: text that is not UTF-8, for example.
    """
    try:
        array.validate(full=True)
        return stored_array(array)
    except pa.ArrowException as error:
        raise DocumentsError(
            f"column {name!r} has values that cannot be read",
            where=where,
            found=str(error).splitlines()[0],
            remedy="write the column again; text must be UTF-8",
        ) from error


def check_label_type(name: str, kind: pa.DataType, labels: Sequence[str], where: str | None) -> None:
    """Raise DocumentsError if a store cannot keep labels of a type."""
    if not can_be_stored(kind):
        raise DocumentsError(
            f"column {name!r} has a type that a store cannot keep",
            where=where,
            expected="text, bytes, numbers, dates, times, or lists, structs or maps of these",
            found=str(kind),
            remedy="write it in another type, or leave it out: flexcache.open_documents(…, labels="
            f"{[other for other in labels if other != name]})",
        )


def check_content_type(content: str, kind: pa.DataType, where: str) -> None:
    """Raise DocumentsError if the input of documents cannot be read from a column of this type.

    Messages and images are checked value by value.
    """
    if content in ("text", "tokens"):
        read_content(content, pa.nulls(0, kind), where, 0)


def check_id_type(kind: pa.DataType, where: str) -> None:
    """Raise DocumentsError if the values of a type cannot be ids."""
    whole = pa.types.is_integer(kind) or (pa.types.is_decimal(kind) and kind.scale == 0)
    if not (whole or is_text(kind) or _is_uuid(kind) or pa.types.is_null(kind)):
        raise invalid_id(str(kind), where)


def label_column(array: pa.Array, kind: pa.DataType, name: str, where: str) -> pa.Array:
    """Return labels in another type.

    Raises
    ------
    DocumentsError
        A value does not fit.
    """
    try:
        return label_cast(array, kind)
    except pa.ArrowException as error:
        raise DocumentsError(
            f"column {name!r} has values that do not fit its type",
            where=where,
            expected=str(kind),
            found=str(error).splitlines()[0],
            remedy=ONE_TYPE,
        ) from error


def filled_type(kind: pa.DataType, found: pa.DataType) -> pa.DataType:
    """Return *kind* with the types that are unknown so far, since all values were null, taken from *found*."""
    try:
        return united(kind, found)
    except pa.ArrowException:
        return kind


def read_ids(array: pa.Array, place: str, start: int) -> pa.Array:
    """Return ids as text.

    Raises
    ------
    DocumentsError
        They are neither text nor whole numbers, or one is null.
    """
    check_id_type(array.type, f"{place}s from {start}")
    _check_no_null(array, "id", place, start)
    if _is_uuid(array.type):
        return pa.array(map(str, array.to_pylist()), pa.string())
    return array.cast(pa.string())


def read_content(content: str, array: pa.Array, place: str, start: int, tools: pa.Array | None = None) -> pa.Array:
    """Return texts, tokens or messages, these with their *tools*, in the type of `CONTENTS`.

    Raises
    ------
    DocumentsError
        A value is null, or is none of these.
    """
    if content == "messages":
        return _messages(array, place, start, tools)
    return {"text": _text, "tokens": _tokens}[content](array, place, start)


def read_images(array: pa.Array, names: pa.Array, place: str, folder: Path | None) -> pa.Array:
    """Return images as encoded bytes; paths are relative to *folder*."""
    found = [
        encode_image(value, f"{place}document {name!r}", folder)
        for name, value in zip(names.to_pylist(), array.to_pylist(), strict=True)
    ]
    return pa.array(found, pa.large_binary())


def _is_uuid(kind: pa.DataType) -> bool:
    return getattr(kind, "extension_name", None) == "arrow.uuid"


def _check_no_null(array: pa.Array, what: str, place: str, start: int) -> None:
    if array.null_count:
        index = start + pc.index(array.is_null(), True).as_py()
        raise DocumentsError(
            f"a document without {what}: it is null",
            where=f"{place} {index}",
            expected=what,
            found="null",
            remedy="leave the document out, or complete it"
            + (
                ""
                if what == "id"
                else f"; if another column is the input, give flexcache.open_documents(…, {what}=None)"
            ),
        )


def _text(array: pa.Array, place: str, start: int) -> pa.Array:
    array = _storage(array)
    if not (is_text(array.type) or pa.types.is_null(array.type)):
        raise DocumentsError(
            "a text column that does not hold text",
            where=f"{place}s from {start}",
            expected="string",
            found=str(array.type),
            remedy="name the column that holds the text: flexcache.open_documents(…, text='body')"
            + ("; if every text is missing (NaN), leave these rows out" if pa.types.is_floating(array.type) else ""),
        )
    _check_no_null(array, "text", place, start)
    return array.cast(pa.string())


def _messages(array: pa.Array, place: str, start: int, tools: pa.Array | None) -> pa.Array:
    own = [None] * len(array) if tools is None else tools.to_pylist()
    chats = [
        read_messages(value, f"{place} {start + index}", tools=given, sparse=True)
        for index, (value, given) in enumerate(zip(array.to_pylist(), own, strict=True))
    ]
    return pa.array(chats, MESSAGES)


def _tokens(array: pa.Array, place: str, start: int) -> pa.Array:
    array = _storage(array)
    kind: Any = array.type
    expected = f"lists of whole numbers from 0 to {MAX_TOKEN}"
    fits = is_list(kind) and (pa.types.is_integer(kind.value_type) or pa.types.is_null(kind.value_type))
    if not fits and not pa.types.is_null(kind):
        words = is_list(kind) and is_text(kind.value_type)
        raise DocumentsError(
            "a tokens column that does not hold whole numbers",
            where=f"{place}s from {start}",
            expected=expected,
            found=str(kind),
            remedy="words are not token ids: give the text, or tokenize the words"
            if words
            else "give token ids as lists of integers, in Parquet, JSON Lines, a table or dicts",
        )
    _check_no_null(array, "tokens", place, start)
    flat = pc.list_flatten(array) if fits else pa.nulls(0)
    flat = flat.cast(pa.int64()) if pa.types.is_null(flat.type) else flat
    if len(flat):
        most = pa.scalar(MAX_TOKEN, pa.uint64() if pa.types.is_uint64(flat.type) else pa.int64())
        wrong = pc.fill_null(pc.or_(pc.less(flat, pa.scalar(0, flat.type)), pc.greater(flat, most)), True)
        if pc.any(wrong).as_py():
            at = pc.index(wrong, True).as_py()
            index = start + pc.list_parent_indices(array)[at].as_py()
            raise DocumentsError(
                "an invalid token id",
                where=f"{place} {index}",
                expected=expected,
                found=str(flat[at].as_py()),
                remedy="give the ids of the model's tokenizer",
            )
    return array.cast(pa.list_(pa.int32()))


def _storage(array: pa.Array) -> pa.Array:
    """Return the values that an extension type stores: the text of JSON, the numbers of a tensor."""
    return array.storage if isinstance(array.type, pa.BaseExtensionType) else array
