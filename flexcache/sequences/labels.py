"""Labels of single tokens: from columns of the documents, and the roles and turns of chats."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from flexcache.documents.columns import content_of
from flexcache.errors import DocumentsError
from flexcache.options import SequenceOptions
from flexcache.sequences.chats import PARTS
from flexcache.sequences.encoded import Encoded
from flexcache.sequences.token_columns import column_type, is_generated, is_spans, span_tokens, token_values

CHAT = ("role", "turn", "part")
"""Labels of the tokens of chats; a label ``part`` of the documents takes the place of the last."""
PHASE = "phase"
SEQUENCE_COLUMNS = (
    *("document", "unit", "batch", "start", "tokens", "keep_start", "n_rows", "row_start", "keep"),
    *("documents", "starts", "places", "begins"),
)
"""The columns of the table of sequences that are never labels."""


def check_label_names(batch: pa.RecordBatch, options: SequenceOptions, keep_text: bool, own: tuple[str, ...]) -> None:
    """Raise DocumentsError if a label of documents or tokens has the name of a column that is added, such as *own*."""
    labels = batch.schema.names[2:]
    made = {*own, *(CHAT[:2] if content_of(batch) == "messages" else ()), *((PHASE,) if options.decoding else ())}
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


def role_labels(encoded: Encoded) -> dict[str, pa.ListArray]:
    """Return role, index and part of the message of each token of chats; the first two are null for the template."""
    if encoded.chats is None or encoded.turn is None or encoded.part is None:
        return {}
    roles = [chat.roles for chat in encoded.chats]
    names = [
        None if turn < 0 else roles[document][turn]
        for document, turn in zip(encoded.document.tolist(), encoded.turn.tolist())
    ]
    columns = (
        pa.array(names, pa.string()),
        pa.array(encoded.turn.astype(np.int32), mask=encoded.turn < 0),
        pa.array(PARTS, pa.string()).take(pa.array(encoded.part)),
    )
    return {name: encoded.list_of(values) for name, values in zip(CHAT, columns)}


def phase_labels(encoded: Encoded) -> pa.ListArray:
    """Return ``prefill`` for each token of a prompt, and ``decode`` for each token of its completion."""
    return encoded.list_of(pa.array(np.where(is_generated(encoded), "decode", "prefill").tolist(), pa.string()))


def align_labels(encoded: Encoded, column: str) -> pa.ListArray:
    """Return the labels of a column as lists with an entry for each token of a document.

    A column of lists of values has one entry for each token already. A column of lists of ``{start, end, label}`` has
    spans: of characters where the documents are texts, of tokens where they are tokens or images. A token outside every
    span gets null; where spans overlap, the last one counts.

    Raises
    ------
    DocumentsError
        There is no such column, or it does not fit a document.
    """
    kind = column_type(encoded, column)
    if not is_spans(kind):
        return encoded.list_of(token_values(encoded, column))
    fields = [kind.value_type.field(i) for i in range(kind.value_type.num_fields)]
    label = next((field for field in fields if field.name == "label"), None)
    if label is None:
        raise DocumentsError(
            f"the spans of column {column!r} have no label",
            expected="lists of {start, end, label}",
            found=", ".join(field.name for field in fields),
        )
    found = np.full(len(encoded.flat), None, object)
    for tokens, span in span_tokens(encoded, column, characters=encoded.content in ("text", "messages")):
        found[tokens] = span["label"]
    return encoded.list_of(pa.array(found.tolist(), label.type))
