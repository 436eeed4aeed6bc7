"""Columns of documents that describe single tokens: lists with one entry for each token, and lists of spans."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flexcache.documents.arrow_types import is_list
from flexcache.errors import DocumentsError, nearest
from flexcache.sequences.encoded import Encoded


def is_spans(kind: pa.DataType) -> bool:
    """Return True for the type of a column of lists of ``{start, end, …}``.

    >>> is_spans(pa.list_(pa.struct([("start", pa.int64()), ("end", pa.int64())])))
    True
    """
    if not is_list(kind) or pa.types.is_fixed_size_list(kind) or not pa.types.is_struct(kind.value_type):
        return False
    return {"start", "end"} <= {kind.value_type.field(i).name for i in range(kind.value_type.num_fields)}


def column_type(encoded: Encoded, column: str) -> pa.DataType:
    """Return the type of a label column of the documents; raise DocumentsError if there is no such column."""
    labels = tuple(encoded.documents.schema.names[2:])
    if column not in labels:
        raise DocumentsError(
            f"the documents have no column {column!r}",
            found=", ".join(labels) or "no columns besides their content",
            remedy=nearest(column, labels) if labels else "add it, and keep it among the labels",
        )
    return encoded.documents.schema.field(column).type


def token_values(encoded: Encoded, column: str) -> pa.Array:
    """Return the entries of a column of lists, one for each token, shape (tokens,).

    For a document of tokens that was truncated, the entries of the tokens that were cut off are left out.

    Raises
    ------
    DocumentsError
        There is no such column, it holds no lists, or a list does not have one entry for each token.
    """
    kind = column_type(encoded, column)
    if not is_list(kind):
        raise DocumentsError(
            f"column {column!r} holds no lists", expected="lists with one entry for each token", found=str(kind)
        )
    lists = encoded.documents.column(column)
    lengths = pc.fill_null(pc.list_value_length(lists), -1).to_numpy()
    cut = encoded.truncated & (encoded.content == "tokens")
    wrong = np.flatnonzero((lengths != encoded.lengths) & ~(cut & (lengths > encoded.lengths)))
    if len(wrong):
        at = int(wrong[0])
        raise DocumentsError(
            f"column {column!r} does not have one entry for each token",
            where=f"document {encoded.document_id(at)!r}",
            expected=f"{encoded.lengths[at]} entries" + (" of the truncated text" if encoded.truncated[at] else ""),
            found="null" if lengths[at] < 0 else f"{lengths[at]}",
            remedy="give documents of tokens, or spans of characters ({start, end, label}) with texts",
        )
    values = lists.flatten()
    if not cut.any():
        return values
    begin = np.cumsum(lengths) - lengths
    return values.take(pa.array(np.arange(len(encoded.flat)) - (encoded.starts - begin)[encoded.document]))


def span_tokens(encoded: Encoded, column: str, *, characters: bool) -> list[tuple[np.ndarray, Any]]:
    """Return each span of a column, with the indices of its tokens in the columns of tokens.

    A token belongs to a span of characters if they share a character.

    Raises
    ------
    DocumentsError
        There is no such column, or it holds no spans, or a span whose end is before its start.
    """
    kind = column_type(encoded, column)
    if not is_spans(kind):
        raise DocumentsError(f"column {column!r} holds no spans", expected="lists of {start, end}", found=str(kind))
    if characters and encoded.characters is None:
        are = "images" if encoded.content == "image" else "tokens"
        raise DocumentsError(
            f"column {column!r} should hold spans of characters, but the documents are {are}",
            expected="documents of texts, or spans of tokens",
        )
    result = []
    for document, given in enumerate(encoded.documents.column(column).to_pylist()):
        low, count = int(encoded.starts[document]), int(encoded.lengths[document])
        for span in given or ():
            start, end = span["start"], span["end"]
            if start is None or end is None or not 0 <= start <= end:
                raise DocumentsError(
                    f"column {column!r} has an invalid span",
                    where=f"document {encoded.document_id(document)!r}",
                    expected="start and end, from 0, the end excluded",
                    found=str(span)[:80],
                )
            if characters:
                assert encoded.characters is not None
                places = encoded.characters[low : low + count]
                inside = np.flatnonzero((places[:, 0] < end) & (places[:, 1] > start))
            else:
                inside = np.arange(min(start, count), min(end, count))
            result.append((low + inside, span))
    return result


def is_generated(encoded: Encoded) -> np.ndarray:
    """Return True for each token of a completion: bool, shape (tokens,); the documents are completions."""
    prompts = encoded.documents.column("prompt_tokens").to_numpy()
    place = np.arange(len(encoded.flat)) - encoded.starts[encoded.document]
    found: np.ndarray = place >= prompts[encoded.document]
    return found
