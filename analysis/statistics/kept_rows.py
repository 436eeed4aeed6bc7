"""Keep some rows of every layer, for comparisons that have no mergeable statistic."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import xarray as xr

from analysis.statistics.onepass import DocumentSample, RowBlock, State, Statistic
from analysis.statistics.onepass.row_block import widen


@dataclass(frozen=True, eq=False)
class Rows(Statistic):
    """The rows of a seeded sample of documents, as float32, in row order.

    ::

        sample = onepass.DocumentSample.of_rows(1000, store.n_rows)
        onepass.read(store, "resid_post", {"rows": Rows(1000, sample)})["rows"]["values"]

    Attributes
    ----------
    expected : int
        Approximate number of rows, for the bound on memory.
    """

    expected: int
    sample: DocumentSample | None = None

    def zero(self, features: int) -> State:
        """Return the state of no rows."""
        return {"values": np.empty((0, features), np.float32), "row": np.empty(0, np.int64)}

    def update(self, state: State, block: RowBlock) -> State:
        """Return *state* with the rows of *block* added."""
        return self.merge(state, {"values": widen(block.stored), "row": block.rows})

    def merge(self, first: State, second: State) -> State:
        """Return the state of the rows of both."""
        return {name: np.concatenate([first[name], second[name]]) for name in first}

    def result(self, state: State) -> xr.Dataset:
        """Return ``values`` (row, feature), with row numbers as coordinate."""
        return xr.Dataset({"values": (("row", "feature"), state["values"])}, {"row": state["row"]})

    def state_bytes(self, features: int) -> int:
        """Return the approximate bytes of the kept rows of a layer."""
        return 4 * features * self.expected

    def describe(self) -> dict[str, Any]:
        """Return the arguments as plain values."""
        found: dict[str, Any] = {"statistic": "rows"}
        return found | (asdict(self.sample) if self.sample else {})


@dataclass(frozen=True, eq=False)
class PairedRows(Rows):
    """The rows of a seeded sample of documents in two stores that are read together.

    ::

        onepass.read(store, "resid_post", {"rows": PairedRows(1000, sample, other_features=64)}, other=other)

    Attributes
    ----------
    other_features : int
        Number of features in the other store.
    """

    other_features: int = 0

    def zero(self, features: int) -> State:
        """Return the state of no rows."""
        return {**super().zero(features), "other": np.empty((0, self.other_features), np.float32)}

    def update(self, state: State, block: RowBlock) -> State:
        """Return *state* with the rows of *block* added."""
        assert block.other is not None
        new = {"values": widen(block.stored), "row": block.rows, "other": widen(block.other)}
        return self.merge(state, new)

    def state_bytes(self, features: int) -> int:
        """Return the approximate bytes of the kept rows of a layer."""
        return super().state_bytes(features + self.other_features)
