"""Some rows of every layer, kept: for what has no mergeable statistic, such as comparing each layer with each."""

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

    Attributes
    ----------
    expected : int
        About how many rows that will be, for the bound on memory.
    """

    expected: int
    sample: DocumentSample | None = None

    def zero(self, features: int) -> State:
        """Return no rows."""
        return {"values": np.empty((0, features), np.float32), "row": np.empty(0, np.int64)}

    def update(self, state: State, block: RowBlock) -> State:
        """Add rows."""
        return self.merge(state, {"values": widen(block.stored), "row": block.rows})

    def merge(self, first: State, second: State) -> State:
        """Return both together."""
        return {name: np.concatenate([first[name], second[name]]) for name in first}

    def result(self, state: State) -> xr.Dataset:
        """Return ``values`` (row, feature), with the row numbers as coordinate."""
        return xr.Dataset({"values": (("row", "feature"), state["values"])}, {"row": state["row"]})

    def state_bytes(self, features: int) -> int:
        """Return about the bytes of all kept rows of a layer."""
        return 4 * features * self.expected

    def describe(self) -> dict[str, Any]:
        """Return what was asked."""
        found: dict[str, Any] = {"statistic": "rows"}
        return found | (asdict(self.sample) if self.sample else {})
