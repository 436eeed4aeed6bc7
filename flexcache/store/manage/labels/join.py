"""Join a table of labels to a store: read it, check it, and put it into the order of the documents."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from flexcache.documents import RESERVED
from flexcache.documents.label_rows import read_label_rows
from flexcache.errors import ConfigError, DocumentsError, StoreError, nearest
from flexcache.sequences.labels import SEQUENCE_COLUMNS
from flexcache.spec import listed
from flexcache.store.format.label_table import (
    TABLE_NAME,
    LabelColumn,
    LabelTable,
    list_label_tables,
    read_label_table,
)
from flexcache.store.format.ledger import FileRecord
from flexcache.store.format.schema import DOCUMENTS, SEQUENCES, staged_folder
from flexcache.store.format.text import TABLE_COLUMNS, shorten
from flexcache.store.manage.labels.alignment import align_with_tokens
from flexcache.store.manage.labels.tables import changing_labels, write_table
from flexcache.store.read.open_store import OpenStore
from flexcache.store.read.parquet import open_table
from flexcache.store.storage.location import StoreLocation, is_location

DEFAULT_NAME = "labels"


def join_labels(
    path: StoreLocation,
    table: Any,
    on: str = "id",
    *,
    name: str | None = None,
    columns: str | Sequence[str] | None = None,
    token_labels: str | Sequence[str] = (),
    tokenizer: Any = None,
    replace: bool = False,
) -> LabelTable:
    """Join a table of labels to a store; see `flexcache.Store.join`."""
    name = _table_name(table) if name is None else name
    if not TABLE_NAME.fullmatch(name):
        raise ConfigError(
            "a label table cannot have this name",
            expected="up to 100 letters, digits, dots, underscores and hyphens",
            found=repr(name),
            remedy="give another name: name=… (--name)",
        )
    columns = None if columns is None else listed(columns, str, "columns")
    token_labels = listed(token_labels, str, "token_labels")
    labels = read_label_rows(table, on, columns)
    for column in token_labels:
        if column not in labels.column_names[1:]:
            raise DocumentsError(
                f"token_labels names {column!r}, which is no label of the table",
                remedy=nearest(column, labels.column_names[1:]),
            )
    with changing_labels(path):
        store = OpenStore(path)
        _check_columns(store, labels.column_names[1:], name)
        content, record = _aligned_file(store, labels, on, name, token_labels, tokenizer)
        before = read_label_table(path, name) if name in list_label_tables(path) else None
        if before is not None and before.file != record.file and not replace:
            raise StoreError(
                f"the store has another label table {name!r}",
                where=str(path),
                found=str(before),
                remedy="replace it: replace=True (--replace), or give this one another name: name=… (--name)",
            )
        write_table(path, content, record)
    return record


def _table_name(table: Any) -> str:
    """Return the name of the file of labels without its suffixes; `DEFAULT_NAME` for other tables."""
    return Path(str(table)).name.split(".")[0] if is_location(table) else DEFAULT_NAME


def _check_columns(store: OpenStore, names: Sequence[str], table: str) -> None:
    """Raise DocumentsError if a label has the name of a column that the store has, or that its extension will have."""
    joined = [column for other in store.label_tables.values() if other.name != table for column in other.columns]
    staged = staged_folder(store.path)
    new = [] if staged is None else open_table(staged / DOCUMENTS).schema_arrow.names
    captured = [
        column for file in (DOCUMENTS, SEQUENCES) for column in open_table(store.path / file).schema_arrow.names
    ]
    taken = {*RESERVED, *TABLE_COLUMNS, *SEQUENCE_COLUMNS, *captured, *joined, *new}
    if wrong := [name for name in names if name in taken]:
        free = [name for name in names if name not in taken]
        raise DocumentsError(
            f"the store has a column {wrong[0]!r} already",
            where=str(store.path),
            found=", ".join(names),
            remedy="rename the column" + (f", or choose: columns={free} (--columns {','.join(free)})" if free else ""),
        )


def _aligned_file(
    store: OpenStore, labels: pa.Table, on: str, name: str, token_labels: Sequence[str], tokenizer: Any
) -> tuple[bytes, LabelTable]:
    """Return the Parquet file of labels in the order of the documents, and its record."""
    documents = store.documents
    if on not in documents.column_names:
        raise DocumentsError(
            f"the documents have no column {on!r} to join on",
            where=str(store.path),
            remedy=nearest(on, documents.column_names),
        )
    try:
        keys = documents[on].combine_chunks().cast(pa.string())
    except pa.ArrowException:
        keys = None
    if keys is None or pa.types.is_floating(documents[on].type):
        raise DocumentsError(
            f"labels cannot be joined on {on!r}", expected="text or whole numbers", found=str(documents[on].type)
        )
    lines = pc.index_in(keys, value_set=labels[on].combine_chunks())
    unknown = len(labels) - pc.count_distinct(lines).as_py()
    if lines.null_count == len(lines):
        raise DocumentsError(
            f"no value of {on!r} in the table of labels is one of the store",
            where=str(store.path),
            expected=f"values such as {keys[0].as_py()!r}",
            found=shorten(labels[on].slice(0, 3).to_pylist(), 80) if len(labels) else "a table without lines",
        )
    columns: dict[str, pa.Array] = {}
    for column in labels.column_names[1:]:
        values = labels[column].combine_chunks().take(lines)
        if column in token_labels:
            values = _of_tokens(store, column, values, tokenizer)
        columns[column] = values
    sink = io.BytesIO()
    table = pa.table({"id": documents["id"], **columns})
    try:
        pq.write_table(table, sink, compression="zstd")
    except pa.ArrowException as error:
        raise DocumentsError(
            "a label has a value that Parquet cannot hold", found=str(error).splitlines()[0]
        ) from error
    content = sink.getvalue()
    described = {
        column: LabelColumn(
            str(values.type),
            "tokens" if column in token_labels else "documents",
            int(pc.sum(pc.is_null(values, nan_is_null=True)).as_py()),
        )
        for column, values in columns.items()
    }
    file = FileRecord(len(content), xxhash.xxh3_128_hexdigest(content))
    return content, LabelTable(name, on, len(documents), len(lines) - lines.null_count, unknown, described, file)


def _of_tokens(store: OpenStore, column: str, values: pa.Array, tokenizer: Any) -> pa.Array:
    """Return labels of tokens as lists, null for a document without any."""
    some = pc.indices_nonzero(values.is_valid()).cast(pa.int64())
    aligned = align_with_tokens(store, some, pa.table({column: values.take(some)}), tokenizer)[column]
    place = np.full(len(values), -1, np.int64)
    place[some.to_numpy()] = np.arange(len(some))
    return aligned.take(pa.array(place, mask=place < 0))
