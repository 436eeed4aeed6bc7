"""Open a corpus from files, tables, datasets or dicts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from flexcache.documents.documents import Documents
from flexcache.documents.roles import Roles
from flexcache.documents.sources.csv_source import CSV_NULLS, CsvSource
from flexcache.documents.sources.dataset_source import DatasetSource, check_one_split, is_dataset
from flexcache.documents.sources.file_items import image_items, jsonl_items, text_items
from flexcache.documents.sources.files import FORMATS, FileName, find_files
from flexcache.documents.sources.parquet_source import ParquetSource
from flexcache.documents.sources.record_source import RecordSource, iterable_items
from flexcache.documents.sources.source import DocumentSource
from flexcache.documents.sources.table_source import TableSource, as_table
from flexcache.errors import DocumentsError, nearest


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

    *source* is one of:

    - a path, a list of paths, or a glob: Parquet, JSON Lines or CSV files (the latter two also compressed: .gz, .zst,
      .bz2; a .json file may be one array of objects), or a folder of such files;
    - a folder of .txt files or images: the id is the relative path; images have a label ``folder``;
    - a pyarrow Table or RecordBatchReader, a DataFrame of pandas or Polars, or anything else with an Arrow stream,
      which is read into memory;
    - a Hugging Face Dataset or IterableDataset, or the result of `flexcache.documents.load_dataset`;
    - an iterable of dicts, such as a list or a generator;
    - a `Documents`.

    Files of folders and globs are sorted by name.

    *id*, *text*, *tokens*, *messages* and *image* name columns; None excludes a column from being the input. One
    column is the input. A column with another name than the default comes first. After that come text or tokens; if
    there are both, exclude one. Then come messages: lists of ``{"role", "content"}``, or their JSON text, for the
    tokenizer's chat template. Then come images, as `flexcache.images.encode_image` takes them; a path is relative to
    the file that names it. With *images_first*, as for a vision transformer, an image is the input of all documents
    that have one. Without an id column, the id is the index of the document.

    With labels=None, all other columns are labels. In CSV files, labels are null for the fields among *csv_nulls*.
    Dictionaries, views and run-end-encoded values are stored as plain values, structs without fields as null.

    Parquet and tables are opened without reading them. JSON Lines, CSV and lists are read once, to check them and find
    the types of their labels. For generators and streamed datasets the first *batch_rows* documents decide the types; a
    label that is null in all of them gets its type at its first value.

    Raises
    ------
    DocumentsError
        No such file; an unknown format; no input column, or both text and tokens; an unknown label, or one with a
        reserved name or of a type that a store cannot keep; invalid JSON or UTF-8; an item that is not a dict; texts
        and tokens mixed; a dataset of several splits.

    Examples
    --------
    >>> documents = open_documents([{"id": "a", "text": "A film.", "messages": [{"role": "user", "content": "?"}]}])
    >>> documents.content, documents.labels
    ('text', ('messages',))
    """
    if isinstance(source, Documents):
        return source.with_images_first() if images_first else source
    if batch_rows < 1:
        raise DocumentsError("a batch of no documents", expected="batch_rows of at least 1", found=str(batch_rows))
    if format is not None and format not in FORMATS:
        raise DocumentsError(f"there is no format {format!r}", remedy=nearest(format, tuple(FORMATS)))
    roles = Roles(id, text, tokens, messages, image, images_first)
    if isinstance(labels, str):
        labels = [labels]
    nulls = (csv_nulls,) if isinstance(csv_nulls, str) else tuple(csv_nulls or ())
    opened, roles = _open_source(source, format, roles, batch_rows, labels, nulls)
    return Documents(opened, roles, labels, batch_rows=batch_rows, unique_ids=unique_ids)


def _open_source(
    source: Any,
    format: str | None,
    roles: Roles,
    rows: int,
    labels: Sequence[str] | None,
    csv_nulls: Sequence[str],
) -> tuple[DocumentSource, Roles]:
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
        items = {"jsonl": jsonl_items, "image": image_items, "txt": text_items}[kind]
        return RecordSource(kind, partial(items, files), roles, files=files, rows=rows, labels=labels), roles
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise DocumentsError(
            "not a corpus",
            expected="a path, a DataFrame, a pyarrow Table, a dataset, or an iterable of dicts",
            found=type(source).__name__,
            remedy=_remedy(source, roles),
        )
    once = isinstance(source, Iterator)
    return RecordSource("iterable", partial(iterable_items, source), roles, once=once, rows=rows, labels=labels), roles


def _remedy(source: Any, roles: Roles) -> str | None:
    """Return the source to give in place of a dict: a list for one document, a table for columns."""
    if not isinstance(source, dict):
        return None
    one = any(isinstance(source.get(name), str) for name in (roles.id, roles.text) if name)
    one = one or all(isinstance(token, int) for token in source.get(roles.tokens or "", ["none"]))
    return "for one document, give a list: [document]" if one else "for a dict of columns, give pyarrow.table(columns)"
