"""Read a table of labels: a key in each line, and labels of the documents with that key."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from flexcache.documents.columns import check_label_type, plain_column, read_ids
from flexcache.documents.roles import Roles
from flexcache.documents.sources.csv_source import CsvSource
from flexcache.documents.sources.dataset_source import DatasetSource, check_one_split, is_dataset
from flexcache.documents.sources.file_items import jsonl_items
from flexcache.documents.sources.files import FileName, find_files
from flexcache.documents.sources.parquet_source import ParquetSource
from flexcache.documents.sources.record_columns import plain_value, record_column
from flexcache.documents.sources.record_source import iterable_items
from flexcache.documents.sources.source import DocumentSource, Item
from flexcache.documents.sources.table_source import TableSource, as_table
from flexcache.errors import DocumentsError, nearest

BATCH_ROWS = 1 << 16


def read_label_rows(source: Any, key: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Return a table of labels: the column *key* as text, then the labels in the types that a store keeps.

    *source* is a path, a list of paths or a glob of Parquet, JSON Lines or CSV files; an Arrow table, a DataFrame, or
    anything else with an Arrow stream; a Hugging Face dataset; an iterable of dicts; or a dict of columns. It is read
    into memory.

    Parameters
    ----------
    columns
        The labels to read; by default all columns but *key*.

    Raises
    ------
    DocumentsError
        The source cannot be read, a column is missing, a key is null or occurs twice, or a label has a type that a
        store cannot keep, or no value at all.

    Examples
    --------
    >>> read_label_rows([{"id": 7, "stars": 5}, {"id": 9, "stars": None}], "id").to_pylist()
    [{'id': '7', 'stars': 5}, {'id': '9', 'stars': None}]
    """
    opened = _open_source(source, key)
    where = opened.files[0].name if opened.files else "the table of labels"
    names = opened.schema.names
    if len(set(names)) < len(names):
        raise DocumentsError("two columns have the same name", where=where, found=", ".join(names))
    wanted = [name for name in names if name != key] if columns is None else list(dict.fromkeys(columns))
    for name in (key, *wanted):
        if name not in names:
            raise DocumentsError(
                f"the table of labels has no column {name!r}",
                where=where,
                remedy=nearest(name, names) if names else "the table has no columns",
            )
    if not wanted or key in wanted:
        raise DocumentsError(
            "the table has no labels",
            where=where,
            expected=f"a column besides {key!r}",
            found=", ".join(wanted or names),
        )
    batches = [batch for _, batch in opened.read_batches([key, *wanted], BATCH_ROWS)]
    table = pa.Table.from_batches(batches) if batches else opened.schema.empty_table().select([key, *wanted])
    labels = [plain_column(table[name].combine_chunks(), name, where) for name in wanted]
    for name, array in zip(wanted, labels, strict=True):
        check_label_type(name, array.type, wanted, where)
        if pc.all(pc.is_null(array, nan_is_null=True)).as_py():
            raise DocumentsError(
                f"label {name!r} has no value", where=where, expected="a value in one line at least", found="null only"
            )
    keys = read_ids(plain_column(table[key].combine_chunks(), key, where), f"{where}, line", 0)
    _check_unique(keys, key, where)
    return pa.table([keys, *labels], names=[key, *wanted])


def _open_source(source: Any, key: str) -> DocumentSource:
    check_one_split(source)
    if isinstance(source, DatasetSource):
        return source
    if is_dataset(source):
        return DatasetSource(source)
    if isinstance(source, FileName):
        source = [source]
    if isinstance(source, list | tuple) and source and all(isinstance(path, FileName) for path in source):
        kind, files = find_files(source, None)
        if kind == "parquet":
            return ParquetSource(files)
        if kind == "csv":
            return CsvSource(files, Roles(key, None, None, None, None))
        if kind == "jsonl":
            return TableSource(_table_of_records(jsonl_items(files)))
        raise DocumentsError(
            "labels cannot be read from these files", expected="Parquet, JSON Lines or CSV", found=kind
        )
    try:
        table = pa.table(dict(source)) if isinstance(source, Mapping) else as_table(source)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DocumentsError("a dict of columns that cannot be read", found=str(error).splitlines()[0]) from error
    if table is not None:
        return TableSource(table)
    if not isinstance(source, Iterable):
        raise DocumentsError(
            "not a table of labels",
            expected="a path, a DataFrame, a pyarrow Table, a dataset, an iterable of dicts, or a dict of columns",
            found=type(source).__name__,
        )
    return TableSource(_table_of_records(iterable_items(source)))


def _table_of_records(items: Iterator[Item]) -> pa.Table:
    read = list(items)
    for where, record in read:
        if not isinstance(record, Mapping) or not all(isinstance(name, str) for name in record):
            raise DocumentsError(
                "a line of labels that is not a dict with names of columns",
                where=where,
                expected='a dict such as {"id": "a", "label": "positive"}',
                found=repr(record)[:80],
            )
    places, names = [where for where, _ in read], dict.fromkeys(itertools.chain.from_iterable(r for _, r in read))
    return pa.table(
        {
            name: record_column([plain_value(record.get(name)) for _, record in read], None, name, places)
            for name in names
        }
    )


def _check_unique(keys: pa.Array, key: str, where: str) -> None:
    counts = pc.value_counts(keys)
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(twice):
        name = twice.field("values")[0].as_py()
        lines = pc.indices_nonzero(pc.equal(keys, name)).to_pylist()
        raise DocumentsError(
            f"{len(twice)} values of {key!r} occur in several lines of the table of labels",
            where=f"{where}, lines {lines[0]} and {lines[1]}, counted from 0",
            expected="one line for each value",
            found=repr(name),
            remedy="keep one line for each value, such as pandas.DataFrame.drop_duplicates",
        )
