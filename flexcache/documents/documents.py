"""Documents: what a corpus holds, read in batches, so that it may be larger than memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pyarrow as pa
import xxhash

from flexcache.documents.arrow_types import has_null_type, stored_type
from flexcache.documents.columns import (
    CONTENTS,
    check_content_type,
    check_id_type,
    check_label_type,
    filled_type,
    label_column,
    plain_column,
    read_content,
    read_ids,
    read_images,
)
from flexcache.documents.digest import DIGEST, digest_files, update_batch
from flexcache.documents.files import FORMATS, FileName, find_files, image_items, jsonl_items, text_items
from flexcache.documents.huggingface import DatasetSource, check_one_split, is_dataset
from flexcache.documents.ids import Ids
from flexcache.documents.parquet_files import ParquetSource
from flexcache.documents.records import RecordSource, iterable_items
from flexcache.documents.roles import Roles, content_column, label_columns
from flexcache.documents.runs import near
from flexcache.documents.sources import CSV_NULLS, CsvSource, Source, TableSource, as_table
from flexcache.errors import DocumentsError, nearest
from flexcache.images.encoded import AT_A_TIME


class Documents:
    """A corpus: documents in order, each with an id, a text, tokens or chat messages, and labels.

    Made by `open_documents`. ``schema`` is the Arrow schema of its batches: ``id`` (string), then ``text`` (string),
    ``tokens`` (list<int32>), ``messages`` (lists of role and content) or ``image`` (large_binary: the encoded image),
    then the labels with their own names and types. ``content`` is the name of the second column, the input of the
    model. ``count`` is the number of documents, or None for a generator.
    """

    def __init__(
        self, source: Source, roles: Roles, labels: Sequence[str] | None, *, batch_rows: int, unique_ids: bool
    ) -> None:
        self._source, self._roles, self._wanted = source, roles, labels
        self._rows, self._asked_rows = batch_rows, batch_rows
        self.count = source.count
        self._digest: str | None = None
        self._begun, self._is_records = False, isinstance(source, RecordSource)
        names = source.schema.names
        if len(set(names)) < len(names):
            raise DocumentsError("two columns have the same name", found=", ".join(names))
        names = roles.filled(source.schema)
        place = source.files[0].name if source.files else None
        if roles.id != "id" and names and roles.id not in names:
            raise DocumentsError(f"there is no id column {roles.id!r}", where=place, remedy=nearest(roles.id, names))
        self._id = roles.id if roles.id in names else None
        self._unique, self._unique_ids = unique_ids and self._id is not None, unique_ids
        empty = not names and not source.count
        column = (roles.text or "tokens") if empty else content_column(names, roles, place)
        self._columns = [*([self._id] if self._id else []), column]
        self.content = roles.contents.get(column, "tokens")
        self._labels = [] if empty else label_columns(names, self._columns, labels, roles, self.content, place)
        if self.content == "image":
            self._rows = min(batch_rows, AT_A_TIME)
        kinds = {name: stored_type(source.schema.field(name).type) for name in names}
        where = f"{place}, document" if place else "document"
        if self._id and source.count != 0:  # pandas and pyarrow give columns without rows any type
            check_id_type(kinds[self._id], f"{where}s")
        if not empty and source.count != 0:
            check_content_type(self.content, kinds[column], where)
        for name in self._labels:
            check_label_type(name, kinds[name], self._labels, place)
        fields = [("id", pa.string()), (self.content, CONTENTS[self.content])]
        self.schema = pa.schema([*fields, *((name, kinds[name]) for name in self._labels)])

    def with_images_first(self) -> Documents:
        """Return the same documents with their images as the input, or themselves if they have none.

        Of a generator, the documents that are returned are read in place of these.
        """
        roles, source = replace(self._roles, images_first=True), self._source
        if self.content == "image" or roles.image not in source.schema.names:
            return self
        if isinstance(source, RecordSource):
            source = source.again(roles)
        return Documents(source, roles, self._wanted, batch_rows=self._asked_rows, unique_ids=self._unique_ids)

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the label columns."""
        return tuple(self._labels)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield the documents in corpus order, as record batches of `schema`.

        Ids are compared by 64-bit hashes (16 bytes of memory a document).

        Raises
        ------
        DocumentsError
            A document that cannot be used: null text, tokens that are not whole numbers from 0 to 2³¹ − 1, an image
            whose file cannot be read, an id that occurred before; or a generator that was read already.
        """
        seen = Ids() if self._unique else None
        start, late = 0, dict[str, pa.DataType]()
        self._begun, hasher = True, None if self._source.files else xxhash.xxh3_128()
        columns = [*self._columns, *self._labels]
        for where, raw in () if self.count == 0 else self._source.read(columns, self._rows):
            if not raw.num_rows:
                continue
            batch = self._checked(start, where, raw, late)
            if seen is not None:
                seen.add(batch.column("id"), start)
            start += raw.num_rows
            if hasher is not None:
                update_batch(hasher, batch)
            yield batch
        if hasher is not None:
            self._digest = hasher.hexdigest()

    def digest(self, *, read: bool = False) -> str | None:
        """Return the XXH3-128 of what the documents hold, or None where it is not known.

        Files are hashed as they are, all bytes of them up to 1 GiB together and as large a sample of more; other
        documents by ids, inputs and labels. A generator has a digest once it was read to its end.

        Parameters
        ----------
        read
            Read a generator that was not read before, for its digest alone.
        """
        if self._digest is None and self._source.files:
            self._digest = digest_files(self._source.files)
        if self._digest is None and (self.count is not None or (read and not self._begun and self._is_records)):
            for _ in self.batches():
                pass
        return self._digest

    def runs(self, runs: Sequence[range]) -> Iterator[pa.RecordBatch]:
        """Yield the documents of some ranges of corpus order, sorted and apart; see `batches`. Ids are not compared."""
        late: dict[str, pa.DataType] = {}
        for start, where, raw in near(self._source, [*self._columns, *self._labels], self._rows, runs):
            yield self._checked(start, where, raw, late)

    def _checked(self, start: int, where: str, raw: pa.RecordBatch, late: dict[str, pa.DataType]) -> pa.RecordBatch:
        """Return a batch in the types of `schema`; *late* has those of labels that were null in all batches before."""
        place = f"{where}, document" if where else "document"
        span = f"{place}s {start} to {start + raw.num_rows - 1}"
        arrays = [plain_column(array, name, span) for name, array in zip(raw.schema.names, raw.columns, strict=True)]
        *ids, content = arrays[: len(self._columns)]
        numbers = pa.array(range(start, start + raw.num_rows), pa.int64()).cast(pa.string())
        names = read_ids(ids[0], place, start) if ids else numbers
        if self.content == "image":
            folder = self._source.folder(where)
            values = read_images(content, names, f"{where}, " if where else "", folder)
        else:
            values = read_content(self.content, content, place, start)
        columns, fields = [names, values], [self.schema.field(0), self.schema.field(1)]
        for name, array in zip(self._labels, arrays[len(self._columns) :], strict=True):
            kind = late.get(name, self.schema.field(name).type)
            if has_null_type(kind):
                kind = late[name] = filled_type(kind, array.type)
            columns.append(label_column(array, kind, name, span))
            fields.append(pa.field(name, kind))
        return pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields))

    def describe(self, *, read: bool = False) -> dict[str, Any]:
        """Return what identifies the corpus, as JSON-able values: kind, files, columns, count, and a digest.

        Files have their names relative to the corpus, so that a corpus may be moved; *read* is that of `digest`.
        """
        digest = self.digest(read=read)
        told = self._source.described
        labels = [
            told.field(name) if name in told.names else self._source.schema.field(name)
            for name in self._labels
            if name in told.names or self._wanted is not None
        ]
        nulls = self._source.nulls if isinstance(self._source, CsvSource) else CSV_NULLS
        return {
            "kind": self._source.kind,
            "files": _described(self._source),
            "columns": {
                **{field.name: str(field.type) for field in (self.schema.field(0), self.schema.field(1))},
                **{
                    field.name: str(field.type.value_type if pa.types.is_dictionary(field.type) else field.type)
                    for field in labels
                },
            },
            "count": self.count,
            **({} if digest is None else {DIGEST: digest}),
            **({} if set(nulls) == set(CSV_NULLS) else {"csv_nulls": sorted(nulls)}),
            **({"dataset": self._source.about} if isinstance(self._source, DatasetSource) else {}),
        }

    def __len__(self) -> int:
        if self.count is None:
            raise TypeError("the documents of a generator have no length; use count, which is None")
        return self.count

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        count = "unknown" if self.count is None else f"{self.count:,}"
        return f"<Documents {self._source.kind}: {count} documents; {', '.join(self.schema.names)}>"


def open_documents(
    source: Any,
    *,
    format: str | None = None,
    id: str = "id",
    text: str | None = "text",
    tokens: str | None = "tokens",
    messages: str | None = "messages",
    image: str | None = "image",
    labels: Sequence[str] | None = None,
    csv_nulls: Sequence[str] = CSV_NULLS,
    batch_rows: int = 1024,
    unique_ids: bool = True,
    images_first: bool = False,
) -> Documents:
    """Open a corpus.

    *source* is a path or a list of paths to Parquet, JSON Lines or CSV files (the latter two also compressed: .gz,
    .zst, .bz2; a .json file may be one array of objects), a folder of such files, a glob, a folder of .txt files or of
    images (the id is the relative path; of images, ``folder`` is a label); a pyarrow Table or RecordBatchReader, a
    DataFrame of pandas or Polars, or anything else with an Arrow stream, which are read into memory; a Hugging Face
    Dataset or IterableDataset; what `flexcache.documents.huggingface.load_dataset` returns; an iterable of dicts, such
    as a list or a generator; or a `Documents`. Files of folders and globs are taken in the order of their names.

    *id*, *text*, *tokens*, *messages* and *image* name the columns; None is for one that is not to be the input. One
    column is the input. A column that is named otherwise than by default comes before the others. Among these, text
    or tokens come first; where there are both, which one is to be said. Then come messages: lists of
    ``{"role", "content"}``, or their JSON text, for the tokenizer's chat template. Then images: what
    `flexcache.images.encode` takes; a path is relative to the file that names it. With *images_first*, as for a vision
    transformer, an image is the input wherever there is one. Without an id column the id is the document's index.

    With labels=None all other columns are labels, whatever they are called. In CSV files, labels are null where a
    field is among *csv_nulls*. Dictionaries, views and run-end-encoded values are stored as plain values, structs
    without fields as null. Parquet and tables are opened without reading them; JSON Lines, CSV and lists are read once,
    which checks them and finds the types of their labels. Of generators and streamed datasets, the first *batch_rows*
    documents decide the types; a label that is null in all of them gets its type where it first has a value.

    Raises
    ------
    DocumentsError
        No such file, an unknown format, no column of text, tokens or images or both of the first, an unknown label, a
        label with a reserved name or of a type that a store cannot keep, broken JSON or UTF-8, an item that is not a
        dict, documents of text and of tokens mixed, a dataset of several splits.

    Examples
    --------
    >>> documents = open_documents([{"id": "a", "text": "A film.", "messages": [{"role": "user", "content": "?"}]}])
    >>> documents.content, documents.labels
    ('text', ('messages',))
    """
    if isinstance(source, Documents):
        return source.with_images_first() if images_first else source
    if batch_rows < 1:
        raise DocumentsError("a batch has documents", expected="batch_rows of at least 1", found=str(batch_rows))
    if format is not None and format not in FORMATS:
        raise DocumentsError(f"there is no format {format!r}", remedy=nearest(format, tuple(FORMATS)))
    roles = Roles(id, text, tokens, messages, image, images_first)
    if isinstance(labels, str):
        labels = [labels]
    nulls = (csv_nulls,) if isinstance(csv_nulls, str) else tuple(csv_nulls or ())
    opened, roles = _source(source, format, roles, batch_rows, labels, nulls)
    return Documents(opened, roles, labels, batch_rows=batch_rows, unique_ids=unique_ids)


def _source(
    source: Any,
    format: str | None,
    roles: Roles,
    rows: int,
    labels: Sequence[str] | None,
    csv_nulls: Sequence[str],
) -> tuple[Source, Roles]:
    check_one_split(source)
    if isinstance(source, DatasetSource):
        return source, roles
    if is_dataset(source):
        return DatasetSource(source, rows=rows, labels=labels), roles
    if (table := as_table(source)) is not None:
        return TableSource(table), roles
    paths = [source] if isinstance(source, FileName) else source
    if isinstance(paths, list | tuple) and paths and all(isinstance(path, FileName) for path in paths):
        kind, files = find_files(paths, format)
        if kind == "parquet":
            return ParquetSource(files), roles
        if kind == "csv":
            return CsvSource(files, roles, csv_nulls), roles
        if kind == "image":
            roles = Roles("id", None, None, None, "image")
        if kind == "txt":
            roles = Roles("id", "text", None)
        read = {"jsonl": jsonl_items, "image": image_items, "txt": text_items}[kind]
        return RecordSource(kind, lambda: read(files), roles, files=files, rows=rows, labels=labels), roles
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise DocumentsError(
            "that is no corpus",
            expected="a path, a DataFrame, a pyarrow Table, a dataset, or an iterable of dicts",
            found=type(source).__name__,
            remedy=_remedy(source, roles),
        )
    once = isinstance(source, Iterator)
    items = partial(iterable_items, source)
    return RecordSource("iterable", items, roles, once=once, rows=rows, labels=labels), roles


def _remedy(source: Any, roles: Roles) -> str | None:
    """Return what to give in place of a mapping: of one document, a list; of columns, a table."""
    if not isinstance(source, dict):
        return None
    one = any(isinstance(source.get(name), str) for name in (roles.id, roles.text) if name)
    one = one or all(isinstance(token, int) for token in source.get(roles.tokens or "", ["none"]))
    return "of one document, give a list: [document]" if one else "of a dict of columns, give pyarrow.table(columns)"


def _described(source: Source) -> list[dict[str, Any]]:
    """Return the files of a corpus; the images of a folder, which may be millions, as one."""
    files = [{"name": file.name, "bytes": file.path.stat().st_size} for file in source.files]
    if source.kind != "image":
        return files
    digest = xxhash.xxh3_128_hexdigest(json.dumps(files).encode())
    return [{"name": "*", "bytes": sum(f["bytes"] for f in files), "files": len(files), "xxh3_128": digest}]
