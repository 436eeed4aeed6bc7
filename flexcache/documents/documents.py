"""A corpus of documents, read in batches, so that it may be larger than memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
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
from flexcache.documents.ids import SeenIds
from flexcache.documents.messages import TOOLS
from flexcache.documents.roles import Roles, content_column, label_columns
from flexcache.documents.sources.record_source import RecordSource
from flexcache.documents.sources.source import DocumentSource
from flexcache.errors import DocumentsError, nearest
from flexcache.images.encoded import AT_A_TIME


class Documents:
    """A corpus: documents in order, each with an id, an input for the model, and labels; made by `open_documents`.

    Attributes
    ----------
    schema : pyarrow.Schema
        The columns of its batches: ``id`` (string); the input, one of ``text`` (string), ``tokens`` (list<int32>),
        ``messages`` (lists of role and content) and ``image`` (large_binary: the encoded image); then the labels with
        their own names and types.
    content : str
        The name of the second column, the input.
    count : int or None
        The number of documents, None for a generator.

    >>> import flexcache
    >>> documents = flexcache.open_documents([{"text": "A film.", "stars": 3}, {"text": "A play.", "stars": 5}])
    >>> len(documents), documents.content, documents.labels
    (2, 'text', ('stars',))
    >>> [batch.column("id").to_pylist() for batch in documents.batches()]
    [['0', '1']]
    """

    def __init__(
        self, source: DocumentSource, roles: Roles, labels: Sequence[str] | None, *, batch_rows: int, unique_ids: bool
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
        if self.content == "messages" and TOOLS in names and TOOLS not in (labels or ()):
            self._columns.append(TOOLS)
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
        """Return the same documents with their images as the input, or the documents themselves without images.

        A generator can then be read only through the returned documents.
        """
        roles = replace(self._roles, images_first=True)
        if self.content == "image" or roles.image not in self._source.schema.names:
            return self
        source = self._source.with_roles(roles)
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
            whose file cannot be read, an id that occurred before; or a generator that was already read.
        """
        seen = SeenIds() if self._unique else None
        start, late = 0, dict[str, pa.DataType]()
        self._begun, hasher = True, None if self._source.files else xxhash.xxh3_128()
        columns = [*self._columns, *self._labels]
        for where, raw in () if self.count == 0 else self._source.read_batches(columns, self._rows):
            if not raw.num_rows:
                continue
            batch = self._checked(start, where, raw, late)
            if seen is not None:
                seen.add_ids(batch.column("id"), start)
            start += raw.num_rows
            if hasher is not None:
                update_batch(hasher, batch)
            yield batch
        if hasher is not None:
            self._digest = hasher.hexdigest()

    def digest(self, *, read: bool = False) -> str | None:
        """Return the XXH3-128 of the documents, or None if it is not known.

        For files it covers all bytes up to 1 GiB together, or a sample of that size; for other documents it covers ids,
        inputs and labels. A generator has a digest once it was read to its end.

        Parameters
        ----------
        read
            Read a generator that was not read before, only for its digest.
        """
        if self._digest is None and self._source.files:
            self._digest = digest_files(self._source.files)
        if self._digest is None and (self.count is not None or (read and not self._begun and self._is_records)):
            for _ in self.batches():
                pass
        return self._digest

    def select_runs(self, runs: Sequence[range]) -> DocumentRuns:
        """Return the documents of sorted, disjoint ranges of the corpus, as a corpus of their own."""
        return DocumentRuns(self, runs)

    def _read_runs(self, runs: Sequence[range]) -> Iterator[pa.RecordBatch]:
        late: dict[str, pa.DataType] = {}
        for start, where, raw in self._source.read_runs([*self._columns, *self._labels], self._rows, runs):
            yield self._checked(start, where, raw, late)

    def _checked(self, start: int, where: str, raw: pa.RecordBatch, late: dict[str, pa.DataType]) -> pa.RecordBatch:
        """Return a batch in the types of `schema`; *late* has the types of labels that were null at first."""
        place = f"{where}, document" if where else "document"
        span = f"{place}s {start} to {start + raw.num_rows - 1}"
        arrays = [plain_column(array, name, span) for name, array in zip(raw.schema.names, raw.columns, strict=True)]
        read = arrays[: len(self._columns)]
        tools = read.pop() if self._columns[-1] == TOOLS and self.content == "messages" else None
        *ids, content = read
        numbers = pa.array(range(start, start + raw.num_rows), pa.int64()).cast(pa.string())
        names = read_ids(ids[0], place, start) if ids else numbers
        if self.content == "image":
            folder = self._source.folder_of(where)
            values = read_images(content, names, f"{where}, " if where else "", folder)
        else:
            values = read_content(self.content, content, place, start, tools)
        columns, fields = [names, values], [self.schema.field(0), self.schema.field(1)]
        for name, array in zip(self._labels, arrays[len(self._columns) :], strict=True):
            kind = late.get(name, self.schema.field(name).type)
            if has_null_type(kind):
                kind = late[name] = filled_type(kind, array.type)
            columns.append(label_column(array, kind, name, span))
            fields.append(pa.field(name, kind))
        return pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields))

    def describe(self, *, read: bool = False) -> dict[str, Any]:
        """Return the values that identify the corpus, for JSON: kind, files, columns, count, and a digest.

        Names of files are relative to the corpus, so that a corpus may be moved. *read* is that of `digest`.
        """
        digest = self.digest(read=read)
        described = self._source.described
        columns = {field.name: str(field.type) for field in (self.schema.field(0), self.schema.field(1))}
        for name in self._labels:
            if name in described.names or self._wanted is not None:
                kind = (described if name in described.names else self._source.schema).field(name).type
                columns[name] = str(kind.value_type if pa.types.is_dictionary(kind) else kind)
        return {
            "kind": self._source.kind,
            "files": _describe_files(self._source),
            "columns": columns,
            "count": self.count,
            **({} if digest is None else {DIGEST: digest}),
            **self._source.details,
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


class DocumentRuns:
    """Ranges of a corpus as a corpus of their own; made by `Documents.select_runs`."""

    def __init__(self, documents: Documents, runs: Sequence[range]) -> None:
        self._documents, self._runs = documents, runs

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield the documents of the runs in corpus order; ids are not compared."""
        return self._documents._read_runs(self._runs)

    def describe(self) -> dict[str, Any]:
        """Return the values that identify the whole corpus."""
        return self._documents.describe()


def _describe_files(source: DocumentSource) -> list[dict[str, Any]]:
    """Return name and size of each file; the images of a folder, which may be millions, are one entry."""
    files = [{"name": file.name, "bytes": file.path.stat().st_size} for file in source.files]
    if source.kind != "image":
        return files
    digest = xxhash.xxh3_128_hexdigest(json.dumps(files).encode())
    return [{"name": "*", "bytes": sum(f["bytes"] for f in files), "files": len(files), "xxh3_128": digest}]
