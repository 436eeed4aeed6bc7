"""Where documents come from: Arrow tables, Parquet and CSV files; `flexcache.documents.records` has those of dicts.

A source knows its columns (``schema``), its number of documents where it can be known (``count``), its files, and
yields record batches in corpus order (``read``). It keeps at most a few batches in memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.parquet as pq

from flexcache.errors import DocumentsError

BLOCK_BYTES = 8 << 20  # of a CSV file
_CSV = pcsv.ParseOptions(newlines_in_values=True)
_WHOLE = r"^-?(0|[1-9][0-9]*)$"
_FRACTION = r"^([-+]?(0|[1-9][0-9]{0,14})?(\.[0-9]*)?([eE][-+]?[0-9]+)?|[-+]?inf|[nN]a[nN])$"
_BOOLEAN = r"^([tT]rue|[fF]alse)$"


@dataclass(frozen=True)
class Roles:
    """The column names of a document's id, text, tokens, messages and image in the source."""

    id: str
    text: str | None
    tokens: str | None
    messages: str | None = None
    image: str | None = None

    @property
    def contents(self) -> dict[str, str]:
        """The columns that a document may be in, by name, with what they hold."""
        kinds = {"text": self.text, "tokens": self.tokens, "messages": self.messages, "image": self.image}
        return {column: kind for kind, column in kinds.items() if column}

    def present(self, names: Collection[str]) -> list[str]:
        """Return which are among *names*; messages count where there is neither text nor tokens, and then images."""
        plain = [name for name in (self.text, self.tokens) if name and name in names]
        return plain or [name for name in (self.messages, self.image) if name and name in names][:1]


@dataclass(frozen=True)
class CorpusFile:
    """A file of a corpus: where it is, and its name relative to the corpus, which is all that a store keeps."""

    path: Path
    name: str


Near = tuple[int, str, pa.RecordBatch]  # index of the first document; where it is; the documents
Item = tuple[str, Any]  # where a document is, for errors; the document


class Source(Protocol):
    """What `flexcache.documents.Documents` reads from."""

    kind: str
    schema: pa.Schema
    files: list[CorpusFile]

    @property
    def count(self) -> int | None:
        """The number of documents, where it is known without reading them."""
        ...

    def read(self, columns: list[str], rows: int) -> Iterator[tuple[str, pa.RecordBatch]]:
        """Yield (where, batch) in corpus order, at most *rows* documents at a time, with *columns*."""
        ...

    def folder(self, where: str) -> Path | None:
        """Return the folder that paths of the documents there are relative to."""
        ...


class OfFiles:
    """What all sources know of their files."""

    files: list[CorpusFile]

    def folder(self, where: str) -> Path | None:
        """Return the folder of the file that *where* names, which paths in it are relative to; None where none is."""
        named = [file for file in self.files if where == file.name or where.startswith(f"{file.name}, ")]
        return max(named, key=lambda file: len(file.name)).path.parent if named else None


class TableSource(OfFiles):
    """An Arrow table in memory."""

    kind = "table"

    def __init__(self, table: pa.Table) -> None:
        self.table, self.schema, self.count = table, table.schema, table.num_rows
        self.files: list[CorpusFile] = []

    def read(self, columns: list[str], rows: int) -> Iterator[tuple[str, pa.RecordBatch]]:
        """Yield (where, batch); see `Source`."""
        for batch in self.table.select(columns).to_batches(max_chunksize=rows):
            yield "the table", batch


class ParquetSource(OfFiles):
    """Parquet files with compatible columns; a label that a file lacks is null there."""

    kind = "parquet"

    def __init__(self, files: list[CorpusFile]) -> None:
        self.files, self.count, schemas = files, 0, []
        for file in files:
            with self._open(file) as parquet:
                schemas.append(parquet.schema_arrow.remove_metadata())
                self.count += parquet.metadata.num_rows
        try:
            self.schema = pa.unify_schemas(schemas, promote_options="permissive")
        except pa.ArrowException as error:
            raise DocumentsError(
                "the Parquet files have columns of the same name and different types",
                where=", ".join(file.name for file in files[:5]),
                found=str(error),
                remedy="write them with one schema, or open them one at a time",
            ) from error

    def read(self, columns: list[str], rows: int) -> Iterator[tuple[str, pa.RecordBatch]]:
        """Yield (where, batch); see `Source`. Pages are decoded when needed, however large a row group is."""
        for file in self.files:
            with self._open(file) as parquet:
                for batch in self._batches(file, parquet, columns, rows):
                    yield file.name, batch

    def groups(self, columns: list[str], rows: int, runs: Sequence[range]) -> Iterator[Near]:
        """Yield (index of the first document, where, batch) of the row groups that have documents of *runs*."""
        first = 0
        for file in self.files:
            with self._open(file) as parquet:
                for number in range(parquet.num_row_groups):
                    held = range(first, first + parquet.metadata.row_group(number).num_rows)
                    first = held.stop
                    wanted = [run for run in runs if run.start < held.stop and held.start < run.stop]
                    if not wanted:
                        continue
                    at = held.start
                    for batch in self._batches(file, parquet, columns, rows, [number]):
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
        batches = parquet.iter_batches(batch_size=rows, columns=there, row_groups=groups)
        while True:
            try:
                batch = next(batches, None)
            except (pa.ArrowException, OSError) as error:
                raise unreadable(file, "Parquet", error) from error
            if batch is None:
                break
            arrays = [
                batch.column(name) if name in there else pa.nulls(batch.num_rows, self.schema.field(name).type)
                for name in columns
            ]
            yield pa.RecordBatch.from_arrays(arrays, columns)

    @staticmethod
    def _open(file: CorpusFile) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(file.path, pre_buffer=False, buffer_size=1 << 20)
        except (pa.ArrowException, OSError) as error:
            raise unreadable(file, "Parquet", error) from error


class CsvSource(OfFiles):
    """CSV files with a header and the same columns; read once when opened, for their types.

    Columns named in *as_text* stay as written. Of the others, one of whole numbers, of fractions, or of ``true`` and
    ``false`` throughout gets that type, with null for an empty field. A number with leading zeros, or with more
    digits than its type holds, is a code, and its column stays text.
    """

    kind = "csv"

    def __init__(self, files: list[CorpusFile], as_text: set[str]) -> None:
        self.files, self.count, self._block = files, 0, BLOCK_BYTES
        names: list[str] = []
        types: dict[str, _CsvType] = {}
        for file in files:
            count = self.count
            while True:
                self.count = count
                try:
                    header = self._names(file)
                    names = names or header
                    if header != names:
                        raise DocumentsError(
                            "the CSV files have different columns",
                            where=file.name,
                            expected=", ".join(names),
                            found=", ".join(header),
                            remedy="write them with one header, or open them one at a time",
                        )
                    for batch in self._strings(file, header):
                        self.count += batch.num_rows
                        for name in set(header) - as_text:
                            types.setdefault(name, _CsvType()).see(batch.column(name))
                    break
                except (pa.ArrowException, OSError) as error:
                    if "straddl" not in str(error) or self._block >= 1 << 30:
                        raise unreadable(file, "CSV", error) from error
                    self._block *= 4  # a row is longer than a block
        self.schema = pa.schema([(name, types[name].type if name in types else pa.string()) for name in names])

    def read(self, columns: list[str], rows: int) -> Iterator[tuple[str, pa.RecordBatch]]:
        """Yield (where, batch); see `Source`."""
        for file in self.files:
            try:
                for batch in self._strings(file, self.schema.names):
                    arrays = [_typed(batch.column(name), self.schema.field(name).type) for name in columns]
                    whole = pa.RecordBatch.from_arrays(arrays, columns)
                    for start in range(0, whole.num_rows, rows):
                        yield file.name, whole.slice(start, rows)
            except (pa.ArrowException, OSError) as error:
                raise unreadable(file, "CSV", error) from error

    def _names(self, file: CorpusFile) -> list[str]:
        with pcsv.open_csv(file.path, self._options(), _CSV) as reader:
            names: list[str] = reader.schema.names
        if len(set(names)) < len(names):
            raise DocumentsError("two columns have the same name", where=file.name, found=", ".join(names))
        return names

    def _strings(self, file: CorpusFile, names: list[str]) -> Iterator[pa.RecordBatch]:
        convert = pcsv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False)
        with pcsv.open_csv(file.path, self._options(), _CSV, convert) as reader:
            yield from reader

    def _options(self) -> pcsv.ReadOptions:
        return pcsv.ReadOptions(use_threads=False, block_size=self._block)


class _CsvType:
    """What the fields of a CSV column can be read as, narrowed batch by batch."""

    def __init__(self) -> None:
        self._left = {pa.int64(): _WHOLE, pa.float64(): _FRACTION, pa.bool_(): _BOOLEAN}
        self._seen = False

    def see(self, fields: pa.Array) -> None:
        filled = fields.filter(pc.not_equal(fields, ""))
        if not len(filled):
            return
        self._seen = True
        for kind, pattern in list(self._left.items()):
            try:
                if pc.all(pc.match_substring_regex(filled, pattern)).as_py():
                    filled.cast(kind)
                    continue
            except pa.ArrowInvalid:
                pass
            del self._left[kind]

    @property
    def type(self) -> pa.DataType:
        return next(iter(self._left)) if self._seen and self._left else pa.string()


def _typed(fields: pa.Array, kind: pa.DataType) -> pa.Array:
    if kind == pa.string():
        return fields
    return pc.if_else(pc.equal(fields, ""), pa.scalar(None, pa.string()), fields).cast(kind)


def unreadable(file: CorpusFile, kind: str, error: Exception) -> DocumentsError:
    """Return the error for a file that its reader refused."""
    return DocumentsError(
        f"a {kind} file that cannot be read",
        where=file.name,
        found=str(error).splitlines()[0] if str(error) else type(error).__name__,
        remedy="check that the file is whole, and that it is what its name says",
    )
