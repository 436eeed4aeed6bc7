"""Documents that come as dicts: of an iterable, of JSON Lines, or made of text files."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from flexcache.documents.arrow_types import changed_families, has_null_type, label_cast, united
from flexcache.documents.messages import MESSAGES, read_messages
from flexcache.documents.roles import Roles, content_error
from flexcache.documents.sources import CorpusFile, Item, OfFiles
from flexcache.documents.values import exact_array
from flexcache.errors import DocumentsError
from flexcache.images.encoded import encode, memory

CHUNK_BYTES = 32 << 20  # a chunk of dicts ends here even if it has fewer documents than a batch


class RecordSource(OfFiles):
    """Dicts, one for each document.

    *items* starts a pass over them. They are read once when opened, to check them and to find types: a label that is
    a whole number in one place and a fraction in another is a fraction everywhere. With *once*, *items* is called
    only once, and the first *rows* documents decide the columns and their types. Columns that are neither the input
    nor among *labels*, where those are given, are not looked at.
    """

    def __init__(
        self,
        kind: str,
        items: Callable[[], Iterable[Item]],
        roles: Roles,
        *,
        files: list[CorpusFile] | None = None,
        once: bool = False,
        rows: int = 1024,
        labels: Sequence[str] | None = None,
    ) -> None:
        self.kind, self.files, self._roles, self._labels = kind, files or [], roles, labels
        self.count: int | None = None
        self._content: str | None = None  # the column of the input that the first document has
        self._has_id = False
        self._items: Callable[[], Iterable[Item]] | None = items
        self._once, self._rows = once, rows
        types: dict[str, pa.DataType] = {}
        if once:
            stream = iter(items())
            first = next(_chunks(stream, rows), [])
            self._items = lambda: itertools.chain(first, stream)
            self._see(types, first)
        else:
            self.count = 0
            for chunk in _chunks(items(), rows):
                self._see(types, chunk)
                self.count += len(chunk)
        self.schema = pa.schema(list(types.items()))

    def again(self, roles: Roles) -> RecordSource:
        """Return the same documents with other roles of their columns; of a generator, this one cannot be read then."""
        if self._items is None:
            raise _read_already()
        items, rows = self._items, self._rows
        if self._once:
            self._items = None
        return RecordSource(self.kind, items, roles, files=self.files, once=self._once, rows=rows, labels=self._labels)

    def read(self, columns: list[str], rows: int) -> Iterator[tuple[str, pa.RecordBatch]]:
        """Yield (where, batch); see `flexcache.documents.sources.Source`."""
        if self._items is None:
            raise _read_already()
        items = self._items()
        if self._once:
            self._items = None
        known = {*self.schema.names, self._roles.id, *self._roles.contents}
        for chunk in _chunks(items, rows):
            where = [place for place, _ in chunk]
            records = [self._checked(*item) for item in chunk]
            for place, record in zip(where, records):
                if self._labels is None and not known.issuperset(record):
                    raise DocumentsError(
                        f"column {next(name for name in record if name not in known)!r} was not there at first",
                        where=place,
                        expected=", ".join(self.schema.names),
                        remedy="give every document every label (None where unknown), or give a list",
                    )
            arrays = [
                _array(
                    [self._value(record, name, place) for place, record in zip(where, records)],
                    self._type(name),
                    name,
                    where,
                )
                for name in columns
            ]
            yield "", pa.RecordBatch.from_arrays(arrays, columns)

    def _see(self, types: dict[str, pa.DataType], chunk: list[Item]) -> None:
        where = [place for place, _ in chunk]
        records = [self._checked(*item) for item in chunk]
        for name in dict.fromkeys(itertools.chain.from_iterable(records)):
            if not isinstance(name, str):
                raise DocumentsError("a column's name is text", where=where[0], found=repr(name))
            if name == self._content or name == self._roles.id:
                if name == self._content or self._has_id:
                    kind = self._roles.contents.get(name, "text")
                    types[name] = _TYPES.get(kind, pa.string())
            elif self._labels is not None and name not in self._labels:
                types[name] = pa.null()
            elif name not in (self._roles.text, self._roles.tokens) or any(
                record.get(name) is not None for record in records
            ):  # the other of the two is left out where it is null throughout
                values = _array(
                    [self._value(record, name, place) for place, record in zip(where, records)], None, name, where
                )
                types[name] = _promoted(types.get(name, pa.null()), values.type, name, f"{where[0]} or later")

    def _type(self, name: str) -> pa.DataType | None:
        """Return the type of a column, or None where the values of a batch decide it: tokens, late labels."""
        kind = self.schema.field(name).type
        tokens = name == self._content and name == self._roles.tokens
        return None if tokens or (self._once and has_null_type(kind)) else kind

    def _value(self, record: Mapping[str, Any], name: str, where: str) -> Any:
        value: Any = record.get(name)
        if name == self._roles.messages and name == self._content:
            return read_messages(value, where)
        if name == self._roles.image and name == self._content:
            named = f"{where}, id {record[self._roles.id]!r}" if self._has_id else where
            return encode(value, named, self.folder(where))
        if name == self._roles.id and not isinstance(value, str):
            return str(operator.index(value))
        return _plain(value)

    def _checked(self, where: str, record: Any) -> Mapping[str, Any]:
        if not isinstance(record, Mapping):
            raise DocumentsError(
                "a document that is not a dict",
                where=where,
                expected='a dict such as {"id": "a", "text": "…"}',
                found=type(record).__name__,
                remedy="write JSON Lines, an object on each line; or one array of objects, in a file that ends in .json"
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
                "documents of several kinds, texts, tokens, messages or images, are mixed",
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
            raise bad_id(type(record[roles.id]).__name__, where)
        return record


def _read_already() -> DocumentsError:
    return DocumentsError(
        "the documents come from a generator, which was read already",
        remedy="give a list, a file, or an object that starts anew with each iteration",
    )


def bad_id(found: str, where: str | None) -> DocumentsError:
    """Return the error for an id that is neither text nor a whole number."""
    return DocumentsError(
        "an id that is neither text nor a whole number",
        where=where,
        expected="text or a whole number",
        found=found,
    )


def iterable_items(documents: Iterable[Any]) -> Iterator[Item]:
    """Yield the items of an iterable with where they are."""
    for index, document in enumerate(documents):
        yield f"document {index}", document


def _chunks(items: Iterable[Item], rows: int) -> Iterator[list[Item]]:
    chunk: list[Item] = []
    size = 0
    for item in items:
        chunk.append(item)
        if isinstance(item[1], Mapping):
            size += sum(len(v) if isinstance(v, str | list) else memory(v) for v in item[1].values())
        if len(chunk) == rows or size > CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


_PYTHON = {str, int, float, bool, bytes, list, dict, type(None)}
_TYPES = {"tokens": pa.list_(pa.int32()), "messages": MESSAGES, "image": pa.large_binary()}
_NOT_ARROW = (pa.ArrowException, UnicodeError, OverflowError, TypeError, ValueError)


def _array(values: list[Any], kind: pa.DataType | None, name: str, where: list[str]) -> pa.Array:
    """Return *values* as an Arrow array, or raise the error of the first one that does not fit."""
    try:
        return _safe(values, kind)
    except _NOT_ARROW as error:
        so_far = kind or pa.null()
        for value, place in zip(values, where):
            try:
                found = _safe([value], kind).type
            except _NOT_ARROW as reason:
                broken, mixed = (
                    isinstance(reason, UnicodeError),
                    kind is None and isinstance(value, list | tuple | dict),
                )
                wrong = "values of different types, or of an unknown one" if mixed else "a value that does not fit"
                raise DocumentsError(
                    f"column {name!r} holds {'broken Unicode' if broken else wrong}",
                    where=place,
                    expected="text that can be written as UTF-8" if broken else str(kind or "a type that Arrow knows"),
                    found=f"{type(value).__name__} {repr(value)[:60]}",
                    remedy=None
                    if broken
                    else "give it as text, or leave it out by flexcache.open_documents(…, labels=[…])",
                ) from reason
            so_far = _promoted(so_far, found, name, place)
        raise DocumentsError(
            f"column {name!r} has values of different types",
            where=where[0],
            found=str(error).splitlines()[0],
            remedy="write it in one type throughout, or leave it out by flexcache.open_documents(…, labels=[…])",
        ) from error


def _safe(values: list[Any], kind: pa.DataType | None) -> pa.Array:
    array = exact_array(values)  # given a type, Arrow would cut 1.5 to an integer without an error
    return array if kind is None else label_cast(array, kind)


def _promoted(one: pa.DataType, two: pa.DataType, name: str, where: str) -> pa.DataType:
    try:
        if families := changed_families(one, two):
            raise pa.ArrowTypeError(" and ".join(families))
        return united(one, two)
    except pa.ArrowException as error:
        raise DocumentsError(
            f"column {name!r} changes its type",
            where=where,
            expected=str(one),
            found=str(two),
            remedy="write it in one type throughout, or leave it out by flexcache.open_documents(…, labels=[…])",
        ) from error


def _plain(value: Any) -> Any:
    """Return what NumPy and pandas have for a value as Python has it, or as Arrow takes it."""
    if type(value) in _PYTHON:
        return value
    if type(value).__name__ in ("NAType", "NaTType"):  # of pandas
        return None
    plain = value.tolist() if hasattr(value, "tolist") else value
    dates = getattr(getattr(value, "dtype", None), "kind", "") in ("M", "m")
    if dates and not isinstance(plain, list) and np.isnat(value):
        return None
    return value if dates and "[ns]" in str(value.dtype) else plain  # of which Python would make whole numbers


def _is_whole(value: Any) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)
