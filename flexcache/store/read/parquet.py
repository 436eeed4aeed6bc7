"""Read the Parquet tables of a store, and check that their lines fit its rows."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from flexcache.errors import StoreError
from flexcache.store.format.extension import committing_folder
from flexcache.store.format.schema import read_attributes
from flexcache.store.format.table_validation import check_lines
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
    """Return the first *count* lines of a Parquet file without reading the others.

    Raises
    ------
    DamagedError
        The file cannot be read.
    """
    try:
        with open_table(path) as file:
            batches = [next(file.iter_batches(batch_size=count))] if file.metadata.num_rows and count else []
            return pa.Table.from_batches(batches, file.schema_arrow)
    except (OSError, pa.ArrowException) as error:
        raise unreadable("table", path, error) from error


def read_store_table(root: StoreLocation, name: str, n_rows: int, columns: list[str] | None = None) -> pa.Table:
    """Return the lines of a table of a store that belong to its first *n_rows* rows.

    Raises
    ------
    DamagedError
        The table cannot be read, or its lines do not fit the rows.
    """
    check_inside(root, root / name)
    try:
        _check_length(root, name, n_rows)
        return check_lines(name, read_table(root / name, columns=columns), n_rows)
    except (OSError, pa.ArrowException, ValueError, MemoryError) as error:
        raise unreadable("table", root / name, error) from error


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
    """Return the number of rows that the tables may have: an extension commits tables before the metadata."""
    folder = committing_folder(root)
    with suppress(StoreError):  # the extension has been committed meanwhile
        if folder is not None:
            return int(read_attributes(folder)["plan"]["rows"])
    return int(read_attributes(root)["plan"]["rows"])
