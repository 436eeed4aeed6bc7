"""Labels of the tokens of rows, and labels of documents and tokens that were joined after the capture."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xarray as xr
import xxhash

from flexcache.errors import DamagedError, StoreError, nearest
from flexcache.plan import ranges
from flexcache.sequences.labels import SEQUENCE_COLUMNS
from flexcache.spec import CaptureSpec
from flexcache.store.format.label_table import LabelTable, remove_remedy
from flexcache.store.format.ledger import FileRecord, damaged_file
from flexcache.store.format.schema import CONTEXT
from flexcache.store.storage.backend import storage_of
from flexcache.store.storage.location import StoreLocation
from flexcache.store.storage.path_safety import check_inside


def label_names(tokens: pa.Table, spec: CaptureSpec) -> tuple[str, ...]:
    """Return the names of the columns of ``sequences.parquet`` that hold a label for each token."""
    own = (*SEQUENCE_COLUMNS, *([CONTEXT] if spec.decoder else []))
    return tuple(name for name in tokens.column_names if name not in own)


def row_labels(tokens: pa.Table, spec: CaptureSpec, name: str, where: StoreLocation) -> pa.Array:
    """Return the label of the token of each row, from the sequences of a store and its spec.

    StoreError if the tokens have no such label, or rows are means over tokens.
    """
    names = label_names(tokens, spec)
    if name not in names:
        raise StoreError(
            f"the tokens have no label {name!r}",
            where=str(where),
            remedy=nearest(name, names) if names else "capture with token_labels",
        )
    if spec.rows == "mean":
        raise StoreError("rows are means over tokens, so they have no label of a token", where=str(where))
    pieces = []
    for chunk in tokens.to_batches():
        lists, counts = chunk.column(name), chunk.column("n_rows").to_numpy()
        begin = lists.offsets.to_numpy()[:-1].astype(np.int64)
        if "keep" in chunk.schema.names:
            keep = chunk.column("keep")
            places = np.repeat(begin, counts) + keep.flatten().to_numpy(zero_copy_only=False)
        else:
            places = ranges(begin + chunk.column("keep_start").to_numpy(), counts)
        pieces.append(lists.values.take(pa.array(places)))
    return pa.chunked_array(pieces, tokens.schema.field(name).type.value_type).combine_chunks()


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

    def checksums(self, columns: Iterable[str] | None = None) -> dict[str, str]:
        """Return the checksum of the table of each of *columns* that was joined; None for all columns."""
        asked = self._of if columns is None else [name for name in columns if name in self._of]
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
        labels = pq.read_table(io.BytesIO(content), columns=["id", *table.columns])
        if labels.column_names != ["id", *table.columns]:
            raise ValueError(f"it has only the columns {', '.join(labels.column_names)}")
        for name in [name for name, column in table.columns.items() if column.of == "tokens"]:
            if not pa.types.is_list(labels.schema.field(name).type):
                raise ValueError(f"column {name} of tokens is {labels.schema.field(name).type}")
        return labels
    except (pa.ArrowException, ValueError) as error:
        raise DamagedError(
            "a label table cannot be read", where=str(path), found=str(error), remedy=remove_remedy(table.name)
        ) from error


def _padded(column: pa.ChunkedArray, count: int) -> pa.ChunkedArray:
    """Return the first *count* values, with nulls for those that are missing at the end."""
    kept = column.slice(0, count)
    return pa.chunked_array([*kept.chunks, pa.nulls(count - len(kept), column.type)], column.type)
