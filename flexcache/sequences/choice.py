"""Which tokens of documents become rows, by the rules of a `flexcache.options.Choice`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from flexcache.documents.columns import content_of
from flexcache.errors import ConfigError, DocumentsError, nearest
from flexcache.options import Choice, SequenceOptions
from flexcache.sequences.encoding import Encoded, Tokenizer, is_spans


def chosen(
    batch: pa.RecordBatch, encoded: Encoded, tokenizer: Tokenizer | None, options: SequenceOptions
) -> np.ndarray | None:
    """Return which tokens of a batch the rules choose: bool, shape (tokens,), or None for all.

    Raises
    ------
    DocumentsError
        A column that a rule reads is missing, or holds something else, or does not fit a document.
    ConfigError
        Special tokens are to be dropped, and no tokenizer says which are special.
    """
    choice = options.choice
    if choice is None:
        return None
    kept = np.ones(len(encoded.flat), bool)
    if not choice.specials and content_of(batch) == "image":
        kept &= np.tile(_patches(tokenizer), len(encoded.lengths))
    elif not choice.specials:
        kept &= ~np.isin(encoded.flat, _specials(tokenizer))
    if choice.character_spans is not None:
        kept &= in_spans(batch, encoded, choice.character_spans, characters=True)
    if choice.token_spans is not None:
        kept &= in_spans(batch, encoded, choice.token_spans, characters=False)
    if choice.roles is not None or choice.turns is not None:
        kept &= _said(encoded, choice)
    if choice.mask is not None:
        kept &= _mask(batch, encoded, choice.mask)
    if choice.every is not None:
        kept &= _rank(kept, encoded) % choice.every == 0
    if choice.fraction is not None:
        kept &= _drawn(batch, encoded, choice)
    return kept


def first_or_last(kept: np.ndarray | None, lengths: np.ndarray, rows: str) -> np.ndarray | None:
    """Return the first or last of each document's kept tokens alone, where rows are those: bool, shape (tokens,)."""
    if rows not in ("first", "last") or not lengths.sum():
        return kept
    places = np.arange(int(lengths.sum())) if kept is None else np.flatnonzero(kept)
    document = np.repeat(np.arange(len(lengths)), lengths)[places]
    change = np.flatnonzero(np.diff(document)) + 1
    edges = np.append(0, change) if rows == "first" else np.append(change, len(places)) - 1
    result = np.zeros(int(lengths.sum()), bool)
    result[places[edges[: len(places)]]] = True
    return result


def in_spans(batch: pa.RecordBatch, encoded: Encoded, column: str, *, characters: bool) -> np.ndarray:
    """Return which tokens are in a span of their document: bool, shape (tokens,)."""
    found = np.zeros(len(encoded.flat), bool)
    for tokens, _ in spans(batch, encoded, column, characters=characters):
        found[tokens] = True
    return found


def spans(batch: pa.RecordBatch, encoded: Encoded, column: str, *, characters: bool) -> list[tuple[np.ndarray, Any]]:
    """Return for each span of a column the places of its tokens among those of all documents, and the span.

    A token is in a span of characters where they have one in common.

    Raises
    ------
    DocumentsError
        There is no such column, or it holds no spans.
    """
    kind = column_type(batch, column)
    if not is_spans(kind):
        raise DocumentsError(f"column {column!r} holds no spans", expected="lists of {start, end}", found=str(kind))
    if characters and encoded.characters is None:
        are = "images" if content_of(batch) == "image" else "tokens"
        raise DocumentsError(
            f"column {column!r} is to hold spans of characters, and the documents are {are}",
            expected="documents of texts, or spans of tokens",
        )
    result = []
    for line, given in enumerate(batch.column(column).to_pylist()):
        low, count = int(encoded.starts[line]), int(encoded.lengths[line])
        for span in given or ():
            start, end = span["start"], span["end"]
            if start is None or end is None or not 0 <= start <= end:
                raise DocumentsError(
                    f"column {column!r} has a span that is none",
                    where=f"document {batch.column('id')[line].as_py()!r}",
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


def column_type(batch: pa.RecordBatch, column: str) -> pa.DataType:
    """Return the type of a column of the documents.

    Raises
    ------
    DocumentsError
        There is none.
    """
    if column not in batch.schema.names[2:]:
        labels = tuple(batch.schema.names[2:])
        raise DocumentsError(
            f"the documents have no column {column!r}",
            found=", ".join(labels) or "no columns beside their content",
            remedy=nearest(column, labels) if labels else "add it, and keep it among the labels",
        )
    return batch.schema.field(column).type


def list_lengths(batch: pa.RecordBatch, encoded: Encoded, column: str) -> np.ndarray:
    """Check that a column has a list with an entry for each token of a document, and return the lists' lengths.

    Of a document of tokens that was truncated, the entries behind are not looked at.

    Raises
    ------
    DocumentsError
    """
    array = batch.column(column)
    kind = column_type(batch, column)
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise DocumentsError(f"column {column!r} holds no lists", expected="a list, one entry a token", found=str(kind))
    lengths = pc.fill_null(pc.list_value_length(array), -1).to_numpy()
    cut = encoded.truncated & (content_of(batch) == "tokens")
    wrong = np.flatnonzero((lengths != encoded.lengths) & ~(cut & (lengths > encoded.lengths)))
    if len(wrong):
        line = int(wrong[0])
        raise DocumentsError(
            f"column {column!r} has not one entry for each token",
            where=f"document {batch.column('id')[line].as_py()!r}",
            expected=f"{encoded.lengths[line]} entries" + (" of the truncated text" if encoded.truncated[line] else ""),
            found="null" if lengths[line] < 0 else f"{lengths[line]}",
            remedy="give documents of tokens, or spans of characters ({start, end, label}) with texts",
        )
    return np.asarray(lengths)


def _said(encoded: Encoded, choice: Choice) -> np.ndarray:
    """Return which tokens are of messages of the chosen roles and turns."""
    if encoded.chats is None or encoded.turn is None:
        raise DocumentsError(
            "roles or turns are to be rows, and the documents are no chats",
            expected="documents with messages",
            remedy="give messages, or choose tokens by spans or a mask",
        )
    wanted = []
    for chat in encoded.chats:
        turns = {turn % len(chat.roles) for turn in choice.turns or () if -len(chat.roles) <= turn < len(chat.roles)}
        wanted.append(
            [
                (choice.roles is None or role in choice.roles) and (choice.turns is None or number in turns)
                for number, role in enumerate(chat.roles)
            ]
        )
    first = np.cumsum([0, *(len(chat.roles) for chat in encoded.chats)])[:-1]
    of_message = np.array([value for chat in wanted for value in chat], bool)
    said = encoded.turn >= 0
    said[said] = of_message[first[encoded.document[said]] + encoded.turn[said]]
    return said


def _mask(batch: pa.RecordBatch, encoded: Encoded, column: str) -> np.ndarray:
    column_type(batch, column)
    list_lengths(batch, encoded, column)
    kept = []
    for count, values in zip(encoded.lengths.tolist(), batch.column(column).to_pylist()):
        kept += values[:count]
    if any(value not in (0, 1) for value in kept):
        wrong = next(value for value in kept if value not in (0, 1))
        raise DocumentsError(f"column {column!r} is no mask", expected="true and false, or 1 and 0", found=repr(wrong))
    return np.array(kept, bool)


def _rank(kept: np.ndarray, encoded: Encoded) -> np.ndarray:
    """Return how many kept tokens of its document come before each token."""
    before = np.append(0, np.cumsum(kept))
    return np.asarray(before[:-1] - before[encoded.starts][encoded.document])


def _drawn(batch: pa.RecordBatch, encoded: Encoded, choice: Choice) -> np.ndarray:
    assert choice.fraction is not None
    draws = [
        np.random.default_rng([choice.seed, xxhash.xxh3_64_intdigest(name.encode())]).random(count)
        for name, count in zip(batch.column("id").to_pylist(), encoded.lengths.tolist())
    ]
    return np.concatenate([np.zeros(0), *draws]) < choice.fraction


def _patches(reader: Any) -> np.ndarray:
    """Return which tokens of an image are patches: bool, shape (tokens,)."""
    return np.asarray(reader.patches.place(np.arange(reader.patches.tokens))[0] >= 0)


def _specials(tokenizer: Tokenizer | None) -> list[int]:
    ids = getattr(tokenizer, "all_special_ids", None)
    if ids is None:
        raise ConfigError(
            "special tokens are to be dropped, and nothing says which they are",
            expected="a tokenizer of transformers",
            found=type(tokenizer).__name__,
            remedy="give the model's tokenizer, or a mask column",
        )
    return list(ids)
