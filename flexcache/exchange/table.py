"""Write activations as a Parquet table, for readers such as Hugging Face datasets.

Each row of the store is a line. Columns are ``row``, ``document`` (its id), ``position``, ``token_id``, the labels of
the document, and a list of fixed size for each site and layer. A label with the name of another column gets the prefix
``label_``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flexcache.store.format.text import TABLE_COLUMNS
from flexcache.store.read.selection import ArrayKey
from flexcache.store.read.store import Store

GROUP_BYTES = 32 << 20
"""Bytes of activations in a row group."""

Columns = Mapping[str, tuple[ArrayKey, np.dtype]]


def unit_rows(store: Store, unit: int) -> range:
    """Return the row numbers of a unit."""
    start = unit * store.shard_rows
    return range(start, min(start + store.shard_rows, store.n_rows))


def write_unit_table(store: Store, unit: int, columns: Columns, path: Path, progress: Callable[[int], None]) -> None:
    """Write the rows of a unit as one Parquet file, in row groups of at most 32 MB; *progress* is called with rows."""
    rows = unit_rows(store, unit)
    width = sum(store.arrays[key[0]].features * dtype.itemsize for key, dtype in columns.values())
    step = max(1, GROUP_BYTES // max(1, width))
    writer: pq.ParquetWriter | None = None
    try:
        for start in range(rows.start, rows.stop, step):
            part = _table(store, start, min(start + step, rows.stop), columns)
            if writer is None:
                plain = [name for name in part.column_names if name not in columns]
                writer = pq.ParquetWriter(path, part.schema, compression="zstd", use_dictionary=plain)
            writer.write_table(part, row_group_size=len(part))
            progress(len(part))
    finally:
        if writer is not None:
            writer.close()


def _table(store: Store, start: int, stop: int, columns: Columns) -> pa.Table:
    span = slice(start, stop)
    lines = pa.array(np.asarray(store.coordinates["document"].values[span]))
    documents = store.documents
    found = {
        "row": pa.array(np.arange(start, stop, dtype=np.int64)),
        "document": documents.column("id").take(lines),
        "position": pa.array(store.coordinates["position"].values[span]),
        "token_id": pa.array(store.coordinates["token_id"].values[span]),
    }
    for name in documents.column_names:
        if name not in TABLE_COLUMNS:
            own = f"label_{name}" if name in found or name in columns else name
            found[own] = documents.column(name).take(lines)
    for name, (key, dtype) in columns.items():
        values = store.read(*key, span, raw=dtype == store.reader(key[0]).dtype)
        flat = pa.array(np.ascontiguousarray(values).reshape(-1))
        found[name] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    return pa.table(found)
