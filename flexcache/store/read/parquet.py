"""Read the Parquet tables of a store."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from flexcache.store.storage.location import Place
from flexcache.store.storage.path_safety import check_inside


def open_table(path: Place) -> pq.ParquetFile:
    """Open a Parquet file, wherever it is; on object storage a row group is a few requests."""
    check_inside(path.parent, path)
    return pq.ParquetFile(path if isinstance(path, Path) else path.open())


def read_table(path: Place, columns: list[str] | None = None) -> pa.Table:
    """Read a Parquet file, whole or some columns of it."""
    check_inside(path.parent, path)
    return pq.read_table(path if isinstance(path, Path) else path.open(), columns=columns)
