"""Write the tables of a store and the coordinates of its rows, one unit at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr

from flexcache.documents.arrow_types import stored_array, stored_type
from flexcache.errors import DocumentsError
from flexcache.plan import Plan
from flexcache.sequences import TokenizedCorpus
from flexcache.store.format.schema import DOCUMENTS, SEQUENCES
from flexcache.store.read.parquet import open_table
from flexcache.store.storage.location import StoreLocation
from flexcache.store.write.unit_tables import UnitTables

GROUP_TOKENS = 1 << 20


def write_tables(
    store: Path,
    plan: Plan,
    corpus: TokenizedCorpus,
    coordinates: dict[str, zarr.Array],
    before: StoreLocation | None = None,
    n_before: int = 0,
) -> None:
    """Write ``documents.parquet``, ``sequences.parquet`` and the coordinates; memory is about that of a unit.

    Where the plan extends a store, that is *before*: its *n_before* documents come first, and the coordinates of its
    rows exist already. DocumentsError if the type of a label does not match its type in that store.
    """
    documents = _TableWriter(store / DOCUMENTS, None if before is None else before / DOCUMENTS)
    sequences = _TableWriter(store / SEQUENCES, None if before is None else before / SEQUENCES)
    rows = {name: _RowWriter(array, plan.first_row) for name, array in coordinates.items()}
    numbers = np.full(len(corpus.lengths), -1, np.int64)
    n_documents = n_before
    for unit in plan.units():
        tables = UnitTables(unit, corpus, numbers, n_documents, plan.n_rows)
        sequences.write(tables.sequences(), int(plan.lengths[unit.sequences].sum(dtype=np.int64)))
        documents.write(tables.documents(), len(tables.new))
        for name, values in tables.coordinates().items():
            rows[name].write(values)
        n_documents += len(tables.new)
    documents.close()
    sequences.close()
    for writer in rows.values():
        writer.close()


class _TableWriter:
    """A Parquet file whose row groups hold whole units, about a million tokens each, after those of *before*."""

    def __init__(self, path: Path, before: StoreLocation | None = None) -> None:
        self._path, self._before = path, before
        self._writer: pq.ParquetWriter | None = None
        self._pending: list[pa.Table] = []
        self._weight = 0

    def write(self, table: pa.Table, weight: int) -> None:
        if self._writer is None:
            self._writer = self._open(table.schema)
        self._pending.append(table)
        self._weight += weight
        if self._weight >= GROUP_TOKENS:
            self._flush()

    def _open(self, schema: pa.Schema) -> pq.ParquetWriter:
        if self._before is None:
            return pq.ParquetWriter(self._path, schema, compression="zstd")
        with open_table(self._before) as file:
            held = pa.schema([field.with_type(stored_type(field.type)) for field in file.schema_arrow])
            writer = pq.ParquetWriter(self._path, _unified(held, schema), compression="zstd")
            for number in range(file.num_row_groups):
                table = _with_schema(_in_stored_types(file.read_row_group(number)), writer.schema)
                writer.write_table(table, row_group_size=max(1, len(table)))
        return writer

    def _flush(self) -> None:
        if self._pending and self._writer is not None:
            table = _with_schema(pa.concat_tables(self._pending), self._writer.schema)
            try:
                self._writer.write_table(table, row_group_size=max(1, len(table)))
            except pa.ArrowException as error:
                raise DocumentsError(
                    "a label has a value that Parquet cannot hold",
                    where=", ".join(table.column_names),
                    found=str(error).splitlines()[0],
                    remedy="write it in another type, or leave it out by flexcache.open_documents(…, labels=[…])",
                ) from error
            self._pending.clear()
            self._weight = 0

    def close(self) -> None:
        self._flush()
        if self._writer is not None:
            self._writer.close()


def _unified(before: pa.Schema, added: pa.Schema) -> pa.Schema:
    """Return the columns of both schemas, in types that hold the values of both."""
    try:
        return pa.unify_schemas([before.remove_metadata(), added.remove_metadata()], promote_options="permissive")
    except pa.ArrowException as error:
        apart = [name for name in added.names if name in before.names and added.field(name) != before.field(name)]
        raise DocumentsError(
            "a label of the new documents has another type than in the store",
            where=", ".join(apart),
            expected=", ".join(str(before.field(name).type) for name in apart),
            found=", ".join(str(added.field(name).type) for name in apart),
            remedy="write it in the type that the store has, or under another name",
        ) from error


def _in_stored_types(table: pa.Table) -> pa.Table:
    """Return a table with its columns in the types that a store keeps; older versions kept other types."""
    chunks = [[stored_array(chunk) for chunk in column.chunks] for column in table.columns]
    types = [stored_type(field.type) for field in table.schema]
    columns = [pa.chunked_array(parts, kind) for parts, kind in zip(chunks, types, strict=True)]
    return pa.table(columns, names=table.column_names)


def _with_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return a table with the columns of a schema; missing columns are null."""
    if table.schema == schema:
        return table
    columns = [
        table.column(field.name) if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.table(columns, names=schema.names).cast(schema)


class _RowWriter:
    """A one-dimensional Zarr array that is written in order, in whole chunks."""

    def __init__(self, array: zarr.Array, first_row: int = 0) -> None:
        self._array = array
        self._pending: list[np.ndarray] = []
        self._held = 0
        self._done = first_row

    def write(self, values: np.ndarray) -> None:
        self._pending.append(values)
        self._held += len(values)
        if self._held >= self._array.chunks[0]:
            self._flush(self._held - (self._done + self._held) % self._array.chunks[0])

    def _flush(self, count: int) -> None:
        values = np.concatenate(self._pending) if self._pending else np.zeros(0, self._array.dtype)
        if count:
            self._array[self._done : self._done + count] = values[:count]
        self._done += count
        self._pending = [values[count:]]
        self._held = len(values) - count

    def close(self) -> None:
        self._flush(self._held)
