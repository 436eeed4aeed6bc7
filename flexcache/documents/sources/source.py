"""The interface of a source of documents, and the files of a corpus."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from flexcache.documents.roles import Roles


@dataclass(frozen=True)
class CorpusFile:
    """A file of a corpus: its path, and its name relative to the corpus, which is all that a store keeps."""

    path: Path
    name: str


Item = tuple[str, Any]
"""The place of a document, for errors, and the document."""
LocatedBatch = tuple[int, str, pa.RecordBatch]
"""The index of the first document of a batch, the place of the batch, and the batch."""


class DocumentSource(ABC):
    """Documents as record batches in corpus order, of which at most a few are in memory.

    Attributes
    ----------
    kind : str
    schema : pyarrow.Schema
        The columns of the documents.
    count : int or None
        The number of documents, if it is known without reading them.
    files : sequence of CorpusFile
    """

    kind: str
    schema: pa.Schema
    count: int | None
    files: Sequence[CorpusFile] = ()

    @property
    def described(self) -> pa.Schema:
        """The columns that identify the corpus, in the types that every version has described them with."""
        return self.schema

    @property
    def details(self) -> dict[str, Any]:
        """More values that identify the corpus, as JSON-able values."""
        return {}

    def with_roles(self, roles: Roles) -> DocumentSource:
        """Return the same documents with other roles of their columns."""
        return self

    @abstractmethod
    def read_batches(self, columns: list[str], rows: int) -> Iterator[tuple[str, pa.RecordBatch]]:
        """Yield (place, batch) in corpus order, at most *rows* documents at a time, with *columns*."""

    def read_runs(self, columns: list[str], rows: int, runs: Sequence[range]) -> Iterator[LocatedBatch]:
        """Yield the documents of *runs*, sorted and disjoint ranges of the corpus; reading ends after the last."""
        for first, where, batch in self._locate_batches(columns, rows, runs):
            if first >= runs[-1].stop:
                return
            for run in runs:
                low, high = max(run.start, first), min(run.stop, first + batch.num_rows)
                if low < high:
                    yield low, where, batch.slice(low - first, high - low)

    def folder_of(self, where: str) -> Path | None:
        """Return the folder of the file that *where* names, which paths in it are relative to; None for no file."""
        named = [file for file in self.files if where == file.name or where.startswith(f"{file.name}, ")]
        return max(named, key=lambda file: len(file.name)).path.parent if named else None

    def _locate_batches(self, columns: list[str], rows: int, runs: Sequence[range]) -> Iterator[LocatedBatch]:
        """Yield batches that cover *runs*; batches without any of their documents may be left out."""
        first = 0
        for where, batch in self.read_batches(columns, rows):
            yield first, where, batch
            first += batch.num_rows
