"""The batches of a stored plan: what a forward reads, and which of its tokens become which rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from flexcache.errors import DamagedError
from flexcache.images.encoded import IMAGE
from flexcache.plan import Largest, parts
from flexcache.store.format.schema import BEGINS, CONTEXT, SEQUENCES, read_attributes
from flexcache.store.read.parquet import open_table
from flexcache.store.storage.location import Place

if TYPE_CHECKING:
    from flexcache.recording.forward.image_inputs import Padding


@dataclass(frozen=True)
class Batch:
    """One planned forward.

    Attributes
    ----------
    unit, index : int
        The unit, and the number of the batch in it.
    rows : range
        The rows that the batch fills, in the order of `tokens` and within each of its kept positions.
    documents : ndarray of int64, shape (sequences,)
        Lines of the store's documents table.
    tokens : tuple of ndarray of int32
        Token ids of each sequence, without padding.
    keep : tuple of (start, stop)
        Which positions of each sequence are kept; for a mean, which positions are averaged into its one row.
    mean : bool
    picked : tuple of ndarray of int32, or None
        Where not all positions from the first to the last are kept: those that are, of each sequence.
    images : tuple of bytes, or None
        Where sequences are images: each, as it is encoded. Their token ids are -1.
    begins : tuple of ndarray of int32, or None
        Where a sequence holds documents that do not see each other: the places at which each of them begins, 0 first.
    context : tuple of ndarray of int32, or None
        Of a model with an encoder and a decoder: what its encoder reads of each sequence; `tokens` are the decoder's.
    """

    unit: int
    index: int
    rows: range
    documents: np.ndarray
    tokens: tuple[np.ndarray, ...]
    keep: tuple[tuple[int, int], ...]
    mean: bool = False
    picked: tuple[np.ndarray, ...] | None = None
    images: tuple[bytes, ...] | None = None
    begins: tuple[np.ndarray, ...] | None = None
    context: tuple[np.ndarray, ...] | None = None

    @property
    def extent(self) -> tuple[int, int]:
        """Sequences and the length of the longest, on either side: what a budget of tokens bounds the product of."""
        return len(self.tokens), max(self.extents)

    @property
    def extents(self) -> list[int]:
        """Tokens of each sequence, on its longer side."""
        own = [len(sequence) for sequence in self.tokens]
        return own if self.context is None else [max(n, len(line)) for n, line in zip(own, self.context, strict=True)]

    @property
    def shape(self) -> tuple[int, int]:
        """Sequences and the length of the longest."""
        return len(self.tokens), max(len(sequence) for sequence in self.tokens)

    @cached_property
    def n_tokens(self) -> int:
        """Tokens of all sequences, without padding."""
        return sum(len(sequence) for sequence in self.tokens)

    def input_ids(self, pad: int = 0) -> np.ndarray:
        """Return the token ids right-padded with *pad*: int64, shape (sequences, longest)."""
        return _padded(self.tokens, pad)[0]

    def attention_mask(self) -> np.ndarray:
        """Return 1 for tokens and 0 for padding: int64, shape (sequences, longest)."""
        return _padded(self.tokens, 0)[1]

    def position_ids(self) -> np.ndarray:
        """Return the place of each token in its document or sequence, 0 for padding: int64, (sequences, longest)."""
        found = np.zeros(self.shape, np.int64)
        for number, (line, tokens) in enumerate(zip(found, self.tokens, strict=True)):
            begins = np.zeros(1, np.int64) if self.begins is None else self.begins[number].astype(np.int64)
            counts = np.diff(np.append(begins, len(tokens)))
            line[: len(tokens)] = np.arange(len(tokens)) - np.repeat(begins, counts)
        return found

    def inputs(self, pad: Padding = 0, width: int | None = None) -> dict[str, np.ndarray]:
        """Return what a forward of the batch takes, by keyword: token ids and their mask, right-padded; or pixels.

        Where documents of a sequence do not see each other, it is token ids and positions that begin anew, and no mask:
        transformers makes the mask of packed sequences of them.

        With a context, ``input_ids`` and ``attention_mask`` are of that, and ``decoder_input_ids`` and
        ``decoder_attention_mask`` of the tokens.

        Parameters
        ----------
        pad
            The token id for padding; of images, the `ImageInput` that makes pixels of them.
        width
            Tokens to pad to; by default those of the longest sequence.
        """
        if self.images is not None:
            assert not isinstance(pad, int)
            return pad.inputs(self.images, [f"document {number} of the store" for number in self.documents.tolist()])
        assert isinstance(pad, int)
        if self.context is not None:
            sides = zip(("", "decoder_"), (self.context, self.tokens), strict=True)
            both = {side: _padded(sequences, pad) for side, sequences in sides}
            return {
                f"{side}{name}": array
                for side, found in both.items()
                for name, array in zip(("input_ids", "attention_mask"), found, strict=True)
            }
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
    def spans(self) -> list[tuple[int, int]]:
        """First row and number of rows of each run of kept rows in padded activations of (sequences × longest) rows."""
        width = self.shape[1]
        return [(line * width + start, stop - start) for line, (start, stop) in enumerate(self.keep)]

    @cached_property
    def places(self) -> list[Any]:
        """What to index the positions of each sequence with, to get those that are kept."""
        if self.picked is not None:
            return [places.astype(np.int64) for places in self.picked]
        return [slice(start, stop) for start, stop in self.keep]

    @property
    def counts(self) -> list[int]:
        """Rows of each sequence."""
        if self.mean:
            return [1] * len(self.keep)
        if self.picked is not None:
            return [len(places) for places in self.picked]
        return [stop - start for start, stop in self.keep]

    def kept(self, values: Any) -> np.ndarray:
        """Return the rows of padded activations, shape (sequences, longest, …), or of a list of one array a sequence.

        A mean is taken in float32 over the kept positions.

        Returns
        -------
        ndarray of shape (rows, …), in the order of `rows`
        """
        pieces = [np.asarray(values[line])[places] for line, places in enumerate(self.places)]
        if self.mean:
            return np.stack([piece.astype(np.float32).mean(axis=0) for piece in pieces])
        return np.concatenate(pieces)


def _padded(sequences: Sequence[np.ndarray], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Return sequences right-padded with *pad*, and 1 where they are and 0 where padding is: int64."""
    lengths = np.array([len(sequence) for sequence in sequences])
    padded = np.full((len(sequences), lengths.max()), pad, dtype=np.int64)
    for line, sequence in zip(padded, sequences, strict=True):
        line[: len(sequence)] = sequence
    return padded, (np.arange(padded.shape[1]) < lengths[:, None]).astype(np.int64)


def split(batch: Batch, batch_tokens: int) -> list[Batch]:
    """Return a batch as batches of consecutive sequences within a budget of tokens, padding included.

    Rows keep their order. A sequence that is longer than the budget is a batch of its own.
    """
    cuts = parts(batch.extents, batch_tokens)
    if len(cuts) == 1:
        return [batch]
    counts = batch.counts
    ends = [batch.rows.start + sum(counts[:line]) for line in range(len(counts) + 1)]
    return [
        replace(
            batch,
            rows=range(ends[start], ends[stop]),
            documents=batch.documents[start:stop],
            tokens=batch.tokens[start:stop],
            keep=batch.keep[start:stop],
            picked=None if batch.picked is None else batch.picked[start:stop],
            images=None if batch.images is None else batch.images[start:stop],
            begins=None if batch.begins is None else batch.begins[start:stop],
            context=None if batch.context is None else batch.context[start:stop],
        )
        for start, stop in cuts
    ]


class BatchReader:
    """Reads the planned batches of any unit from a store's sequence table; memory is a few units."""

    def __init__(self, root: Place, mean: bool) -> None:
        self._path = root / SEQUENCES
        self._mean = mean
        self._two_sided = bool(read_attributes(root)["spec"].get("decoder"))
        try:
            self._file = open_table(self._path)
            column = self._file.schema_arrow.get_field_index("unit")
            # pyarrow's column numbers count leaves: `unit` comes before the only nested column, so it is its own.
            groups = [
                self._file.metadata.row_group(i).column(column).statistics for i in range(self._file.num_row_groups)
            ]
            self._spans = [(int(group.min), int(group.max)) for group in groups]
        except (OSError, pa.ArrowException, AttributeError) as error:
            raise DamagedError(
                "the plan of the store cannot be read",
                where=str(self._path),
                found=f"{type(error).__name__}: {error}",
            ) from error
        self._cached: tuple[int, pa.Table] | None = None

    def unit(self, unit: int, batch_tokens: int | None = None) -> list[Batch]:
        """Return the batches of a unit, in order; under a smaller budget than the plan's, those that `split` makes."""
        planned = self._planned(unit)
        return planned if batch_tokens is None else [part for batch in planned for part in split(batch, batch_tokens)]

    def _planned(self, unit: int) -> list[Batch]:
        tables = [
            self._group(number).filter(pa.compute.field("unit") == unit)
            for number, (low, high) in enumerate(self._spans)
            if low <= unit <= high
        ]
        return self._batches(unit, pa.concat_tables(tables).combine_chunks())

    def largest(self, batch_tokens: int | None = None, known: Largest | None = None) -> Batch:
        """Return the batch of most tokens, padding included, of the whole plan under a budget; reads all of its tokens.

        Where that budget is the plan's own, and the plan has noted its largest batch, only the unit of it is read.
        """
        if batch_tokens is None and known is not None:
            found = [batch for batch in self.unit(known.unit) if batch.index == known.batch]
            if found and found[0].extent[0] * found[0].extent[1] == known.tokens:
                return found[0]
        best = (-1, 0, 0, 0)
        for number in range(len(self._spans)):
            there = [CONTEXT] if self._two_sided else []
            table = self._file.read_row_group(number, columns=["unit", "batch", "tokens", *there])
            sides = [pa.compute.list_value_length(table.column(name)).to_numpy() for name in ("tokens", *there)]
            lengths = np.max(sides, axis=0)
            units, batches = table.column("unit").to_numpy(), table.column("batch").to_numpy()
            cuts = np.flatnonzero((np.diff(units) != 0) | (np.diff(batches) != 0)) + 1
            for part in np.split(np.arange(len(table)), cuts):
                for place, (start, stop) in enumerate(parts(lengths[part].tolist(), batch_tokens)):
                    size = (stop - start) * int(lengths[part][start:stop].max())
                    if size > best[0]:
                        best = (size, int(units[part[0]]), int(batches[part[0]]), place)
        _, unit, index, place = best
        return [batch for batch in self.unit(unit, batch_tokens) if batch.index == index][place]

    def _group(self, number: int) -> pa.Table:
        if self._cached is None or self._cached[0] != number:
            self._cached = (number, self._file.read_row_group(number))
        return self._cached[1]

    def _batches(self, unit: int, table: pa.Table) -> list[Batch]:
        column = {
            name: table.column(name).to_numpy() for name in ("document", "batch", "keep_start", "n_rows", "row_start")
        }
        tokens, picked, begins = (_lists(table, name) for name in ("tokens", "keep", BEGINS))
        assert tokens is not None
        images = table.column(IMAGE) if IMAGE in table.column_names and _encoded(table) else None
        context = _lists(table, CONTEXT) if self._two_sided else None
        batches = []
        for lines in _runs(column["batch"]):
            first, last = lines[0], lines[-1]
            starts = column["keep_start"][lines]
            stops = [len(tokens[line]) for line in lines] if self._mean else starts + column["n_rows"][lines]
            if picked is not None:
                starts, stops = ([int(picked[line][end]) - end for line in lines] for end in (0, -1))
            batches.append(
                Batch(
                    unit=unit,
                    index=int(column["batch"][first]),
                    rows=range(
                        int(column["row_start"][first]),
                        int(column["row_start"][last] + column["n_rows"][last]),
                    ),
                    documents=column["document"][lines],
                    tokens=tuple(tokens[line] for line in lines),
                    keep=tuple((int(a), int(b)) for a, b in zip(starts, stops, strict=True)),
                    mean=self._mean,
                    picked=None if picked is None else tuple(picked[line] for line in lines),
                    images=None if images is None else tuple(images[int(line)].as_py() for line in lines),
                    begins=None if begins is None else tuple(begins[line] for line in lines),
                    context=None if context is None else tuple(context[line] for line in lines),
                )
            )
        return batches


def _encoded(table: pa.Table) -> bool:
    """Whether the column of images has them: a label of single tokens may have the same name."""
    return bool(pa.types.is_large_binary(table.schema.field(IMAGE).type))


def _lists(table: pa.Table, name: str) -> list[np.ndarray] | None:
    """Return a column of lists by line, None where there is none."""
    if name not in table.column_names:
        return None
    column = table.column(name).combine_chunks()
    values = column.values.to_numpy(zero_copy_only=False)
    return [values[start:stop] for start, stop in pairwise(column.offsets.to_numpy())]


def _runs(numbers: np.ndarray) -> Sequence[np.ndarray]:
    return np.split(np.arange(len(numbers)), np.flatnonzero(np.diff(numbers)) + 1)
