"""Labels that were joined to a store after its capture, of documents and of single tokens."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xarray as xr
import xxhash

from flexcache.errors import DamagedError, StoreError
from flexcache.store.format.label_table import LabelTable, remove_remedy
from flexcache.store.format.ledger import FileRecord, damaged_file
from flexcache.store.storage.backend import storage_of
from flexcache.store.storage.location import StoreLocation
from flexcache.store.storage.path_safety import check_inside


class JoinedLabels:
    """The label tables of a store as of their first use, each read when one of its columns is needed.

    A table has a line for each document that the store had when it was joined; later documents have no labels.
    """

    def __init__(self, root: StoreLocation, tables: Mapping[str, LabelTable]) -> None:
        self._root, self.tables = root, dict(tables)
        self._of = {column: table for table in tables.values() for column in table.columns}
        self._read: dict[str, pa.Table] = {}

    @property
    def of_tokens(self) -> tuple[str, ...]:
        """Names of the columns with an entry for each token."""
        return tuple(name for name, table in self._of.items() if table.columns[name].of == "tokens")

    def checksums(self, columns: object = None) -> dict[str, str]:
        """Return the checksum of the table of each of *columns* that was joined; None for all columns."""
        asked = self._of if columns is None else [name for name in columns if name in self._of]  # type: ignore[attr-defined]
        return {name: self._of[name].file.xxh3_128 for name in asked}

    def add_to(self, documents: pa.Table) -> pa.Table:
        """Return documents, the first ones of the store, with the labels of documents as further columns.

        Raises
        ------
        DamagedError
            A table is missing or has other bytes than were written, or belongs to other documents.
        """
        for name, table in self._of.items():
            if table.columns[name].of == "tokens":
                continue
            if name in documents.column_names:
                raise StoreError(
                    f"column {name!r} is in the documents and in a label table",
                    where=f"{self._root}, table {table.name}",
                    remedy=remove_remedy(table.name),
                )
            documents = documents.append_column(name, _padded(self._column(name, documents["id"]), len(documents)))
        return documents

    def row_labels(self, name: str, ids: pa.ChunkedArray, coordinates: Mapping[str, xr.Variable]) -> pa.Array:
        """Return the label of the token of each row, null for a token without one."""
        lists = self._column(name, ids).combine_chunks()
        document, position = (np.asarray(coordinates[key].values).astype(np.int64) for key in ("document", "position"))
        counts = np.append(pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False), 0).astype(
            np.int64
        )
        document = np.minimum(document, len(lists))  # documents after the table have the empty list at its end
        known = (position >= 0) & (position < counts[document])
        places = np.where(known, (np.cumsum(counts) - counts)[document] + position, 0)
        return lists.flatten().take(pa.array(places, mask=~known))

    def _column(self, name: str, ids: pa.ChunkedArray) -> pa.ChunkedArray:
        table = self._of[name]
        if table.name not in self._read:
            self._read[table.name] = read_joined(self._root, table)
        found = self._read[table.name]
        count = min(len(found), len(ids))
        if not found["id"].slice(0, count).equals(ids.slice(0, count)):
            raise DamagedError(
                "a label table belongs to other documents",
                where=str(self._root / table.path),
                expected="the ids of the store's documents in order",
                remedy=remove_remedy(table.name),
            )
        return found[name]


def read_joined(root: StoreLocation, table: LabelTable) -> pa.Table:
    """Return the file of a label table after a check of its checksum: ``id``, and the labels.

    Raises
    ------
    DamagedError
        The file is missing, has other bytes than were written, or lacks a column.
    """
    path = root / table.path
    check_inside(root, path)
    try:
        content = storage_of(root).read_bytes(table.path)
    except FileNotFoundError as error:
        raise damaged_file(path, table.file, None, f"open the store again; or {remove_remedy(table.name)}") from error
    found = FileRecord(len(content), xxhash.xxh3_128_hexdigest(content))
    if found != table.file:
        raise damaged_file(path, table.file, found, remove_remedy(table.name))
    try:
        return pq.read_table(io.BytesIO(content), columns=["id", *table.columns])
    except (pa.ArrowException, KeyError) as error:
        raise DamagedError(
            "a label table cannot be read", where=str(path), found=str(error), remedy=remove_remedy(table.name)
        ) from error


def _padded(column: pa.ChunkedArray, count: int) -> pa.ChunkedArray:
    """Return the first *count* values, with nulls for those that are missing at the end."""
    kept = column.slice(0, count)
    return pa.chunked_array([*kept.chunks, pa.nulls(count - len(kept), column.type)], column.type)
