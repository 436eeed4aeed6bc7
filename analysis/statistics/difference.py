"""Measure how far the rows of one store are from the same rows of another: relative error and cosine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from analysis.statistics.onepass import RowBlock, State, Statistic
from analysis.statistics.onepass.row_block import widen
from analysis.statistics.quantiles import Histogram

HISTOGRAM = Histogram((0.5, 0.99), bits=16)
"""Counts of the error of rows, and of their distance by cosine."""
SUMS = ("rows", "equal", "difference", "square", "apart")


@dataclass(frozen=True, eq=False)
class Difference(Statistic):
    """Relative error and cosine of rows in two stores that are read together.

    ::

        onepass.read(store, "resid_post", {"difference": Difference()}, other=align_stores(store, other))["difference"]
    """

    def zero(self, features: int) -> State:
        """Return the state of no rows."""
        largest = {"largest": np.full((), -np.inf), "row": np.full((), -1, np.int64)}
        return {**HISTOGRAM.zero(2), **{name: np.zeros(()) for name in SUMS}, **largest}

    def update(self, state: State, block: RowBlock) -> State:
        """Return *state* with the rows of *block* added."""
        assert block.other is not None
        away, norm, other, apart = np.empty((4, len(block)))
        for place, one in block.float64_pieces():
            two = widen(block.other[place]).astype(np.float64)
            norm[place], other[place], away[place] = (_norms(values) for values in (one, two, one - two))
            with np.errstate(divide="ignore", invalid="ignore"):
                one /= norm[place, None]
                one -= two / other[place, None]
            apart[place] = _norms(one) ** 2 / 2  # 1 − cosine, accurate also where it is tiny
        known = (norm > 0) & (other > 0)
        error, apart, row = away[known] / norm[known], apart[known], block.rows[known]
        if len(row):
            found = np.stack([error, apart], axis=1).astype(np.float32)
            state |= HISTOGRAM.update({name: state[name] for name in HISTOGRAM.zero(2)}, RowBlock(found, *[row] * 4))
            if (top := error.argmax()) >= 0 and error[top] > state["largest"]:
                state |= {"largest": np.array(error[top]), "row": np.array(row[top])}
        sums = (len(block), (away == 0).sum(), (away**2).sum(), (norm**2).sum(), apart.sum())
        return state | {name: state[name] + value for name, value in zip(SUMS, sums, strict=True)}

    def merge(self, first: State, second: State) -> State:
        """Return the state of the rows of both."""
        top = first if first["largest"] >= second["largest"] else second
        sums = {name: first[name] + second[name] for name in SUMS}
        return {**HISTOGRAM.merge(first, second), **sums, "largest": top["largest"], "row": top["row"]}

    def result(self, state: State) -> xr.Dataset:
        """Return the distances of the rows.

        - ``error``: norm of the difference of the two matrices ÷ norm of the first, over all rows.
        - ``error_median``, ``error_high``: median and 99 % quantile over rows of ‖a − b‖ ÷ ‖a‖, to within 0.8 % of
          itself; ``error_largest`` is the largest, at ``row``.
        - ``cosine``: mean cosine of the rows; ``cosine_low`` is the 1 % quantile.
        - ``n``, ``equal``, ``zero``: number of rows, of equal rows, and of rows that are 0 in either store, which have
          neither a relative error nor a cosine and are left out of both. NaN if no row is left.
        """
        n, known = int(state["rows"]), int(state["n"])
        found: dict[str, Any] = dict.fromkeys(
            ("error", "error_median", "error_high", "error_largest", "cosine", "cosine_low"), np.nan
        )
        if state["square"] > 0:
            found["error"] = float(np.sqrt(state["difference"] / state["square"]))
        if known:
            (median, _), (high, apart) = HISTOGRAM.result(state)["value"].values
            found |= {"error_median": median, "error_high": high, "error_largest": float(state["largest"])}
            found |= {"cosine": 1 - float(state["apart"]) / known, "cosine_low": 1 - apart}
        whole = {"n": n, "equal": int(state["equal"]), "zero": n - known, "row": int(state["row"])}
        return xr.Dataset(found | whole)

    def state_bytes(self, features: int) -> int:
        """Return the approximate bytes of one state."""
        return HISTOGRAM.state_bytes(2)


def _norms(values: np.ndarray) -> np.ndarray:
    return np.sqrt(np.einsum("ij,ij->i", values, values))
