"""What a statistic is: a mergeable value."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import xarray as xr

from analysis.statistics.onepass.row_block import RowBlock
from analysis.statistics.onepass.sample import DocumentSample

State = dict[str, np.ndarray]
"""What was counted of some rows of one layer: plain arrays, so that it travels between processes and is stored."""


class Statistic(ABC):
    """A question whose answer for two sets of rows follows from the answers for each.

    Instances are frozen and small: what is counted lives in states. ``merge(a, b)`` equals one pass over the rows
    of both, up to rounding; the engine merges in a fixed order, so results are the same bits on any number of workers.
    """

    sample: DocumentSample | None = None
    """The documents that are read; all where None."""

    @abstractmethod
    def zero(self, features: int) -> State:
        """Return the state of no rows."""

    @abstractmethod
    def update(self, state: State, block: RowBlock) -> State:
        """Return *state* with the rows of *block* added; it may be changed in place."""

    @abstractmethod
    def merge(self, first: State, second: State) -> State:
        """Return the state of the rows of both; changes neither."""

    @abstractmethod
    def result(self, state: State) -> xr.Dataset:
        """Return the answer for one layer."""

    @abstractmethod
    def state_bytes(self, features: int) -> int:
        """Return about how many bytes one state takes."""

    def describe(self) -> dict[str, Any]:
        """Return what was asked, as plain values, for provenance."""
        return {"statistic": type(self).__name__}


def of_rows(statistic: Statistic, features: int, blocks: list[RowBlock]) -> State:
    """Return the state of several blocks, one after the other."""
    state = statistic.zero(features)
    for block in blocks:
        state = statistic.update(state, block)
    return state
