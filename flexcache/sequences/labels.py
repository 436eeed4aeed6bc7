"""Labels of single tokens, from columns of the documents, and in chats who says them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from flexcache.documents.columns import content_of
from flexcache.errors import DocumentsError
from flexcache.options import SequenceOptions
from flexcache.sequences.choice import column_type, list_lengths, spans
from flexcache.sequences.encoding import Encoded, is_spans

CHAT = ("role", "turn")
SEQUENCE_COLUMNS = (
    *("document", "unit", "batch", "start", "tokens", "keep_start", "n_rows", "row_start", "keep"),
    *("documents", "starts", "places", "begins"),
)
"""The columns of the table of sequences that are never labels."""


def check_names(batch: pa.RecordBatch, options: SequenceOptions, keep_text: bool, own: tuple[str, ...]) -> None:
    """Raise DocumentsError if a label of documents or of tokens has the name of a column that is made, as *own* are."""
    labels = batch.schema.names[2:]
    made = {*own, *(CHAT if content_of(batch) == "messages" else ())}
    if not keep_text:
        made |= {"text_xxh3_128"} if content_of(batch) in ("text", "messages") or "text" in labels else set()
        made |= {"target_xxh3_128"} if options.decoder is not None else set()
    taken = [name for name in labels if name in made]
    columns = {*SEQUENCE_COLUMNS}
    columns |= {"image"} if content_of(batch) == "image" else set()
    columns |= {"context"} if options.decoder is not None else set()
    taken += [name for name in options.token_labels if name in columns]
    if taken:
        raise DocumentsError(
            f"a label cannot be called {taken[0]!r} here: the store makes a column of that name",
            found=", ".join(labels),
            remedy="rename the column, or choose the labels: flexcache.open_documents(…, labels="
            f"{[name for name in labels if name not in taken]})",
        )


def said(encoded: Encoded) -> dict[str, pa.ListArray]:
    """Return the role and the number of the message of each token of chats, null for those of the template."""
    if encoded.chats is None or encoded.turn is None:
        return {}
    offsets = pa.array(np.append(0, np.cumsum(encoded.lengths)).astype(np.int32))
    none = encoded.turn < 0
    roles = [chat.roles for chat in encoded.chats]
    names = [
        None if turn < 0 else roles[document][turn]
        for document, turn in zip(encoded.document.tolist(), encoded.turn.tolist())
    ]
    columns = (pa.array(names, pa.string()), pa.array(encoded.turn.astype(np.int32), mask=none))
    return {name: pa.ListArray.from_arrays(offsets, values) for name, values in zip(CHAT, columns)}


def aligned(batch: pa.RecordBatch, encoded: Encoded, column: str) -> pa.ListArray:
    """Return the labels of a column as lists with an entry for each token of a document.

    A column of lists of values has one for each token. One of lists of ``{start, end, label}`` has spans: of characters
    where the documents are texts, of tokens where they are tokens or images; tokens in no span have null, and of spans
    that overlap, the later one counts.

    Raises
    ------
    DocumentsError
        There is no such column, or it does not fit a document.
    """
    kind = column_type(batch, column)
    offsets = pa.array(np.append(0, np.cumsum(encoded.lengths)).astype(np.int32))
    if not is_spans(kind):
        lengths = list_lengths(batch, encoded, column)
        lists = batch.column(column)
        values = lists.flatten()
        if (lengths != encoded.lengths).any():  # truncated
            begin = np.cumsum(lengths) - lengths
            values = values.take(pa.array(np.arange(len(encoded.flat)) - (encoded.starts - begin)[encoded.document]))
        return pa.ListArray.from_arrays(offsets, values)
    fields = [kind.value_type.field(i) for i in range(kind.value_type.num_fields)]
    label = next((field for field in fields if field.name == "label"), None)
    if label is None:
        raise DocumentsError(
            f"the spans of column {column!r} have no label",
            expected="lists of {start, end, label}",
            found=", ".join(field.name for field in fields),
        )
    found = np.full(len(encoded.flat), None, object)
    for places, span in spans(batch, encoded, column, characters=content_of(batch) in ("text", "messages")):
        found[places] = span["label"]
    return pa.ListArray.from_arrays(offsets, pa.array(found.tolist(), label.type))
