"""Documents that are dicts: from an iterable, or from JSON Lines, text or image files."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from flexcache.documents.arrow_types import has_null_type
from flexcache.documents.columns import CONTENTS
from flexcache.documents.ids import invalid_id
from flexcache.documents.messages import TOOLS, read_messages
from flexcache.documents.roles import Roles, content_error
from flexcache.documents.sources.record_columns import joined_type, plain_value, record_column
from flexcache.documents.sources.source import CorpusFile, DocumentSource, Item
from flexcache.errors import DocumentsError
from flexcache.images.encoded import encode_image, image_memory

CHUNK_BYTES = 32 << 20
"""Bytes of documents that end a chunk of dicts, even if it has fewer documents than a batch."""


class RecordSource(DocumentSource):
    """Dicts, one for each document.

    Parameters
    ----------
    items
        Starts a pass over the documents. They are read once when opened, to check them and to find types: a label that
        is a whole number in one place and a fraction in another is a fraction everywhere.
    once
        Call *items* only once; then the first *rows* documents decide the columns and their types.
    labels
        The labels that are kept; other columns than these and the input are not checked. None for all columns.
    """

    def __init__(
        self,
        kind: str,
        items: Callable[[], Iterable[Item]],
        roles: Roles,
        *,
        files: Sequence[CorpusFile] = (),
        once: bool = False,
        rows: int = 1024,
        labels: Sequence[str] | None = None,
    ) -> None:
        self.kind, self.files, self._roles, self._labels = kind, files, roles, labels
        self.count: int | None = None
        self._content: str | None = None  # the input column of the first document
        self._has_id = False
        self._items: Callable[[], Iterable[Item]] | None = items
        self._once, self._rows = once, rows
        types: dict[str, pa.DataType] = {}
        if once:
            stream = iter(items())
            first = next(_chunks(stream, rows), [])
            self._items = lambda: itertools.chain(first, stream)
            self._find_types(types, first)
        else:
            self.count = 0
            for chunk in _chunks(items(), rows):
                self._find_types(types, chunk)
                self.count += len(chunk)
        self.schema = pa.schema(list(types.items()))

    def with_roles(self, roles: Roles) -> RecordSource:
        """Return the same documents with other roles; the source of a generator cannot be read after that."""
        options: dict[str, Any] = {"files": self.files, "once": self._once, "rows": self._rows, "labels": self._labels}
        return RecordSource(self.kind, self._start_pass(), roles, **options)

    def read_batches(self, columns: list[str], rows: int) -> Iterator[tuple[str, pa.RecordBatch]]:
        """Yield (place, batch); see `DocumentSource`."""
        known = {*self.schema.names, self._roles.id, *self._roles.contents, *([TOOLS] if self._has_tools else [])}
        for chunk in _chunks(self._start_pass()(), rows):
            for place, record in (checked := [self._checked(*item) for item in chunk]):
                if self._labels is None and not known.issuperset(record):
                    late = next(name for name in record if name not in known)
                    raise DocumentsError(
                        f"column {late!r} is missing in the first documents",
                        where=place,
                        expected=", ".join(self.schema.names),
                        remedy="give every document every label (None if unknown), or give a list",
                    )
            arrays = [self._column(checked, name, self._type(name)) for name in columns]
            yield "", pa.RecordBatch.from_arrays(arrays, columns)

    def _start_pass(self) -> Callable[[], Iterable[Item]]:
        """Return the function that starts a pass; raise DocumentsError for a second pass over a generator."""
        items = self._items
        if items is None:
            raise DocumentsError(
                "the documents come from a generator, which was read already",
                remedy="give a list, a file, or an object that can be iterated again",
            )
        if self._once:
            self._items = None
        return items

    def _find_types(self, types: dict[str, pa.DataType], chunk: list[Item]) -> None:
        checked = [self._checked(*item) for item in chunk]
        for name in dict.fromkeys(itertools.chain.from_iterable(record for _, record in checked)):
            if not isinstance(name, str):
                raise DocumentsError("a column name that is not text", where=checked[0][0], found=repr(name))
            if name == self._content or name == self._roles.id:
                if name == self._content or self._has_id:
                    types[name] = CONTENTS[self._roles.contents.get(name, "text")]
            elif name == TOOLS and self._has_tools:  # a part of the messages
                continue
            elif self._labels is not None and name not in self._labels:
                types[name] = pa.null()
            elif name not in (self._roles.text, self._roles.tokens) or any(
                record.get(name) is not None for _, record in checked
            ):  # of text and tokens, the one that is null throughout is left out
                found = self._column(checked, name, None).type
                types[name] = joined_type(types.get(name, pa.null()), found, name, f"{checked[0][0]} or later")

    @property
    def _has_tools(self) -> bool:
        """True if a column of tools belongs to the messages."""
        return self._content is not None and self._content == self._roles.messages and TOOLS not in (self._labels or ())

    def _type(self, name: str) -> pa.DataType | None:
        """Return the type of a column, or None if the values of a batch decide it: tokens, labels null so far."""
        kind = self.schema.field(name).type
        tokens = name == self._content and name == self._roles.tokens
        return None if tokens or (self._once and has_null_type(kind)) else kind

    def _column(self, checked: list[tuple[str, Mapping[str, Any]]], name: str, kind: pa.DataType | None) -> pa.Array:
        values = [self._value(record, name, place) for place, record in checked]
        return record_column(values, kind, name, [place for place, _ in checked])

    def _value(self, record: Mapping[str, Any], name: str, where: str) -> Any:
        value: Any = record.get(name)
        if name == self._roles.messages and name == self._content:
            return read_messages(value, where, tools=record.get(TOOLS) if self._has_tools else None)
        if name == self._roles.image and name == self._content:
            named = f"{where}, id {record[self._roles.id]!r}" if self._has_id else where
            return encode_image(value, named, self.folder_of(where))
        if name == self._roles.id and not isinstance(value, str):
            return str(operator.index(value))
        return plain_value(value)

    def _checked(self, where: str, record: Any) -> tuple[str, Mapping[str, Any]]:
        """Return the place of a document, and the document if its input and id can be used."""
        if not isinstance(record, Mapping):
            raise DocumentsError(
                "a document that is not a dict",
                where=where,
                expected='a dict such as {"id": "a", "text": "…"}',
                found=type(record).__name__,
                remedy="write JSON Lines, one object on each line; or one array of objects, in a .json file"
                if self.kind == "jsonl"
                else "give dicts, a DataFrame or a pyarrow Table",
            )
        roles = self._roles
        present = roles.present([name for name, value in record.items() if value is not None])
        if len(present) != 1:
            raise content_error([str(name) for name in record], roles, where, both=len(present) == 2)
        content, has_id = present[0], record.get(roles.id) is not None
        if self._content is None:
            self._content, self._has_id = content, has_id or roles.id != "id"
        if content != self._content:
            raise DocumentsError(
                "texts, tokens, messages and images are mixed",
                where=where,
                expected=f"{self._content}, as in the first document",
                found=content,
                remedy="make two stores",
            )
        if content == roles.text and not isinstance(record[content], str):
            found = type(record[content]).__name__
            raise DocumentsError("a text that is not a string", where=where, expected="a string", found=found)
        if has_id != self._has_id:
            raise DocumentsError(
                "some documents have an id and some have none",
                where=where,
                expected=f"{roles.id} in every document" if self._has_id else "no id, as in the first document",
                found=", ".join(map(str, record)),
                remedy="give every document an id, or none",
            )
        if has_id and not isinstance(record[roles.id], str) and not _is_whole(record[roles.id]):
            raise invalid_id(type(record[roles.id]).__name__, where)
        return where, record


def iterable_items(documents: Iterable[Any]) -> Iterator[Item]:
    """Yield the documents of an iterable with their places."""
    for index, document in enumerate(documents):
        yield f"document {index}", document


def _chunks(items: Iterable[Item], rows: int) -> Iterator[list[Item]]:
    chunk: list[Item] = []
    size = 0
    for item in items:
        chunk.append(item)
        if isinstance(item[1], Mapping):
            size += sum(len(v) if isinstance(v, str | list) else image_memory(v) for v in item[1].values())
        if len(chunk) == rows or size > CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _is_whole(value: Any) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)
