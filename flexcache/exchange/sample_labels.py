"""Labels and loss masks of an engine's samples, from the dataset of prompts that the engine was given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flexcache.errors import DamagedError, MismatchError
from flexcache.exchange.engine_samples import SampleFile, SampleProblem
from flexcache.store.format.text import TABLE_COLUMNS

TOKENS = ("token_ids", "input_ids", "tokens")
MASK = "loss_mask"


class SampleLabels:
    """The line of a table for each sample; without a table, no labels.

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

    def check_sample(self, number: int, tokens: np.ndarray) -> np.ndarray | None:
        """Return the loss mask of a sample, if the table has one; raise SampleProblem if its tokens differ."""
        if self._table is None:
            return None
        for name in TOKENS:
            if name in self._table.column_names:
                own = self._numbers(name, number)
                if not np.array_equal(own, tokens):
                    raise SampleProblem(f"other token ids than in line {self._lines[number]} of the documents")
        if MASK not in self._table.column_names:
            return None
        mask = self._numbers(MASK, number).astype(np.int8)
        if len(mask) != len(tokens):
            raise SampleProblem(f"{len(tokens)} token ids, but {len(mask)} mask values in the documents")
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
            "the documents cannot be read", where=str(path), expected="a Parquet file, or a folder saved by datasets",
            found=str(error),
        ) from error  # fmt: skip
