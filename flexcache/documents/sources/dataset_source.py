"""Documents of a dataset of the Hugging Face library, in memory or streamed."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flexcache.documents.arrow_types import has_null_type, stored_array, stored_type
from flexcache.documents.sources.source import DocumentSource
from flexcache.errors import ConfigError, DocumentsError


class DatasetSource(DocumentSource):
    """A ``datasets.Dataset`` or ``IterableDataset``, read in Arrow batches, a few at a time.

    A column of class labels, such as ``label``, keeps its numbers; a column ``label_name`` with their names is added.

    Parameters
    ----------
    about
        Name, configuration, split and revision; empty for a dataset that was made in this process.
    rows
        Documents of a stream that are read to find the types that its features leave open.
    labels
        The labels that are kept, or None for all columns; then a column that appears later is an error.

    Raises
    ------
    DocumentsError
        It has several splits or a transform, or cannot be read.
    """

    kind = "dataset"

    def __init__(
        self,
        dataset: Any,
        about: dict[str, Any] | None = None,
        rows: int = 1024,
        labels: Sequence[str] | None = None,
    ) -> None:
        check_one_split(dataset)
        _check_no_transform(dataset)
        self._all = labels is None
        self._dataset, self.about = dataset, about or {}
        self.count: int | None = len(dataset) if hasattr(dataset, "__len__") else None
        self._features: dict[str, Any] = dict(dataset.features or {})
        self._data = self._schema(rows)
        columns: list[tuple[str, pa.DataType]] = []
        self._names: dict[str, tuple[str, list[str]]] = {}
        for field in self._data:
            columns.append((field.name, field.type))
            names = class_names(self._features.get(field.name))
            if names is not None and (added := f"{field.name}_name") not in self._data.names:
                self._names[added] = field.name, names
                columns.append((added, name_classes(pa.nulls(0, field.type), names).type))
        self.schema = pa.schema(columns)

    @property
    def described(self) -> pa.Schema:
        """The columns of the dataset, without the names of its classes."""
        return self._data

    @property
    def details(self) -> dict[str, Any]:
        """Name, configuration, split and revision, as ``dataset``."""
        return {"dataset": self.about}

    def read_batches(self, columns: list[str], rows: int) -> Iterator[tuple[str, pa.RecordBatch]]:
        """Yield (place, batch); see `DocumentSource`."""
        needed = list(dict.fromkeys(self._names[name][0] if name in self._names else name for name in columns))
        dataset = self._dataset.select_columns(needed) if self._features else self._dataset
        whole = self._all and not self._features and set(columns).issuperset(self.schema.names)
        for table in self._tables(dataset, rows, None if whole else needed):
            if whole and (late := [name for name in table.column_names if name not in needed]):
                raise DocumentsError(
                    f"column {late[0]!r} is missing in the first documents",
                    where=self.about.get("name", "the dataset"),
                    expected=", ".join(needed),
                    remedy="state the features of the dataset, or choose the labels:"
                    " flexcache.open_documents(…, labels=[…])",
                )
            missing = [name for name in needed if name not in table.column_names]
            for name in missing:
                table = table.append_column(name, pa.nulls(len(table), stored_type(self.schema.field(name).type)))
            for batch in table.combine_chunks().to_batches():
                arrays = [
                    name_classes(batch.column(self._names[name][0]), self._names[name][1])
                    if name in self._names
                    else batch.column(name)
                    for name in columns
                ]
                yield self.about.get("name", "the dataset"), pa.RecordBatch.from_arrays(arrays, columns)

    def _schema(self, rows: int) -> pa.Schema:
        stated = self._dataset.features.arrow_schema.remove_metadata() if self._features else pa.schema([])
        if self.count is not None:
            return stated
        first = next(self._tables(self._dataset, rows), None)
        if first is None:
            return stated
        types = {field.name: field.type for field in first.schema}
        for field in stated:  # a label may be null in all of the first documents
            if has_null_type(types.get(field.name, pa.null())):
                types[field.name] = field.type
        return pa.schema(list(types.items()))

    def _tables(self, dataset: Any, rows: int, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Yield up to *rows* documents at a time, with those of *columns* that they have.

        The library raises an error for a batch of a stream in which a value is null in one document and not in another.
        Such documents are read one at a time, and joined here.
        """
        done = 0
        tables = iter(dataset.with_format("arrow").iter(batch_size=rows))
        while True:
            try:
                table = next(tables, None)
            except pa.ArrowException:
                break
            except Exception as error:  # the library and its file systems raise many types
                raise self._unreadable(error) from error
            if table is None:
                return
            done += len(table)
            yield _with(table, columns)
        singles = iter((dataset.skip(done) if done else dataset).with_format("arrow").iter(batch_size=1))
        while True:
            try:
                held = [_with(table, columns) for table in itertools.islice(singles, rows)]
                table = pa.concat_tables(held, promote_options="permissive") if held else None
            except Exception as error:
                raise self._unreadable(error) from error
            if table is None:
                return
            yield table

    def _unreadable(self, error: Exception) -> DocumentsError:
        return DocumentsError(
            "the dataset cannot be read",
            where=self.about.get("name"),
            found=_first_line(error),
            remedy="check that it can be iterated; for a generator, state its features=datasets.Features(…)",
        )


def _with(table: pa.Table, columns: Sequence[str] | None) -> pa.Table:
    return table if columns is None else table.select([name for name in columns if name in table.column_names])


def is_dataset(source: Any) -> bool:
    """Return True for a dataset of the library, or several splits of one, without importing the library."""
    return type(source).__module__.partition(".")[0] == "datasets" and hasattr(source, "select_columns")


def check_one_split(source: Any) -> None:
    """Raise DocumentsError if *source* is a mapping of datasets, such as the splits of one."""
    if isinstance(source, Mapping) and (is_dataset(source) or any(map(is_dataset, source.values()))):
        names = list(map(str, source))
        raise DocumentsError(
            "a dataset with several splits, where one is needed",
            expected="one of its splits",
            found=", ".join(names) or "no split",
            remedy=f"give one, as in documents[{names[0]!r}] or load_dataset(…, split={names[0]!r})" if names else None,
        )


def _check_no_transform(dataset: Any) -> None:
    """Raise DocumentsError if a dataset has a transform, which its Arrow batches do not contain."""
    told = getattr(dataset, "format", None) or {}
    if told.get("type") == "custom":
        raise DocumentsError(
            "the dataset has a transform, which is not applied to its stored documents",
            expected="a dataset without set_transform or with_transform",
            found=f"the transform {told.get('format_kwargs', {}).get('transform')!r}",
            remedy="apply it with dataset.map(…, batched=True); or give dataset.with_format(None) to ignore it",
        )


def class_names(feature: Any) -> list[str] | None:
    """Return the class names of a feature, or of the elements of a list feature; None for other features."""
    while True:
        if isinstance(feature, list) and feature:
            feature = feature[0]
        elif getattr(feature, "feature", None) is not None:
            feature = feature.feature
        else:
            break
    names = getattr(feature, "names", None)
    return list(map(str, names)) if type(feature).__name__ == "ClassLabel" and names else None


def name_classes(numbers: pa.Array, names: list[str]) -> pa.Array:
    """Return the names of class numbers, or lists of names for lists; null for a number without name, such as -1.

    >>> name_classes(pa.array([1, -1, 0]), ["no", "yes"]).to_pylist()
    ['yes', None, 'no']
    """
    numbers = stored_array(numbers)
    if pa.types.is_integer(numbers.type):
        known = pc.and_(pc.greater_equal(numbers, 0), pc.less(numbers, len(names)))
        places = pc.if_else(known, numbers.cast(pa.int64()), pa.scalar(None, pa.int64()))
        return pa.array(names, pa.string()).take(places)
    if pa.types.is_null(numbers.type):
        return pa.nulls(len(numbers), pa.string())
    lengths = pc.fill_null(pc.list_value_length(numbers), 0).to_numpy()
    offsets = pa.array(np.append(0, np.cumsum(lengths)).astype(np.int32))
    return pa.ListArray.from_arrays(offsets, name_classes(numbers.flatten(), names), mask=numbers.is_null())


def load_dataset(
    name: str,
    *,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    streaming: bool = False,
) -> DatasetSource:
    """Open a dataset by its name on the hub, or a folder of data files.

    Parameters
    ----------
    config
        Name of one of its configurations.
    split
        Name of a split, or a part of one, such as ``"train[:1000]"``, unless it is streamed.
    streaming
        Read the dataset over the network, without downloading it first.

    Raises
    ------
    ConfigError
        The library is not installed.
    DocumentsError
        There is no such dataset, configuration or split.

    Examples
    --------
    ::

        documents = load_dataset("stanfordnlp/imdb", split="test")
        flexcache.capture(model, tokenizer, documents, "imdb.zarr")
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            "a dataset by name needs the library datasets",
            found=str(error),
            remedy="pip install flexcache-activations[datasets]",
        ) from error
    try:
        found = datasets.load_dataset(
            os.path.expanduser(name), config, split=split, revision=revision, streaming=streaming
        )
    except Exception as error:  # the library raises many types
        raise DocumentsError(
            f"dataset {name!r} cannot be opened",
            where=", ".join(f"{key} {value}" for key, value in (("config", config), ("split", split)) if value),
            found=_first_line(error),
            remedy="check the name, the configuration and the split",
        ) from error
    about = {"name": name, "config": config, "split": split, "revision": revision}
    return DatasetSource(found, {key: value for key, value in about.items() if value is not None})


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
