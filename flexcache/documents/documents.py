"""Documents: what a corpus holds, read in batches, so that it may be larger than memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from flexcache.documents.files import FORMATS, find_files, image_items, jsonl_items, text_items
from flexcache.documents.huggingface import DatasetSource, is_dataset
from flexcache.documents.ids import Ids
from flexcache.documents.messages import MESSAGES, read_messages
from flexcache.documents.records import (
    RecordSource,
    bad_id,
    content_column,
    iterable_items,
)
from flexcache.documents.runs import near
from flexcache.documents.sources import CsvSource, ParquetSource, Roles, Source, TableSource
from flexcache.errors import DocumentsError, nearest
from flexcache.images.encoded import AT_A_TIME, encode

RESERVED = (
    *("id", "text", "tokens", "messages_xxh3_128", "image_xxh3_128", "token_id", "position", "document"),
    *("source_index", "n_tokens", "row_start", "n_rows"),
)
MAX_TOKEN = 2**31 - 1
CONTENTS: dict[str, pa.DataType] = {
    "text": pa.string(),
    "tokens": pa.list_(pa.int32()),
    "messages": MESSAGES,
    "image": pa.large_binary(),
}
"""What a document may be, and its type in the batches."""


class Documents:
    """A corpus: documents in order, each with an id, a text, tokens or chat messages, and labels.

    Made by `open_documents`. ``schema`` is the Arrow schema of its batches: ``id`` (string), then ``text`` (string),
    ``tokens`` (list<int32>), ``messages`` (lists of role and content) or ``image`` (large_binary: the encoded image),
    then the labels with their own names and types. ``count`` is the number of documents, or None for a generator.
    """

    def __init__(
        self, source: Source, roles: Roles, labels: Sequence[str] | None, *, batch_rows: int, unique_ids: bool
    ) -> None:
        self._source, self._rows = source, batch_rows
        self.count = source.count
        names = source.schema.names
        if len(set(names)) < len(names):
            raise DocumentsError("two columns have the same name", found=", ".join(names))
        place = source.files[0].name if source.files else None
        if roles.id != "id" and names and roles.id not in names:
            raise DocumentsError(f"there is no id column {roles.id!r}", where=place, remedy=nearest(roles.id, names))
        self._id = roles.id if roles.id in names else None
        self._unique = unique_ids and self._id is not None
        empty = not names and not source.count
        content = (roles.text or "tokens") if empty else content_column(names, roles, place)
        self._columns = [*([self._id] if self._id else []), content]
        self._content = roles.contents.get(content, "tokens")
        self._labels = [] if empty else _labels(names, self._columns, labels, place)
        if self._content == "image":
            self._rows = min(batch_rows, AT_A_TIME)
            _refuse_second_image(self._labels, place)
        kinds = [_plain(source.schema.field(name).type) for name in self._labels]
        first = CONTENTS[self._content]
        fields = [("id", pa.string()), (self._content, first), *zip(self._labels, kinds)]
        self.schema = pa.schema(fields)

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
        start = 0
        for where, raw in self._source.read([*self._columns, *self._labels], self._rows):
            if not raw.num_rows:
                continue
            batch = self._checked(start, where, raw)
            if seen is not None:
                seen.add(batch.column("id"), start)
            start += raw.num_rows
            yield batch

    def runs(self, runs: Sequence[range]) -> Iterator[pa.RecordBatch]:
        """Yield the documents of some ranges of corpus order, sorted and apart; see `batches`. Ids are not compared."""
        for start, where, raw in near(self._source, [*self._columns, *self._labels], self._rows, runs):
            yield self._checked(start, where, raw)

    def _checked(self, start: int, where: str, raw: pa.RecordBatch) -> pa.RecordBatch:
        place = f"{where}, document" if where else "document"
        *ids, content = raw.columns[: len(self._columns)]
        numbers = pa.array(range(start, start + raw.num_rows), pa.int64()).cast(pa.string())
        names = _ids(ids[0], place, start) if ids else numbers
        if self._content == "image":
            values = _images(content, names, f"{where}, " if where else "", self._source.folder(where))
        else:
            read = {"text": _text, "tokens": _tokens, "messages": _messages}[self._content]
            values = read(content, place, start)
        labels = [
            _cast(
                array,
                self.schema.field(name).type,
                name,
                f"{place}s {start} to {start + raw.num_rows - 1}",
            )
            for name, array in zip(self._labels, raw.columns[len(self._columns) :])
        ]
        return pa.RecordBatch.from_arrays([names, values, *labels], schema=self.schema)

    def describe(self) -> dict[str, Any]:
        """Return what identifies the corpus, as JSON-able values: kind, files and their bytes, columns, count.

        Files have their names relative to the corpus, so that a corpus may be moved.
        """
        return {
            "kind": self._source.kind,
            "files": _described(self._source),
            "columns": {field.name: str(field.type) for field in self.schema},
            "count": self.count,
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
    batch_rows: int = 1024,
    unique_ids: bool = True,
) -> Documents:
    """Open a corpus.

    *source* is a path or a list of paths to Parquet, JSON Lines or CSV files (the latter two also compressed: .gz,
    .zst, .bz2), a folder of such files, a glob, a folder of .txt files or of images (the id is the relative path; of
    images, ``folder`` is a label); a pyarrow Table; a Hugging Face Dataset or IterableDataset; what
    `flexcache.documents.huggingface.load_dataset` returns; an iterable of dicts, such as a list or a generator; or a
    `Documents`. Files of folders and globs are taken in the order of their names.

    *id*, *text*, *tokens*, *messages* and *image* name the columns. Messages are looked for where there is neither of
    the first two: lists of ``{"role", "content"}``, for the tokenizer's chat template. Images where there is none of
    these: what `flexcache.images.encode` takes; a path is relative to the file that names it. Without an id column the
    id is the document's index. With labels=None all other columns are labels. Parquet and tables are opened without
    reading them; JSON Lines, CSV, lists and datasets are read once, which checks them and finds the types of their
    labels.

    Raises
    ------
    DocumentsError
        No such file, an unknown format, no column of text, tokens or images or both of the first, an unknown label, a
        label with a reserved name, broken JSON or UTF-8, an item that is not a dict, documents of text and of tokens
        mixed.
    """
    if isinstance(source, Documents):
        return source
    if batch_rows < 1:
        raise DocumentsError("a batch has documents", expected="batch_rows of at least 1", found=str(batch_rows))
    if format is not None and format not in FORMATS:
        raise DocumentsError(f"there is no format {format!r}", remedy=nearest(format, tuple(FORMATS)))
    opened, roles = _source(source, format, Roles(id, text, tokens, messages, image), batch_rows)
    if isinstance(labels, str):
        labels = [labels]
    return Documents(opened, roles, labels, batch_rows=batch_rows, unique_ids=unique_ids)


def _source(source: Any, format: str | None, roles: Roles, rows: int) -> tuple[Source, Roles]:
    if isinstance(source, pa.RecordBatch):
        source = pa.Table.from_batches([source])
    if isinstance(source, pa.Table):
        return TableSource(source), roles
    if isinstance(source, DatasetSource) or is_dataset(source):
        return source if isinstance(source, DatasetSource) else DatasetSource(source), roles
    paths = [source] if isinstance(source, str | os.PathLike) else source
    if isinstance(paths, list | tuple) and paths and all(isinstance(path, str | os.PathLike) for path in paths):
        return _files(paths, format, roles, rows)
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise DocumentsError(
            "that is no corpus",
            expected="a path, a pyarrow Table, or an iterable of dicts",
            found=type(source).__name__,
            remedy="of a dict of columns, give pyarrow.table(columns)" if isinstance(source, Mapping) else None,
        )
    once = isinstance(source, Iterator)
    return RecordSource("iterable", lambda: iterable_items(source), roles, once=once, rows=rows), roles


def _files(paths: Sequence[str | os.PathLike], format: str | None, roles: Roles, rows: int) -> tuple[Source, Roles]:
    kind, files = find_files(paths, format)
    if kind == "parquet":
        return ParquetSource(files), roles
    if kind == "csv":
        return CsvSource(files, {roles.id, *roles.contents}), roles
    if kind == "jsonl":
        return RecordSource("jsonl", lambda: jsonl_items(files), roles, files=files, rows=rows), roles
    if kind == "image":
        roles = Roles("id", None, None, None, "image")
        return RecordSource("image", lambda: image_items(files), roles, files=files, rows=rows), roles
    roles = Roles("id", "text", None)
    return RecordSource("txt", lambda: text_items(files), roles, files=files, rows=rows), roles


def _labels(names: list[str], used: list[str], wanted: Sequence[str] | None, where: str | None) -> list[str]:
    others = [name for name in names if name not in used]
    chosen = others if wanted is None else list(wanted)
    for name in chosen:
        if name in RESERVED:
            keep = [other for other in others if other not in RESERVED]
            raise DocumentsError(
                f"a label cannot be called {name!r}: the store has a column of that name",
                where=where,
                found=", ".join(names),
                remedy=f"rename the column, or choose the labels to keep, as in labels={keep}",
            )
        if name not in others:
            raise DocumentsError(
                f"there is no label column {name!r}",
                where=where,
                remedy=nearest(name, others) if others else "there are no other columns",
            )
    if len(set(chosen)) < len(chosen):
        raise DocumentsError("a label is named twice", found=", ".join(chosen))
    return chosen


def _refuse_second_image(labels: Sequence[str], where: str | None) -> None:
    if "image" in labels:
        raise DocumentsError(
            "a label cannot be called 'image' where the documents are images of another column",
            where=where,
            remedy="rename the column, or leave it out of labels=[…]",
        )


def _described(source: Source) -> list[dict[str, Any]]:
    """Return the files of a corpus; the images of a folder, which may be millions, as one."""
    files = [{"name": file.name, "bytes": file.path.stat().st_size} for file in source.files]
    if source.kind != "image":
        return files
    digest = xxhash.xxh3_128_hexdigest(json.dumps(files).encode())
    return [{"name": "*", "bytes": sum(f["bytes"] for f in files), "files": len(files), "xxh3_128": digest}]


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _cast(array: pa.Array, kind: pa.DataType, name: str, where: str) -> pa.Array:
    try:
        return array if array.type == kind else array.cast(kind)
    except pa.ArrowException as error:
        raise DocumentsError(
            f"column {name!r} has values that do not fit its type",
            where=where,
            expected=str(kind),
            found=str(error).splitlines()[0],
            remedy="write it in one type throughout",
        ) from error


def _is_text(kind: pa.DataType) -> bool:
    kind = _plain(kind)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _refuse_null(array: pa.Array, what: str, place: str, start: int) -> None:
    if array.null_count:
        index = start + pc.index(array.is_null(), True).as_py()
        raise DocumentsError(
            f"a document without {what}: it is null",
            where=f"{place} {index}",
            expected=what,
            found="null",
            remedy="leave the document out, or complete it",
        )


def _ids(array: pa.Array, place: str, start: int) -> pa.Array:
    if not (_is_text(array.type) or pa.types.is_integer(array.type) or pa.types.is_null(array.type)):
        raise bad_id(str(array.type), f"{place}s from {start}")
    _refuse_null(array, "id", place, start)
    return _cast(array, pa.string(), "id", f"{place}s from {start}")


def _text(array: pa.Array, place: str, start: int) -> pa.Array:
    if not (_is_text(array.type) or pa.types.is_null(array.type)):
        raise DocumentsError(
            "a text column that does not hold text",
            where=f"{place}s from {start}",
            expected="string",
            found=str(array.type),
            remedy="name the column that holds the text, as in text='body'",
        )
    _refuse_null(array, "text", place, start)
    return _cast(array, pa.string(), "text", f"{place}s from {start}")


def _messages(array: pa.Array, place: str, start: int) -> pa.Array:
    chats = [read_messages(value, f"{place} {start + index}") for index, value in enumerate(array.to_pylist())]
    return pa.array(chats, MESSAGES)


def _images(array: pa.Array, names: pa.Array, place: str, folder: Path | None) -> pa.Array:
    found = [
        encode(value, f"{place}document {name!r}", folder)
        for name, value in zip(names.to_pylist(), array.to_pylist(), strict=True)
    ]
    return pa.array(found, pa.large_binary())


def _tokens(array: pa.Array, place: str, start: int) -> pa.Array:
    kind = array.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    expected = f"lists of whole numbers from 0 to {MAX_TOKEN}"
    if not is_list or not (pa.types.is_integer(kind.value_type) or pa.types.is_null(kind.value_type)):
        raise DocumentsError(
            "a tokens column that does not hold whole numbers",
            where=f"{place}s from {start}",
            expected=expected,
            found=str(kind),
            remedy="give token ids as lists of integers, in Parquet, JSON Lines, a table or dicts",
        )
    _refuse_null(array, "tokens", place, start)
    flat = pc.list_flatten(array)
    if len(flat):
        wrong = pc.fill_null(pc.or_(pc.less(flat, 0), pc.greater(flat, MAX_TOKEN)), True)
        if pc.any(wrong).as_py():
            at = pc.index(wrong, True).as_py()
            index = start + pc.list_parent_indices(array)[at].as_py()
            raise DocumentsError(
                "a token that is none",
                where=f"{place} {index}",
                expected=expected,
                found=str(flat[at].as_py()),
                remedy="give the ids of the model's tokenizer",
            )
    return _cast(array, pa.list_(pa.int32()), "tokens", f"{place}s from {start}")
