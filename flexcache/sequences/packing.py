"""Sequences of one length, filled with documents one after the other. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from flexcache.errors import ConfigError
from flexcache.options import Packing, SpecialTokens
from flexcache.plan import ranges
from flexcache.sequences.segmentation import Segments


@dataclass(frozen=True)
class PackingTokens:
    """Ids of the token between two documents and of the token that opens a sequence; None for no such token."""

    separator: int | None = None
    bos: int | None = None


def packing_tokens(packing: Packing, tokenizer: Any, special_tokens: SpecialTokens = "auto") -> PackingTokens:
    """Return the ids of the tokens that *packing* names; ``bos: auto`` is none if *special_tokens* is ``never``.

    Raises
    ------
    ConfigError
        The tokenizer has no such token, or there is no tokenizer.
    """
    bos = packing.bos
    if bos == "auto":
        asked = special_tokens != "never" and hasattr(tokenizer, "convert_tokens_to_ids")
        added = tokenizer("")["input_ids"] if asked else []
        bos = tokenizer.bos_token_id if added and added[0] == tokenizer.bos_token_id else None
    separator = None if packing.isolate else packing.separator
    return PackingTokens(_token_id(separator, tokenizer, "separator"), _token_id(bos, tokenizer, "bos"))


def _token_id(token: int | str | None, tokenizer: Any, key: str) -> int | None:
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


class FilledSequences:
    """Base of the two packings: sequences filled with segments of documents, in corpus order.

    Parameters
    ----------
    document, start, length, offset : ndarray, shape (segments,)
        See `Segments`.
    first : ndarray, shape (sequences + 1,)
        Index of each sequence's first segment, then the number of segments.
    lengths : ndarray of int32, shape (sequences,)
        Tokens of each sequence, including those that belong to no document.
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

    def segments(self, sequences: np.ndarray) -> Segments:
        """Return the segments of sequences, given by index."""
        counts = self._first[sequences + 1] - self._first[sequences]
        at = ranges(self._first[sequences], counts)
        start, length, offset = (values[at].astype(np.int64) for values in (self._start, self._length, self._offset))
        sequence = np.repeat(np.arange(len(sequences)), counts)
        return Segments(sequence, self._document[at], start, length, offset, start, length)


class IsolatedPacking(FilledSequences):
    """Sequences of at most *length* tokens, made of whole documents that do not attend to each other.

    A document that does not fit into the rest of a sequence opens the next one. A document longer than a sequence is
    split into segments of one sequence each; other documents may follow its last segment. Each segment begins with the
    opening token; the first one of a document that is *opened*, bool of shape (documents,), has it already.

    >>> IsolatedPacking(np.array([3, 3, 2]), 8, PackingTokens(bos=1)).lengths.tolist()
    [8, 3]
    >>> IsolatedPacking(np.array([3, 3]), 8, PackingTokens(bos=1), np.array([True, False])).lengths.tolist()
    [7]
    """

    def __init__(
        self, lengths: np.ndarray, length: int, tokens: PackingTokens, opened: np.ndarray | None = None
    ) -> None:
        room, count = length - int(tokens.bos is not None), lengths.astype(np.int64)
        parts = -(-count // room)
        document = np.repeat(np.arange(len(count)), parts)
        start = ranges(np.zeros(len(count), np.int64), parts) * room
        size = np.minimum(count[document] - start, room)
        opening = np.full(len(size), int(tokens.bos is not None))
        if opened is not None:
            opening[opened[document] & (start == 0)] = 0
        ends = np.cumsum(size + opening)
        first = [0]
        while first[-1] < len(ends):
            before = int(ends[first[-1] - 1]) if first[-1] else 0
            first.append(int(np.searchsorted(ends, before + length, side="right")))
        edges = np.array(first)
        bounds = np.append(0, ends)[edges]
        offset = ends - size - np.repeat(bounds[:-1], np.diff(edges))
        super().__init__(document, start, size, offset, edges, np.diff(bounds))


class ContinuousPacking(FilledSequences):
    """Sequences of *length* tokens, filled with documents that continue in the next sequence where one is full.

    The separator stands between two documents, also at the front of a sequence; the opening token stands at the front
    of each sequence, unless that begins with a document that is *opened*, bool of shape (documents,): that document has
    the token already, and the sequence is one token shorter. Both are context and never rows. The last sequence has the
    tokens that are left.

    >>> ContinuousPacking(np.array([3, 3]), 4, PackingTokens(separator=2)).lengths.tolist()
    [4, 3]
    >>> ContinuousPacking(np.array([3, 3]), 4, PackingTokens(bos=1), np.array([True, True])).lengths.tolist()
    [3, 3]
    """

    def __init__(
        self, lengths: np.ndarray, length: int, tokens: PackingTokens, opened: np.ndarray | None = None
    ) -> None:
        room = length - int(tokens.bos is not None)
        count = lengths.astype(np.int64)
        stop = np.cumsum(count + int(tokens.separator is not None))  # in the run of all tokens but the opening ones
        start = stop - count - int(tokens.separator is not None)
        total = int(start[-1] + count[-1]) if len(count) else 0
        first, last = start // room, (start + count - 1) // room
        document = np.repeat(np.arange(len(count)), last - first + 1)
        number = ranges(first, last - first + 1)
        low = np.maximum(start[document], number * room)
        high = np.minimum((start + count)[document], (number + 1) * room)
        edges = np.searchsorted(number, np.arange(-(-total // room) + 1))
        ends = np.minimum(np.arange(1, len(edges)) * room, total)
        opening = np.full(len(edges) - 1, length - room)
        if opened is not None:
            of_sequence = edges[:-1]
            begins = (low - start[document] == 0) & (low == number * room) & opened[document]
            opening[begins[of_sequence]] = 0
        super().__init__(
            document,
            low - start[document],
            high - low,
            low - number * room + opening[number],
            edges,
            ends - np.arange(len(edges) - 1) * room + opening,
        )
