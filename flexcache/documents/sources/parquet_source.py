"""Documents of Parquet files.

Files are read by `pyarrow.parquet`, not by `pyarrow.dataset`, which decodes a whole row group at once, however large it
is, and casts bytes to text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from flexcache.documents.arrow_types import stored_type
from flexcache.documents.sources.file_errors import reading_file
from flexcache.documents.sources.source import CorpusFile, DocumentSource, LocatedBatch
from flexcache.errors import DocumentsError


class ParquetSource(DocumentSource):
    """Parquet files with compatible columns; a label that a file lacks is null there."""

    kind = "parquet"

    def __init__(self, files: list[CorpusFile]) -> None:
        self.files, self.count, schemas = files, 0, []
        for file in files:
            with self._open(file) as parquet:
                schemas.append(parquet.schema_arrow.remove_metadata())
                self.count += parquet.metadata.num_rows
        try:
            self.schema = _unified(schemas)
        except pa.ArrowException as error:
            raise DocumentsError(
                "the Parquet files have columns of the same name and different types",
                where=", ".join(file.name for file in files[:5]),
                found=str(error),
                remedy="write them with one schema, or open them one at a time",
            ) from error

    def read_batches(self, columns: list[str], rows: int) -> Iterator[tuple[str, pa.RecordBatch]]:
        """Yield (place, batch); see `DocumentSource`. Pages are decoded when needed, however large a row group is."""
        for file in self.files:
            with self._open(file) as parquet:
                for batch in self._batches(file, parquet, columns, rows):
                    yield file.name, batch

    def _locate_batches(self, columns: list[str], rows: int, runs: Sequence[range]) -> Iterator[LocatedBatch]:
        """Yield the batches of the row groups that have documents of *runs*; other row groups are not decoded."""
        first = 0
        for file in self.files:
            with self._open(file) as parquet:
                for number in range(parquet.num_row_groups):
                    held = range(first, first + parquet.metadata.row_group(number).num_rows)
                    first = held.stop
                    wanted = [run for run in runs if run.start < held.stop and held.start < run.stop]
                    at = held.start
                    for batch in self._batches(file, parquet, columns, rows, [number]) if wanted else ():
                        yield at, file.name, batch
                        at += batch.num_rows
                        if at >= wanted[-1].stop:
                            break

    def _batches(
        self,
        file: CorpusFile,
        parquet: pq.ParquetFile,
        columns: list[str],
        rows: int,
        groups: Sequence[int] | None = None,
    ) -> Iterator[pa.RecordBatch]:
        there = [name for name in columns if name in parquet.schema_arrow.names]
        missing = {name: stored_type(self.schema.field(name).type) for name in columns if name not in there}
        with reading_file(file, "Parquet"):
            for batch in parquet.iter_batches(batch_size=rows, columns=there, row_groups=groups):
                arrays = [
                    pa.nulls(batch.num_rows, missing[name]) if name in missing else batch.column(name)
                    for name in columns
                ]
                yield pa.RecordBatch.from_arrays(arrays, columns)

    @staticmethod
    def _open(file: CorpusFile) -> pq.ParquetFile:
        with reading_file(file, "Parquet"):
            return pq.ParquetFile(file.path, pre_buffer=False, buffer_size=1 << 20)


def _unified(schemas: list[pa.Schema]) -> pa.Schema:
    """Return the columns of all files, in types that hold the values of all."""
    try:
        return pa.unify_schemas(schemas, promote_options="permissive")
    except pa.ArrowException:
        plain = [pa.schema([(field.name, stored_type(field.type)) for field in schema]) for schema in schemas]
        return pa.unify_schemas(plain, promote_options="permissive")
