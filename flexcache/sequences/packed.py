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
    separator = None if packing.isolate else packing.separator
    return Marks(_id(separator, tokenizer, "separator"), _id(bos, tokenizer, "bos"))


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


class Filled:
    """Sequences filled with pieces of documents, in corpus order.

    Parameters
    ----------
    document, start, length, offset : ndarray, shape (pieces,)
        See `Pieces`.
    first : ndarray, shape (sequences + 1,)
        The first piece of each sequence, and the number of pieces.
    lengths : ndarray of int32, shape (sequences,)
        Tokens of each, with those that are of no document.
    """

    def __init__(
        self,
        document: np.ndarray,
        start: np.ndarray,
        length: np.ndarray,
        offset: np.ndarray,
        first: np.ndarray,
        lengths: np.ndarray,
    ) -> None:
        self._document, self._first = document, first
        self._start, self._length, self._offset = (values.astype(np.int32) for values in (start, length, offset))
        self.lengths = lengths.astype(np.int32)
        self.kept = np.add.reduceat(self._length, first[:-1]).astype(np.int32)
        self.linked = self._start[first[:-1]] > 0

    def pieces(self, sequences: np.ndarray) -> Pieces:
        """Return the pieces of sequences, by their numbers."""
        counts = self._first[sequences + 1] - self._first[sequences]
        at = ranges(self._first[sequences], counts)
        start, length, offset = (values[at].astype(np.int64) for values in (self._start, self._length, self._offset))
        line = np.repeat(np.arange(len(sequences)), counts)
        return Pieces(line, self._document[at], start, length, offset, start, length)


class Isolated(Filled):
    """Sequences of at most *length* tokens, of whole documents that do not see each other.

    A document that does not fit into the rest of a sequence begins the next one. One that is longer than a sequence is
    cut into pieces that are a sequence each, except that others may follow the last. The opening token is in front of
    each.
    """

    def __init__(self, lengths: np.ndarray, length: int, marks: Marks) -> None:
        opening = int(marks.bos is not None)
        room, count = length - opening, lengths.astype(np.int64)
        parts = -(-count // room)
        document = np.repeat(np.arange(len(count)), parts)
        start = ranges(np.zeros(len(count), np.int64), parts) * room
        size = np.minimum(count[document] - start, room)
        ends = np.cumsum(size + opening)
        first = [0]
        while first[-1] < len(ends):
            before = int(ends[first[-1] - 1]) if first[-1] else 0
            first.append(int(np.searchsorted(ends, before + length, side="right")))
        cuts = np.array(first)
        bounds = np.append(0, ends)[cuts]
        offset = ends - size - np.repeat(bounds[:-1], np.diff(cuts))
        super().__init__(document, start, size, offset, cuts, np.diff(bounds))


class Packed(Filled):
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
        document = np.repeat(np.arange(len(count)), last - first + 1)
        number = ranges(first, last - first + 1)
        low = np.maximum(start[document], number * room)
        high = np.minimum((start + count)[document], (number + 1) * room)
        cuts = np.searchsorted(number, np.arange(-(-total // room) + 1))
        ends = np.minimum(np.arange(1, len(cuts)) * room, total)
        super().__init__(
            document,
            low - start[document],
            high - low,
            low - number * room + (length - room),
            cuts,
            ends - np.arange(len(cuts) - 1) * room + (length - room),
        )
