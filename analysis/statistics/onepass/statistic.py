"""Base of statistics that are mergeable values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import xarray as xr

from analysis.statistics.onepass.row_block import RowBlock
from analysis.statistics.onepass.sample import DocumentSample

State = dict[str, np.ndarray]
"""Intermediate values for some rows of one layer, as plain arrays that can be sent and stored."""


class Statistic(ABC):
    """A statistic whose state for two sets of rows follows from the states for each.

    Instances are frozen and small; intermediate values live in states. ``merge(a, b)`` equals one pass over the rows of
    both, up to rounding. The engine merges in a fixed order, so results have the same bits on any number of workers.

    ::

        state = statistic.update(statistic.zero(features=768), block)
        statistic.result(statistic.merge(state, other))
    """

    sample: DocumentSample | None = None
    """Documents that are read; None means all."""

    @abstractmethod
    def zero(self, features: int) -> State:
        """Return the state of no rows."""

    @abstractmethod
    def update(self, state: State, block: RowBlock) -> State:
        """Return *state* with the rows of *block* added; *state* may be changed in place."""

    @abstractmethod
    def merge(self, first: State, second: State) -> State:
        """Return the state of the rows of both, and change neither."""

    @abstractmethod
    def result(self, state: State) -> xr.Dataset:
        """Return the result for one layer."""

    @abstractmethod
    def state_bytes(self, features: int) -> int:
        """Return the approximate bytes of one state."""

    def describe(self) -> dict[str, Any]:
        """Return the arguments as plain values, for provenance."""
        return {"statistic": type(self).__name__}


def state_of_blocks(statistic: Statistic, features: int, blocks: list[RowBlock]) -> State:
    """Return the state of several blocks, added one after another."""
    state = statistic.zero(features)
    for block in blocks:
        state = statistic.update(state, block)
    return state
