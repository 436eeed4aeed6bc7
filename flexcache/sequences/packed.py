"""Documents one after the other in sequences of one length. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from flexcache.errors import ConfigError
from flexcache.options import Packing
from flexcache.plan import ranges
from flexcache.sequences.cuts import Pieces


@dataclass(frozen=True)
class Marks:
    """The tokens between documents and in front of each sequence, None for none."""

    separator: int | None = None
    bos: int | None = None


def marks(packing: Packing, tokenizer: Any) -> Marks:
    """Return the tokens that `Packing` names, as ids.

    Raises
    ------
    ConfigError
        The tokenizer has no such token, or there is no tokenizer to ask.
    """
    bos = packing.bos
    if bos == "auto":
        added = tokenizer("")["input_ids"] if hasattr(tokenizer, "convert_tokens_to_ids") else []
        bos = tokenizer.bos_token_id if added and added[0] == tokenizer.bos_token_id else None
    return Marks(_id(packing.separator, tokenizer, "separator"), _id(bos, tokenizer, "bos"))


def _id(token: int | str | None, tokenizer: Any, key: str) -> int | None:
    if token is None or isinstance(token, int):
        return token
    found = getattr(tokenizer, f"{token}_token_id", None)
    if found is None:
        raise ConfigError(
            f"packing.{key} is the {token} token, which is not known",
            expected=f"a tokenizer with a {token} token",
            found="no tokenizer" if tokenizer is None else type(tokenizer).__name__,
            remedy=f"give the id of the token, or null for none: packing: {{{key}: 0}}",
        )
    return int(found)


class Packed:
    """Sequences of *length* tokens filled with documents, which go on in the next where one is full.

    A separator is between two documents, also at the front of a sequence where it falls there; the opening token is in
    front of each sequence. Both are context, and no rows. The last sequence is as long as there are tokens.
    """

    def __init__(self, lengths: np.ndarray, length: int, marks: Marks) -> None:
        room = length - int(marks.bos is not None)
        count = lengths.astype(np.int64)
        stop = np.cumsum(count + int(marks.separator is not None))  # in the run of all tokens but the opening ones
        start = stop - count - int(marks.separator is not None)
        total = int(start[-1] + count[-1]) if len(count) else 0
        first, last = start // room, (start + count - 1) // room
        self._document = np.repeat(np.arange(len(count)), last - first + 1)
        number = ranges(first, last - first + 1)
        low = np.maximum(start[self._document], number * room)
        high = np.minimum((start + count)[self._document], (number + 1) * room)
        self._start = (low - start[self._document]).astype(np.int32)
        self._length = (high - low).astype(np.int32)
        self._offset = (low - number * room + (length - room)).astype(np.int32)
        self._first = np.searchsorted(number, np.arange(-(-total // room) + 1))
        ends = np.minimum(np.arange(1, len(self._first)) * room, total)
        self.lengths = (ends - np.arange(len(self._first) - 1) * room + (length - room)).astype(np.int32)
        self.kept = np.add.reduceat(self._length, self._first[:-1]).astype(np.int32)
        self.linked = self._start[self._first[:-1]] > 0

    def pieces(self, sequences: np.ndarray) -> Pieces:
        """Return the pieces of sequences, by their numbers."""
        counts = self._first[sequences + 1] - self._first[sequences]
        at = ranges(self._first[sequences], counts)
        start, length, offset = (values[at].astype(np.int64) for values in (self._start, self._length, self._offset))
        line = np.repeat(np.arange(len(sequences)), counts)
        return Pieces(line, self._document[at], start, length, offset, start, length)
