"""A batch of documents as tokens: one frame that carries everything known of each token."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from flexcache.documents.columns import content_of
from flexcache.sequences.chats import Chat


@dataclass(frozen=True)
class Encoded:
    """A batch of documents with their tokens, and columns with one entry for each token.

    Columns of tokens hold the tokens of all documents, document after document.

    Attributes
    ----------
    documents : RecordBatch
        Id, content and labels.
    tokens : list<int32> array, shape (documents,), without nulls
    truncated : ndarray of bool, shape (documents,)
    characters : ndarray of int64, shape (tokens, 2), or None
        First character of each token in its text and the one after its last; 0 and 0 for a token that the tokenizer
        added. None if no option needs it, or the documents are tokens or images.
    chats : list of Chat, or None
        The rendered chats, if the documents are messages.
    turn : ndarray of int64, shape (tokens,), or None
        Index of the message in its chat that each token belongs to, -1 for none.
    part : ndarray of int8, shape (tokens,), or None
        The part of a chat that each token belongs to, as a number in `flexcache.sequences.chats.PARTS`.
    kept : ndarray of bool, shape (tokens,), or None
        True for each token that becomes a row, or is averaged into one; None if all do.
    doubled : ndarray of bool, shape (documents,), or None
        True for each text with special tokens of its own, which the tokenizer would have added again.
    labels : dict of str to list array, shape (documents,)
        Labels of tokens by name, with one entry for each token of a document.

    >>> documents = pa.RecordBatch.from_pydict({"id": ["a", "b"], "tokens": [[5, 6], [7]]})
    >>> encoded = Encoded(documents, documents.column("tokens"), np.zeros(2, bool))
    >>> encoded.lengths.tolist(), encoded.document.tolist(), encoded.document_id(1)
    ([2, 1], [0, 0, 1], 'b')
    """

    documents: pa.RecordBatch
    tokens: pa.ListArray
    truncated: np.ndarray
    characters: np.ndarray | None = None
    chats: list[Chat] | None = None
    turn: np.ndarray | None = None
    part: np.ndarray | None = None
    kept: np.ndarray | None = None
    doubled: np.ndarray | None = None
    labels: dict[str, pa.ListArray] = field(default_factory=dict)

    @property
    def content(self) -> str:
        """The input that the tokens were made of: ``text``, ``tokens``, ``messages`` or ``image``."""
        return content_of(self.documents)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document: int64, shape (documents,)."""
        return np.diff(self.tokens.offsets.to_numpy()).astype(np.int64)

    @cached_property
    def starts(self) -> np.ndarray:
        """Index of each document's first token in the columns of tokens: int64, shape (documents,)."""
        return np.cumsum(self.lengths) - self.lengths

    @cached_property
    def flat(self) -> np.ndarray:
        """Token ids: int32, shape (tokens,)."""
        return np.asarray(self.tokens.flatten().to_numpy(zero_copy_only=False))

    @cached_property
    def document(self) -> np.ndarray:
        """Index of the document of each token: int64, shape (tokens,)."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    def document_id(self, document: Any) -> str:
        """Return the id of a document, given by its index in the batch."""
        return str(self.documents.column("id")[int(document)].as_py())

    def list_of(self, values: pa.Array) -> pa.ListArray:
        """Return a column of tokens as one list for each document."""
        return list_array(values, self.lengths)


def list_array(flat: np.ndarray | pa.Array, lengths: np.ndarray) -> pa.ListArray:
    """Return values, document after document, as lists of these *lengths*; an ndarray holds token ids, int32."""
    values = pa.array(flat, pa.int32()) if isinstance(flat, np.ndarray) else flat
    return pa.ListArray.from_arrays(pa.array(np.append(0, np.cumsum(lengths)).astype(np.int32)), values)
