"""Documents of an Arrow table, a DataFrame, or anything with an Arrow stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from flexcache.documents.sources.source import DocumentSource
from flexcache.documents.values import exact_type
from flexcache.errors import DocumentsError


class TableSource(DocumentSource):
    """An Arrow table in memory."""

    kind = "table"

    def __init__(self, table: pa.Table) -> None:
        self.table, self.schema, self.count = table, table.schema, table.num_rows

    def read_batches(self, columns: list[str], rows: int) -> Iterator[tuple[str, pa.RecordBatch]]:
        """Yield (place, batch); see `DocumentSource`."""
        for batch in self.table.select(columns).to_batches(max_chunksize=rows):
            yield "the table", batch


def as_table(source: Any) -> pa.Table | None:
    """Return the rows of a DataFrame, a RecordBatch or a reader of these, or None for anything else.

    The index of a pandas DataFrame becomes a column if it has a name.

    Raises
    ------
    DocumentsError
        A column has values of several types, or *source* is a single column.
    """
    library = type(source).__module__.partition(".")[0]
    if library in ("pandas", "polars") and type(source).__name__ == "Series":
        frame = "documents.to_frame('text')" if library == "pandas" else "documents.alias('text').to_frame()"
        raise DocumentsError(
            "a Series is one column, and documents are rows of a table",
            where="Series",
            expected="a DataFrame",
            found=f"a Series of {library}",
            remedy=f"give {frame}",
        )
    try:
        if library == "pandas" and hasattr(source, "columns"):
            return _pandas_table(source)
        if isinstance(source, pa.Table):
            return source
        if isinstance(source, pa.RecordBatch):
            return pa.Table.from_batches([source])
        return pa.table(source) if hasattr(source, "__arrow_c_stream__") else None
    except (pa.ArrowException, TypeError, ValueError) as error:
        mixed = ": a column has values of different types" if library == "pandas" and len(error.args) > 1 else ""
        raise DocumentsError(
            f"a table that cannot be read{mixed}",
            where=type(source).__name__,
            expected="columns of one type each",
            found="; ".join(map(str, error.args)).splitlines()[0],
            remedy="convert the column, or leave it out",
        ) from error


def _pandas_table(frame: Any) -> pa.Table:
    """Return the columns of a DataFrame; columns of Python objects get their `exact_type`."""
    table = pa.Table.from_pandas(frame, preserve_index=None not in frame.index.names).replace_schema_metadata()
    for index, field in enumerate(table.schema):
        if field.name not in frame.columns or frame[field.name].dtype != object:
            continue
        values = frame[field.name].tolist()
        try:
            kind = exact_type(values, field.type)
        except pa.ArrowTypeError as error:
            raise pa.ArrowTypeError(*error.args, f"column {field.name}") from error
        if kind != field.type:
            table = table.set_column(index, field.with_type(kind), pa.array(values, kind, from_pandas=True))
    return table
