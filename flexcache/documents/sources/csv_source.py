"""Documents of CSV files."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv

from flexcache.documents.roles import Roles
from flexcache.documents.sources.file_errors import reading_file, unreadable_file
from flexcache.documents.sources.source import CorpusFile, DocumentSource
from flexcache.errors import DocumentsError

BLOCK_BYTES = 8 << 20
"""Bytes of a CSV file that are parsed at a time."""
CSV_NULLS = ("", "NA")
"""Fields of CSV files that are null in labels."""
_PARSE = pcsv.ParseOptions(newlines_in_values=True)
_WHOLE = r"^-?(0|[1-9][0-9]*)$"
_FRACTION = r"^([-+]?(0|[1-9][0-9]{0,14})?(\.[0-9]*)?([eE][-+]?[0-9]+)?|[-+]?inf|[nN]a[nN])$"
_BOOLEAN = r"^([tT]rue|[fF]alse)$"


class CsvSource(DocumentSource):
    """CSV files with a header and the same columns; read once when opened, for their types.

    The id, the input and the column of images stay as written. In other columns a field among *nulls* is null, and so
    is an empty field unless the column is text. A column of whole numbers, of fractions, or of ``true`` and ``false``
    throughout gets that type. A number with leading zeros, or with more digits than its type holds, is a code, and its
    column stays text.
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
                    header = self._read_header(file)
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
                    for batch in self._read_strings(file, header):
                        self.count += batch.num_rows
                        for name in set(header) - self._as_text:
                            types.setdefault(name, _CsvType(self.nulls)).narrow(batch.column(name))
                    break
                except (pa.ArrowException, OSError) as error:
                    if "straddl" not in str(error) or self._block >= 1 << 30:
                        raise unreadable_file(file, "CSV", error) from error
                    self._block *= 4  # a row is longer than a block
        self.schema = pa.schema([(name, types[name].type if name in types else pa.string()) for name in names])
        self._described = pa.schema([(name, types[name].strict if name in types else pa.string()) for name in names])

    @property
    def described(self) -> pa.Schema:
        """The types for which only an empty field is null, as in stores that were made before "NA" was null."""
        return self._described

    @property
    def details(self) -> dict[str, Any]:
        """The fields that are null, unless they are the default ones."""
        return {} if set(self.nulls) == set(CSV_NULLS) else {"csv_nulls": sorted(self.nulls)}

    def read_batches(self, columns: list[str], rows: int) -> Iterator[tuple[str, pa.RecordBatch]]:
        """Yield (place, batch); see `DocumentSource`."""
        for file in self.files:
            with reading_file(file, "CSV"):
                for batch in self._read_strings(file, self.schema.names):
                    arrays = [self._typed(batch.column(name), name) for name in columns]
                    whole = pa.RecordBatch.from_arrays(arrays, columns)
                    for start in range(0, whole.num_rows, rows):
                        yield file.name, whole.slice(start, rows)

    def _read_header(self, file: CorpusFile) -> list[str]:
        with pcsv.open_csv(file.path, self._options(), _PARSE) as reader:
            names: list[str] = reader.schema.names
        if len(set(names)) < len(names):
            raise DocumentsError("two columns have the same name", where=file.name, found=", ".join(names))
        return names

    def _read_strings(self, file: CorpusFile, names: list[str]) -> Iterator[pa.RecordBatch]:
        convert = pcsv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False)
        with pcsv.open_csv(file.path, self._options(), _PARSE, convert) as reader:
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
    """The types that fit all fields of a CSV column so far."""

    def __init__(self, nulls: Sequence[str]) -> None:
        self._nulls = pa.array(sorted({"", *nulls}), pa.string())
        self._left = {pa.int64(): _WHOLE, pa.float64(): _FRACTION, pa.bool_(): _BOOLEAN}
        self._filled = self._has_marked_null = False

    def narrow(self, fields: pa.Array) -> None:
        """Drop the types that do not fit these fields."""
        null = pc.is_in(fields, self._nulls)
        self._has_marked_null |= pc.any(pc.not_equal(fields.filter(null), "")).as_py() or False
        filled = fields.filter(pc.invert(null))
        if not len(filled):
            return
        self._filled = True
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
        return next(iter(self._left)) if self._filled and self._left else pa.string()

    @property
    def strict(self) -> pa.DataType:
        """The type if only an empty field is null: text for a column with another null."""
        return pa.string() if self._has_marked_null else self.type


def _check_start(file: CorpusFile, roles: Roles) -> None:
    """Raise DocumentsError if a CSV file begins in another encoding than UTF-8, or its delimiter is not a comma."""
    with pa.input_stream(str(file.path), compression="detect") as stream:
        start = stream.read(1 << 16)
    if b"\0" in start[:4]:
        error = UnicodeDecodeError("utf-8", start, start.index(b"\0"), 4, "a zero byte")
        raise unreadable_file(file, "CSV", error)
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(start)
    except UnicodeDecodeError as error:
        raise unreadable_file(file, "CSV", error) from error
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
