"""Datasets of the Hugging Face library: by name or as they are, in memory or streamed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from flexcache.documents.sources import CorpusFile, OfFiles
from flexcache.errors import ConfigError, DocumentsError


class DatasetSource(OfFiles):
    """A ``datasets.Dataset`` or ``IterableDataset``, read in Arrow batches, a few at a time.

    Parameters
    ----------
    about
        What identifies it: name, configuration, split, revision. Of one that was made in this process, nothing does.
    """

    kind = "dataset"

    def __init__(self, dataset: Any, about: dict[str, Any] | None = None) -> None:
        self._dataset, self.about = dataset, about or {}
        self.count: int | None = len(dataset) if hasattr(dataset, "__len__") else None
        self.files: list[CorpusFile] = []
        if self.count is not None:
            self.schema = dataset.features.arrow_schema.remove_metadata()
            return
        first = next(self._tables(dataset, 1), None)
        self.schema = pa.schema([]) if first is None else first.schema.remove_metadata()

    def read(self, columns: list[str], rows: int) -> Iterator[tuple[str, pa.RecordBatch]]:
        """Yield (where, batch); see `flexcache.documents.sources.Source`."""
        for table in self._tables(self._dataset.select_columns(columns), rows):
            for batch in table.select(columns).combine_chunks().to_batches():
                yield self.about.get("name", "the dataset"), batch

    def _tables(self, dataset: Any, rows: int) -> Iterator[pa.Table]:
        tables = iter(dataset.with_format("arrow").iter(batch_size=rows))
        while True:
            try:
                table = next(tables, None)
            except Exception as error:  # the library and its file systems raise many kinds
                raise DocumentsError(
                    "the dataset cannot be read", where=self.about.get("name"), found=_first_line(error)
                ) from error
            if table is None:
                return
            yield table


def is_dataset(source: Any) -> bool:
    """Whether *source* is one of the library's datasets, without importing it."""
    return type(source).__module__.partition(".")[0] == "datasets" and hasattr(source, "select_columns")


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
        The name of one of its configurations.
    split
        Also a part of one, such as ``"train[:1000]"``, where it is not streamed.
    streaming
        Read it as it comes, without loading it to the disk first.

    Raises
    ------
    ConfigError
        The library is not installed.
    DocumentsError
        There is no such dataset, configuration or split.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            "datasets by name need the library of that name",
            found=str(error),
            remedy="pip install flexcache-activations[datasets]",
        ) from error
    try:
        found = datasets.load_dataset(name, config, split=split, revision=revision, streaming=streaming)
    except Exception as error:  # the library raises many kinds
        raise DocumentsError(
            f"dataset {name!r} cannot be opened",
            where=", ".join(f"{key} {value}" for key, value in (("config", config), ("split", split)) if value),
            found=_first_line(error),
            remedy="check the name, the configuration and the split",
        ) from error
    about = {"name": name, "config": config, "split": split, "revision": revision}
    return DatasetSource(found, {key: value for key, value in about.items() if value is not None})


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
