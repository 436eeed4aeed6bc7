"""Where documents come from: Arrow tables and CSV files, and what all sources have in common.

A source knows its columns (``schema``), its number of documents where it can be known (``count``), its files, and
yields record batches in corpus order (``read``). It keeps at most a few batches in memory.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv

from flexcache.documents.roles import Roles
from flexcache.documents.values import exact_type
from flexcache.errors import DocumentsError

BLOCK_BYTES = 8 << 20  # of a CSV file
_CSV = pcsv.ParseOptions(newlines_in_values=True)
_WHOLE = r"^-?(0|[1-9][0-9]*)$"
_FRACTION = r"^([-+]?(0|[1-9][0-9]{0,14})?(\.[0-9]*)?([eE][-+]?[0-9]+)?|[-+]?inf|[nN]a[nN])$"
_BOOLEAN = r"^([tT]rue|[fF]alse)$"
CSV_NULLS = ("", "NA")
"""Fields of CSV files that are null in labels."""


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
    def described(self) -> pa.Schema:
        """The columns that identify the corpus: those of the data, in the types that every version told of them."""
        ...

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

    schema: pa.Schema
    files: list[CorpusFile]

    @property
    def described(self) -> pa.Schema:
        """See `Source`."""
        return self.schema

    def folder(self, where: str) -> Path | None:
        """Return the folder of the file that *where* names, which paths in it are relative to; None where none is."""
        named = [file for file in self.files if where == file.name or where.startswith(f"{file.name}, ")]
        return max(named, key=lambda file: len(file.name)).path.parent if named else None


def as_table(source: Any) -> pa.Table | None:
    """Return what a DataFrame, a RecordBatch or a reader of these holds, or None if *source* is nothing of Arrow.

    Of a DataFrame of pandas, an index is a column if it has a name.

    Raises
    ------
    DocumentsError
        A column has values of several types.
    """
    library = type(source).__module__.partition(".")[0]
    if library in ("pandas", "polars") and type(source).__name__ == "Series":
        frame = "documents.to_frame('text')"
        raise DocumentsError(
            "a Series is one column, and documents are rows of a table",
            where="Series",
            expected="a DataFrame",
            found=f"a Series of {library}",
            remedy=f"give {frame}" if library == "pandas" else "give documents.alias('text').to_frame()",
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
    """Return the columns of a DataFrame, those of Python objects as `exact_type` has them."""
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


class CsvSource(OfFiles):
    """CSV files with a header and the same columns; read once when opened, for their types.

    The id, the input and the column of images stay as written. In the others, a field that is among *nulls* is null,
    and so is an empty one in a column that is not text. A column of whole numbers, of fractions, or of ``true`` and
    ``false`` throughout gets that type. A number with leading zeros, or with more digits than its type holds, is a
    code, and its column stays text.
    """

    kind = "csv"

    def __init__(self, files: list[CorpusFile], roles: Roles, nulls: Sequence[str] = CSV_NULLS) -> None:
        self.files, self.count, self._block = files, 0, BLOCK_BYTES
        self.nulls = tuple(nulls)
        self._as_text: set[str] = set()
        names: list[str] = []
        types: dict[str, _CsvType] = {}
        for file in files:
            count = self.count
            while True:
                self.count = count
                try:
                    _check_start(file, roles)
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
                    self._as_text = {name for name in (roles.id, roles.image) if name} | set(roles.present(names))
                    for batch in self._strings(file, header):
                        self.count += batch.num_rows
                        for name in set(header) - self._as_text:
                            types.setdefault(name, _CsvType(self.nulls)).see(batch.column(name))
                    break
                except (pa.ArrowException, OSError) as error:
                    if "straddl" not in str(error) or self._block >= 1 << 30:
                        raise unreadable(file, "CSV", error) from error
                    self._block *= 4  # a row is longer than a block
        self.schema = pa.schema([(name, types[name].type if name in types else pa.string()) for name in names])
        self._described = pa.schema([(name, types[name].strict if name in types else pa.string()) for name in names])

    @property
    def described(self) -> pa.Schema:
        """The types where an empty field alone is null, as in stores that were made before "NA" was."""
        return self._described

    def read(self, columns: list[str], rows: int) -> Iterator[tuple[str, pa.RecordBatch]]:
        """Yield (where, batch); see `Source`."""
        for file in self.files:
            try:
                for batch in self._strings(file, self.schema.names):
                    arrays = [self._typed(batch.column(name), name) for name in columns]
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

    def _typed(self, fields: pa.Array, name: str) -> pa.Array:
        kind = self.schema.field(name).type
        if name in self._as_text:
            return fields
        nulls = self.nulls if kind == pa.string() else ("", *self.nulls)
        null = pc.is_in(fields, pa.array(nulls, pa.string()))
        return pc.if_else(null, pa.scalar(None, pa.string()), fields).cast(kind)

    def _options(self) -> pcsv.ReadOptions:
        return pcsv.ReadOptions(use_threads=False, block_size=self._block)


class _CsvType:
    """The types that the fields of a CSV column can be read as, narrowed batch by batch."""

    def __init__(self, nulls: Sequence[str]) -> None:
        self._nulls = pa.array(sorted({"", *nulls}), pa.string())
        self._left = {pa.int64(): _WHOLE, pa.float64(): _FRACTION, pa.bool_(): _BOOLEAN}
        self._seen = self._marked = False

    def see(self, fields: pa.Array) -> None:
        null = pc.is_in(fields, self._nulls)
        self._marked |= pc.any(pc.not_equal(fields.filter(null), "")).as_py() or False
        filled = fields.filter(pc.invert(null))
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

    @property
    def strict(self) -> pa.DataType:
        """The type where an empty field alone is null: text, if another one is."""
        return pa.string() if self._marked else self.type


def _check_start(file: CorpusFile, roles: Roles) -> None:
    """Raise DocumentsError if a CSV file begins in another encoding than UTF-8, or its delimiter is not a comma."""
    with pa.input_stream(str(file.path), compression="detect") as stream:
        start = stream.read(1 << 16)
    if b"\0" in start[:4]:
        raise unreadable(file, "CSV", UnicodeDecodeError("utf-8", start, start.index(b"\0"), 4, "a zero byte"))
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(start)
    except UnicodeDecodeError as error:
        raise unreadable(file, "CSV", error) from error
    header = next(iter(text.splitlines()), "")
    by = {sign: [field.strip().strip('"') for field in header.split(sign)] for sign in ",;\t|"}
    for sign, fields in by.items():
        if roles.present(by[","]) or len(fields) == 1 or not (len(by[","]) == 1 or roles.present(fields)):
            continue
        raise DocumentsError(
            "a CSV file whose delimiter is not a comma",
            where=file.name,
            expected="columns that are separated by commas",
            found=f"the header {header[:80]!r}, which seems to have the delimiter {sign!r}",
            remedy=f"write the file with commas, or give a table: pandas.read_csv(path, sep={sign!r})",
        )


def unreadable(file: CorpusFile, kind: str, error: Exception) -> DocumentsError:
    """Return the error for a file that its reader refused."""
    found = str(error).splitlines()[0] if str(error) else type(error).__name__
    remedy, encoding = "check that the file is whole, and that it is what its name says", ""
    if isinstance(error, UnicodeDecodeError) or "UTF8" in found:
        name = _encoding(error.object) if isinstance(error, UnicodeDecodeError) else "latin1"
        encoding, remedy = f": its encoding is not UTF-8 but perhaps {name}", _conversion(name)
    return DocumentsError(f"a {kind} file that cannot be read{encoding}", where=file.name, found=found, remedy=remedy)


def not_utf8(where: str, error: UnicodeDecodeError) -> DocumentsError:
    """Return the error for text whose bytes are not UTF-8."""
    return DocumentsError(
        "text that is not UTF-8",
        where=where,
        expected="the encoding UTF-8",
        found=f"byte 0x{error.object[error.start]:02x} at offset {error.start}",
        remedy=_conversion(_encoding(error.object)),
    )


def _encoding(start: bytes) -> str:
    """Return the likely encoding of a file that is not UTF-8, by its first bytes."""
    wide = start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or b"\0" in start[:4]
    return "UTF-16" if wide else "latin1"


def _conversion(encoding: str) -> str:
    return f"convert the file, as with iconv -f {encoding} -t utf-8"
