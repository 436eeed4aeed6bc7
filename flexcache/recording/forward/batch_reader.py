"""Read the planned batches of a store from its table of sequences."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow as pa

from flexcache.errors import DamagedError
from flexcache.images.encoded import IMAGE
from flexcache.plan import Largest, parts
from flexcache.recording.forward.batch import Batch, PlannedSequence, split
from flexcache.store.format.ledger import UnitRecord, digests_of
from flexcache.store.format.schema import BEGINS, CONTEXT, SEQUENCES, read_attributes
from flexcache.store.read.open_store import OpenStore
from flexcache.store.read.parquet import open_table
from flexcache.store.storage.location import StoreLocation


class BatchReader:
    """Reads the planned batches of any unit; memory is that of a few units.

    DamagedError if the table of sequences is missing or damaged.
    """

    def __init__(self, root: StoreLocation) -> None:
        self._path = root / SEQUENCES
        spec = read_attributes(root)["spec"]
        self._mean = spec.get("rows") == "mean"
        self._is_encoder_decoder = bool(spec.get("decoder"))
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

    def read_unit(self, unit: int, batch_tokens: int | None = None) -> list[Batch]:
        """Return the batches of a unit in order, split further if *batch_tokens* is below the plan's budget."""
        tables = [
            self._read_group(number).filter(pa.compute.field("unit") == unit)
            for number, (low, high) in enumerate(self._spans)
            if low <= unit <= high
        ]
        planned = self._batches_of(unit, pa.concat_tables(tables).combine_chunks())
        return planned if batch_tokens is None else [part for batch in planned for part in split(batch, batch_tokens)]

    def read_largest(self, batch_tokens: int | None = None, known: Largest | None = None) -> Batch:
        """Return the batch of most tokens, padding included, of the whole plan; reads the lengths of all sequences.

        Only one unit is read if the plan's own budget applies and the plan says which batch is the largest (*known*).
        """
        if batch_tokens is None and known is not None:
            found = [batch for batch in self.read_unit(known.unit) if batch.index == known.batch]
            if found and found[0].extent[0] * found[0].extent[1] == known.tokens:
                return found[0]
        best = (-1, 0, 0, 0)
        sides = ["tokens", CONTEXT] if self._is_encoder_decoder else ["tokens"]
        for number in range(len(self._spans)):
            table = self._file.read_row_group(number, columns=["unit", "batch", *sides])
            lengths = np.max([pa.compute.list_value_length(table.column(name)).to_numpy() for name in sides], axis=0)
            units, batches = table.column("unit").to_numpy(), table.column("batch").to_numpy()
            for lines in _runs(units, batches):
                for part, (start, stop) in enumerate(parts(lengths[lines].tolist(), batch_tokens)):
                    size = (stop - start) * int(lengths[lines][start:stop].max())
                    if size > best[0]:
                        best = (size, int(units[lines[0]]), int(batches[lines[0]]), part)
        _, unit, index, part = best
        return [batch for batch in self.read_unit(unit, batch_tokens) if batch.index == index][part]

    def _read_group(self, number: int) -> pa.Table:
        if self._cached is None or self._cached[0] != number:
            self._cached = (number, self._file.read_row_group(number))
        return self._cached[1]

    def _batches_of(self, unit: int, table: pa.Table) -> list[Batch]:
        """Return the batches of a unit from its lines in the table."""
        column = {
            name: table.column(name).to_numpy() for name in ("document", "batch", "keep_start", "n_rows", "row_start")
        }
        tokens, picked, begins = (_lists(table, name) for name in ("tokens", "keep", BEGINS))
        assert tokens is not None
        images = table.column(IMAGE) if _has_images(table) else None
        context = _lists(table, CONTEXT) if self._is_encoder_decoder else None

        def kept_positions(line: int, length: int) -> slice | np.ndarray:
            if picked is not None:
                return picked[line].astype(np.int64)
            start = int(column["keep_start"][line])
            return slice(start, length if self._mean else start + int(column["n_rows"][line]))

        sequences = [
            PlannedSequence(
                document=int(column["document"][line]),
                tokens=own,
                kept_positions=kept_positions(line, len(own)),
                image=None if images is None else images[line].as_py(),
                begins=None if begins is None else begins[line],
                context=None if context is None else context[line],
            )
            for line, own in enumerate(tokens)
        ]
        return [
            Batch(
                unit=unit,
                index=int(column["batch"][lines[0]]),
                rows=range(
                    int(column["row_start"][lines[0]]),
                    int(column["row_start"][lines[-1]] + column["n_rows"][lines[-1]]),
                ),
                sequences=tuple(sequences[lines[0] : lines[-1] + 1]),
                mean=self._mean,
            )
            for lines in _runs(column["batch"])
        ]


class VirtualDigests:
    """The digests that a store has of the rows of virtual layers, by batch."""

    def __init__(self, store: OpenStore) -> None:
        self._store, self._reader = store, BatchReader(store.path)
        self._units: dict[int, tuple[UnitRecord, dict[range, int]]] = {}

    def read(self, batch: Batch, site: str, layer: int | None) -> str:
        """Return the XXH3-128 in hex of the rows of a batch, one of those within the budget of its unit."""
        if batch.unit not in self._units:
            record = self._store.ledger.read_record(batch.unit)
            batches = self._reader.read_unit(batch.unit, record.batch_tokens)
            self._units[batch.unit] = record, {one.rows: number for number, one in enumerate(batches)}
        record, numbers = self._units[batch.unit]
        return digests_of(record, (site, layer))[numbers[batch.rows]]


def _has_images(table: pa.Table) -> bool:
    """Return True if there is a column of encoded images; a label of tokens may have the same name."""
    return IMAGE in table.column_names and bool(pa.types.is_large_binary(table.schema.field(IMAGE).type))


def _lists(table: pa.Table, name: str) -> list[np.ndarray] | None:
    """Return the lists of a column, one array a line; None if there is no such column."""
    if name not in table.column_names:
        return None
    column = table.column(name).combine_chunks()
    values = column.values.to_numpy(zero_copy_only=False)
    return [values[start:stop] for start, stop in pairwise(column.offsets.to_numpy())]


def _runs(*columns: np.ndarray) -> list[np.ndarray]:
    """Return the numbers of consecutive lines with equal values in all columns."""
    changes = np.any([np.diff(column) != 0 for column in columns], axis=0)
    return np.split(np.arange(len(columns[0])), np.flatnonzero(changes) + 1)
