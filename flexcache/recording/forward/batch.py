"""The batches of a stored plan: the tokens of each forward, and the rows that its activations become."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from flexcache.errors import CaptureError
from flexcache.plan import parts
from flexcache.store.write.row_encoding import host, is_torch

if TYPE_CHECKING:
    from flexcache.images.input import ImageInput

Padding: TypeAlias = "int | ImageInput"
"""The id of the padding token; or, for images, the `ImageInput` that turns them into pixel values."""
STATES_REMEDY = (
    "turn off prefix caching, which leaves out the states of tokens in the cache; join the captures of a prompt"
    " that is computed in chunks; and leave out tokens that the engine adds or generates"
)


@dataclass(frozen=True, slots=True)
class PlannedSequence:
    """One sequence of a planned batch.

    Attributes
    ----------
    document : int
        Line of the store's documents table.
    tokens : ndarray of int32
        Token ids, without padding; -1 for the tokens of an image.
    kept_positions : slice or ndarray of int64
        The positions whose activations are kept; an array where there are gaps between them.
    image : bytes or None
        An encoded image, in place of a text.
    begins : ndarray of int32 or None
        Where each document starts in a sequence of documents that do not attend to each other; 0 first.
    context : ndarray of int32 or None
        Token ids for the encoder of an encoder-decoder model; `tokens` are then those for the decoder.
    """

    document: int
    tokens: np.ndarray
    kept_positions: slice | np.ndarray
    image: bytes | None = None
    begins: np.ndarray | None = None
    context: np.ndarray | None = None

    @property
    def keep(self) -> tuple[int, int]:
        """The first kept position and the one after the last."""
        kept = self.kept_positions
        return (kept.start, kept.stop) if isinstance(kept, slice) else (int(kept[0]), int(kept[-1]) + 1)

    @property
    def n_kept(self) -> int:
        """Number of kept positions."""
        kept = self.kept_positions
        return kept.stop - kept.start if isinstance(kept, slice) else len(kept)

    @property
    def extent(self) -> int:
        """Tokens for the encoder or the decoder, whichever reads more."""
        return max(len(self.tokens), 0 if self.context is None else len(self.context))


@dataclass(frozen=True)
class Batch:
    """One planned forward.

        for batch in recorder.batches():
            hidden = my_forward(batch.input_ids(), batch.attention_mask())  # (sequences, longest, features)
            recorder.put("resid_post", layer=3, rows=batch.rows, values=batch.kept(hidden))

    Attributes
    ----------
    unit, index : int
        The unit, and the number of the batch in it.
    rows : range
        The rows of the store that the batch fills: by sequence, then by kept position.
    sequences : tuple of PlannedSequence
    mean : bool
        True if the kept positions of a sequence are averaged into one row.
    """

    unit: int
    index: int
    rows: range
    sequences: tuple[PlannedSequence, ...]
    mean: bool = False

    @cached_property
    def documents(self) -> np.ndarray:
        """Lines of the store's documents table, int64, shape (sequences,)."""
        return np.array([sequence.document for sequence in self.sequences], np.int64)

    @cached_property
    def tokens(self) -> tuple[np.ndarray, ...]:
        """Token ids of each sequence, int32, without padding; -1 for images."""
        return tuple(sequence.tokens for sequence in self.sequences)

    @property
    def keep(self) -> tuple[tuple[int, int], ...]:
        """The first kept position of each sequence and the one after the last."""
        return tuple(sequence.keep for sequence in self.sequences)

    @cached_property
    def kept_positions(self) -> list[Any]:
        """The kept positions of each sequence, as an index: a slice, or int64 numbers where there are gaps."""
        return [sequence.kept_positions for sequence in self.sequences]

    @cached_property
    def images(self) -> tuple[bytes, ...] | None:
        """The encoded image of each sequence; None for texts."""
        return _all_or_none(sequence.image for sequence in self.sequences)

    @cached_property
    def begins(self) -> tuple[np.ndarray, ...] | None:
        """Positions at which documents start in each sequence, 0 first; None unless packed documents are isolated."""
        return _all_or_none(sequence.begins for sequence in self.sequences)

    @cached_property
    def context(self) -> tuple[np.ndarray, ...] | None:
        """Token ids for the encoder; None unless the model has an encoder and a decoder."""
        return _all_or_none(sequence.context for sequence in self.sequences)

    @cached_property
    def extent(self) -> tuple[int, int]:
        """Number of sequences and longest extent; their product is what a budget of tokens bounds."""
        return len(self.sequences), max(sequence.extent for sequence in self.sequences)

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Number of sequences and length of the longest."""
        return len(self.sequences), max(len(sequence.tokens) for sequence in self.sequences)

    @cached_property
    def n_tokens(self) -> int:
        """Tokens of all sequences, without padding."""
        return sum(len(sequence.tokens) for sequence in self.sequences)

    def input_ids(self, pad: int = 0) -> np.ndarray:
        """Return the token ids right-padded with *pad*: int64, shape (sequences, longest)."""
        return _right_padded(self.tokens, pad)[0]

    def attention_mask(self) -> np.ndarray:
        """Return 1 for tokens and 0 for padding: int64, shape (sequences, longest)."""
        return _right_padded(self.tokens, 0)[1]

    def position_ids(self) -> np.ndarray:
        """Return the position of each token in its document: int64, shape (sequences, longest), 0 for padding.

        Positions count through the sequence unless packed documents are isolated.
        """
        found = np.zeros(self.shape, np.int64)
        for line, sequence in zip(found, self.sequences, strict=True):
            length = len(sequence.tokens)
            begins = np.zeros(1, np.int64) if sequence.begins is None else sequence.begins.astype(np.int64)
            line[:length] = np.arange(length) - np.repeat(begins, np.diff(np.append(begins, length)))
        return found

    def inputs(self, pad: Padding = 0, width: int | None = None) -> dict[str, np.ndarray]:
        """Return the keyword arguments of a forward: right-padded token ids and their mask, or pixel values.

        Isolated documents have no mask but positions that restart, from which transformers makes the mask of packed
        sequences. For an encoder-decoder model, ``input_ids`` and ``attention_mask`` are those of the context, and
        ``decoder_input_ids`` and ``decoder_attention_mask`` those of the tokens.

        Parameters
        ----------
        pad
            The id of the padding token; for images, the `ImageInput` that makes their pixel values.
        width
            Tokens to pad to; by default those of the longest sequence.
        """
        if self.images is not None:
            assert not isinstance(pad, int)
            return pad.inputs(self.images, [f"document {number} of the store" for number in self.documents.tolist()])
        assert isinstance(pad, int)
        if self.context is not None:
            encoder, decoder = _right_padded(self.context, pad), _right_padded(self.tokens, pad)
            names = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")
            return dict(zip(names, (*encoder, *decoder), strict=True))
        arrays = {"input_ids": self.input_ids(pad)}
        if self.begins is None:
            arrays["attention_mask"] = self.attention_mask()
        else:
            arrays["position_ids"] = self.position_ids()
        more = 0 if width is None else width - self.shape[1]
        if not more:
            return arrays
        by = {"input_ids": pad, "attention_mask": 0, "position_ids": 0}
        return {name: np.pad(array, ((0, 0), (0, more)), constant_values=by[name]) for name, array in arrays.items()}

    @cached_property
    def spans(self) -> list[tuple[int, int]] | None:
        """First row and number of kept rows of each sequence in (sequences × longest) rows; None if there are gaps."""
        if not all(isinstance(kept, slice) for kept in self.kept_positions):
            return None
        width = self.shape[1]
        return [(line * width + kept.start, kept.stop - kept.start) for line, kept in enumerate(self.kept_positions)]

    @property
    def counts(self) -> list[int]:
        """Rows of each sequence."""
        return [1 if self.mean else sequence.n_kept for sequence in self.sequences]

    def kept(self, values: Any) -> np.ndarray:
        """Return the rows of padded activations, shape (sequences, longest, …), or of a list of one array a sequence.

        The arrays may be torch tensors of any device and dtype.
        A mean is taken in float32 over the kept positions. An array of a list has one state for each token; a padded
        array may be longer than the longest sequence.

        Returns
        -------
        ndarray of shape (rows, …), in the order of `rows`

        Raises
        ------
        CaptureError
            There are fewer states than tokens, as from an engine that reuses the cache of a prefix; or more of them, or
            another number of arrays than of sequences, as from a hook that is called once for each chunk of a prompt.
        """
        self._check_states(values)
        arrays = [host(values[line]) if is_torch(values[line]) else values[line] for line in range(len(values))]
        pieces = [np.asarray(array)[kept] for array, kept in zip(arrays, self.kept_positions, strict=True)]
        if self.mean:
            return np.stack([piece.astype(np.float32).mean(axis=0) for piece in pieces])
        return np.concatenate(pieces)

    def _check_states(self, values: Any) -> None:
        """Raise CaptureError unless *values* has an array for each sequence, and a state for each token of it."""
        where = f"unit {self.unit}, batch {self.index}"
        if len(values) != len(self.sequences):
            raise CaptureError(
                "the activations are not one array for each sequence",
                where=where,
                expected=f"{len(self.sequences)} sequences",
                found=str(len(values)),
                remedy=STATES_REMEDY,
            )
        padded = getattr(values, "ndim", 1) > 1
        for line, sequence in enumerate(self.sequences):
            found, tokens = values.shape[1] if padded else len(values[line]), len(sequence.tokens)
            if found < tokens or (found > tokens and not padded):
                raise CaptureError(
                    "the activations are not one state for each token",
                    where=f"{where}, sequence {line}, of document number {sequence.document}",
                    expected=f"{tokens} states",
                    found=str(found),
                    remedy=STATES_REMEDY,
                )


def unplanned_batch(
    tokens: Sequence[np.ndarray],
    *,
    documents: Sequence[int] | None = None,
    begins: Sequence[np.ndarray] | None = None,
    context: Sequence[np.ndarray] | None = None,
) -> Batch:
    """Return a batch that is in no plan and keeps all positions, for trial forwards.

    Parameters are by sequence; documents are numbered from 0 by default.
    """
    sequences = tuple(
        PlannedSequence(
            document=line if documents is None else documents[line],
            tokens=own,
            kept_positions=slice(0, len(own)),
            begins=None if begins is None else begins[line],
            context=None if context is None else context[line],
        )
        for line, own in enumerate(tokens)
    )
    return Batch(0, 0, range(sum(map(len, tokens))), sequences)


def split(batch: Batch, batch_tokens: int) -> list[Batch]:
    """Split a batch into batches of consecutive sequences within a budget of tokens, padding included.

    Rows keep their order. A sequence longer than the budget is a batch of its own.
    """
    cuts = parts([sequence.extent for sequence in batch.sequences], batch_tokens)
    if len(cuts) == 1:
        return [batch]
    ends = list(accumulate(batch.counts, initial=batch.rows.start))
    return [
        replace(batch, rows=range(ends[start], ends[stop]), sequences=batch.sequences[start:stop])
        for start, stop in cuts
    ]


def _all_or_none(values: Iterable[Any]) -> tuple[Any, ...] | None:
    found = tuple(values)
    return None if found[0] is None else found


def _right_padded(sequences: Sequence[np.ndarray], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Return sequences right-padded with *pad*, and a mask of 1 for tokens and 0 for padding: int64."""
    lengths = np.array([len(sequence) for sequence in sequences])
    padded = np.full((len(sequences), lengths.max()), pad, dtype=np.int64)
    for line, sequence in zip(padded, sequences, strict=True):
        line[: len(sequence)] = sequence
    return padded, (np.arange(padded.shape[1]) < lengths[:, None]).astype(np.int64)
