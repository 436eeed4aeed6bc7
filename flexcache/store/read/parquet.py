"""Read the Parquet tables of a store, and check that their lines fit its rows."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flexcache.errors import StoreError
from flexcache.store.format.schema import DOCUMENTS, GROWING, committing_folder, read_attributes
from flexcache.store.read.coordinates import unreadable
from flexcache.store.storage.backend import disk_path, storage_of
from flexcache.store.storage.location import StoreLocation
from flexcache.store.storage.path_safety import check_inside


def open_table(path: StoreLocation) -> pq.ParquetFile:
    """Open a Parquet file; on object storage, reading a row group takes a few requests."""
    check_inside(path.parent, path)
    return pq.ParquetFile(disk_path(path) or storage_of(path.parent).open_file(path.name))


def read_table(path: StoreLocation, columns: list[str] | None = None) -> pa.Table:
    """Read a Parquet file, or some of its columns."""
    check_inside(path.parent, path)
    return pq.read_table(disk_path(path) or storage_of(path.parent).open_file(path.name), columns=columns)


def read_first_lines(path: StoreLocation, count: int) -> pa.Table:
    """Return the first *count* lines of a Parquet file without reading the others; DamagedError if it is damaged."""
    try:
        with open_table(path) as file:
            batches = [next(file.iter_batches(batch_size=count))] if file.metadata.num_rows and count else []
            return pa.Table.from_batches(batches, file.schema_arrow)
    except (OSError, pa.ArrowException) as error:
        raise unreadable("table", path, error) from error


def read_store_table(root: StoreLocation, name: str, n_rows: int, columns: list[str] | None = None) -> pa.Table:
    """Return the lines of a table of a store that belong to its first *n_rows* rows.

    DamagedError if the table cannot be read, or its lines do not fit the rows.
    """
    check_inside(root, root / name)
    try:
        _check_length(root, name, n_rows)
        return _check_lines(name, read_table(root / name, columns=columns), n_rows)
    except (OSError, pa.ArrowException, ValueError, MemoryError) as error:
        raise unreadable("table", root / name, error) from error


def _check_lines(name: str, table: pa.Table, n_rows: int) -> pa.Table:
    """Return the lines of a table that belong to the first *n_rows* rows; an extension may have added lines.

    The table may come from an untrusted source: ValueError if a column is missing, of another type or out of range.
    """
    documents = name == DOCUMENTS
    columns = ("row_start", "n_rows", *(("n_tokens",) if documents else ()))
    missing = {*columns, *(("id",) if documents else ())} - set(table.column_names)
    if missing:
        raise ValueError(f"it has no column {', '.join(sorted(missing))}")
    for column in columns:
        kind = table.column(column).type
        if not pa.types.is_integer(kind) or table.column(column).null_count:
            raise ValueError(f"column {column} is {kind}, or has nulls, but must hold integers")
    starts = table.column("row_start").to_numpy()
    if len(starts) and starts[-1] >= n_rows:
        table = _shortened(table.slice(0, int(np.searchsorted(starts, n_rows))), n_rows)
    starts, counts = (table.column(column).to_numpy() for column in ("row_start", "n_rows"))
    for column, values in (("row_start", starts), ("n_rows", counts)):
        if len(values) and not (values.min() >= 0 and values.max() <= n_rows):
            raise ValueError(f"column {column} exceeds the {n_rows} rows")
    if (starts + counts > n_rows).any():
        raise ValueError(f"a line exceeds the {n_rows} rows")
    return table


def _shortened(table: pa.Table, n_rows: int) -> pa.Table:
    """Return lines of a plan that has grown since, whose last document may have rows beyond the first *n_rows*."""
    counts = np.minimum(table.column("n_rows").to_numpy(), n_rows - table.column("row_start").to_numpy())
    place = table.column_names.index("n_rows")
    return table.set_column(place, "n_rows", pa.array(counts, table.schema.field(place).type))


def _check_length(root: StoreLocation, name: str, n_rows: int) -> None:
    """Raise ValueError, before a table is read, if it has more lines than the store has rows."""
    folder = disk_path(root)
    if folder is None:
        return
    with pq.ParquetFile(folder / name) as file:
        lines = file.metadata.num_rows
    if lines > n_rows and lines > _rows_on_disk(folder):
        raise ValueError(f"it has {lines} lines for {n_rows} rows")


def _rows_on_disk(root: Path) -> int:
    """Return the number of rows that the tables may have: tables are committed before the metadata."""
    folder = committing_folder(root)
    with suppress(StoreError):  # the extension has been committed meanwhile
        if folder is not None:
            return int(read_attributes(folder)["plan"]["rows"])
    plan = read_attributes(root)["plan"]
    return sys.maxsize if GROWING in plan else int(plan["rows"])
