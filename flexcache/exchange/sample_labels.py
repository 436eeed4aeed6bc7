"""Labels and loss masks of an engine's samples, from the dataset of prompts that the engine was given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flexcache.errors import DamagedError, MismatchError
from flexcache.exchange.engine_samples import Sample, SampleFile, SampleProblem
from flexcache.store.format.text import TABLE_COLUMNS

TOKENS = ("token_ids", "input_ids", "tokens")
MASK = "loss_mask"


class SampleLabels:
    """Labels of samples, one line of a table for each; without a table, no labels.

    The line of a sample named ``hs_7`` or ``data_7`` is 7, as in the dataset of speculators; other samples are in the
    order of the table.

    Raises
    ------
    MismatchError
        The table has another number of lines than there are samples, or no line of a sample's number.
    DamagedError
        The table cannot be read.
    """

    def __init__(self, path: Path | None, files: Sequence[SampleFile]) -> None:
        self._table = None if path is None else _read_table(path)
        self._lines: list[int] = []
        if self._table is None:
            return
        numbers = [file.number for file in files]
        known = [number for number in numbers if number is not None]
        self._lines = known if len(known) == len(files) else list(range(len(files)))
        if max(self._lines) >= len(self._table) or (not known and len(files) != len(self._table)):
            raise MismatchError(
                "the documents are not those of the samples",
                where=str(path),
                expected=f"line {max(self._lines)}, and one line a sample" if known else f"{len(files)} lines",
                found=f"{len(self._table)} lines",
            )

    def check_sample(self, number: int, sample: Sample) -> np.ndarray | None:
        """Return the loss mask of a sample, its own or that of the table, or None if neither has one.

        SampleProblem if the table has other token ids, or another loss mask, than the sample.
        """
        if self._table is None:
            return sample.mask
        line = f"line {self._lines[number]} of the documents"
        for name in TOKENS:
            if name in self._table.column_names and not np.array_equal(self._numbers(name, number), sample.tokens):
                raise SampleProblem(f"other token ids than in {line}")
        if MASK not in self._table.column_names:
            return sample.mask
        mask = self._numbers(MASK, number).astype(np.int8)
        if len(mask) != len(sample.tokens):
            raise SampleProblem(f"{len(sample.tokens)} token ids, but {len(mask)} mask values in {line}")
        if sample.mask is not None and not np.array_equal(mask, sample.mask):
            raise SampleProblem(f"another loss mask than in {line}")
        return mask

    def add_to(self, documents: pa.Table) -> pa.Table:
        """Return the documents with the other columns of the table as labels; the ids stay those of the samples."""
        if self._table is None:
            return documents
        for name in self._table.column_names:
            if name not in (*TOKENS, MASK, *TABLE_COLUMNS, *documents.column_names):
                documents = documents.append_column(name, self._table.column(name).take(pa.array(self._lines)))
        return documents

    def _numbers(self, name: str, number: int) -> np.ndarray:
        assert self._table is not None
        value = self._table.column(name)[self._lines[number]].values
        return np.zeros(0, np.int64) if value is None else np.asarray(value)


def _read_table(path: Path) -> pa.Table:
    """Read a Parquet file, or the Arrow files of a folder that Hugging Face datasets saved, which are mapped."""
    try:
        if not path.is_dir():
            return pq.read_table(path)
        files = sorted(path.glob("data-*.arrow"))
        if not files:
            raise FileNotFoundError(f"{path} holds no data-*.arrow")
        return pa.concat_tables([pa.ipc.open_stream(pa.memory_map(str(file))).read_all() for file in files])
    except (OSError, pa.ArrowException) as error:
        raise DamagedError(
            "the documents cannot be read",
            where=str(path),
            expected="a Parquet file, or a folder saved by datasets",
            found=str(error),
        ) from error
