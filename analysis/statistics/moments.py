"""Mean, variance, skew, kurtosis, extremes and norms of every feature, by groups of rows, in one read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr

from analysis.dataset.store_argument import accept_store_path
from analysis.statistics.onepass import Grouping, RowBlock, State, Statistic, grouping, read
from flexcache.errors import AnalysisError
from flexcache.site import Layers
from flexcache.spec import listed
from flexcache.store.read.store import Store

SUMS = ("mean", "m2", "m3", "m4")


@dataclass(frozen=True, eq=False)
class Moments(Statistic):
    """Central moments up to *order* of every feature and of the row norms, per group of rows.

    >>> rows = np.arange(4)
    >>> block = RowBlock(np.array([[0, 1], [2, 1], [4, 1], [6, 3]], np.float32), rows, rows, rows, rows)
    >>> statistic = Moments(order=2)
    >>> statistic.result(statistic.update(statistic.zero(2), block))["mean"].values.tolist()
    [3.0, 1.5]

    Each block is centred on its own mean in float64 before powers are computed, and blocks are combined by the formulas
    of Pébay (2008, Sandia report SAND2008-6212), so that a large mean does not cancel and a huge value does not
    overflow.

    Attributes
    ----------
    groups : Grouping
    order : int
        2 for mean and variance alone, which is twice as fast; 4 adds skew, kurtosis, extremes and norms.
    """

    groups: Grouping = field(default_factory=Grouping)
    order: int = 4

    def __post_init__(self) -> None:
        if self.order not in (2, 4):
            raise AnalysisError("moments are of order 2 or 4", found=str(self.order))

    def zero(self, features: int) -> State:
        """Return the state of no rows; in order 4, the last column of every array is the norm of the rows."""
        shape = (self.groups.size, features + int(self.order == 4))
        state = {name: np.zeros(shape) for name in SUMS[: self.order]}
        if self.order == 4:
            state |= {"min": np.full(shape, np.inf), "max": np.full(shape, -np.inf)}
        return {"n": np.zeros(self.groups.size, np.int64), **state}

    def update(self, state: State, block: RowBlock) -> State:
        """Return *state* with the rows of *block* added; rows in no group are ignored."""
        if not self.groups.keys:
            _add(state, slice(0, 1), self._one(block) if self.order == 4 else _two_moments(block))
            return state
        codes = self.groups.codes(block)
        for place, values in block.float64_pieces():
            inside = np.flatnonzero(codes[place] >= 0)
            order = inside[np.argsort(codes[place][inside], kind="stable")]
            if len(order):
                present, starts, counts = np.unique(codes[place][order], return_index=True, return_counts=True)
                _add(state, present, self._several(values[order], starts, counts))
        return state

    def merge(self, first: State, second: State) -> State:
        """Return the state of the rows of both."""
        total = {name: values.copy() for name, values in first.items()}
        _add(total, slice(None), second)
        return total

    def result(self, state: State) -> xr.Dataset:
        """Return n, mean, variance; in order 4 also skew, kurtosis, min, max, and norm_ of mean, variance, min, max.

        The variance is divided by n - 1; skew and kurtosis are those of the sample (``scipy.stats.skew`` and
        ``kurtosis`` with ``bias=True``; kurtosis is 0 for a Gaussian). NaN if a group has too few rows or no spread.
        """
        groups, n = self.groups, state["n"].astype(np.float64)[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            empty = n == 0
            found = {
                "mean": np.where(empty, np.nan, state["mean"]),
                "variance": np.where(n > 1, state["m2"] / (n - 1), np.nan),
            }
            if self.order == 4:
                spread = state["m2"] / n
                found["skew"] = (state["m3"] / n) / spread**1.5
                found["kurtosis"] = (state["m4"] / n) / spread**2 - 3
                found |= {name: np.where(empty, np.nan, state[name]) for name in ("min", "max")}
        last = -1 if self.order == 4 else None
        data = {name: groups.unfold(values[:, :last], "feature") for name, values in found.items()}
        norms = ("mean", "variance", "min", "max") if self.order == 4 else ()
        data |= {f"norm_{name}": groups.unfold(found[name][:, -1]) for name in norms}
        return xr.Dataset({"n": groups.unfold(state["n"]), **data}, groups.coordinates())

    def state_bytes(self, features: int) -> int:
        """Return the bytes of one state."""
        return self.groups.size * (features + 1) * 8 * (self.order + 2)

    def describe(self) -> dict[str, Any]:
        """Return the arguments as plain values."""
        return {"statistic": "moments", "by": self.groups.describe(), "order": self.order}

    def _one(self, block: RowBlock) -> State:
        """Return the state of a block as one group, shapes (1, features + 1): first the mean, then powers around it."""
        low, high = np.full(block.features, np.inf), np.full(block.features, -np.inf)
        total, norms = np.zeros(block.features), np.empty(len(block))
        for place, values in block.float64_pieces():
            np.minimum(low, values.min(0), out=low)
            np.maximum(high, values.max(0), out=high)
            total += values.sum(0)
            norms[place] = np.sqrt(np.einsum("ij,ij->i", values, values))
        mean, norm = total / len(block), norms.mean()
        ends = {"min": _append_norm(low, norms.min()), "max": _append_norm(high, norms.max())}
        sums = {name: np.zeros(block.features) for name in SUMS[1 : self.order]}
        for _, values in block.float64_pieces():
            values -= mean
            square = values * values
            sums["m2"] += square.sum(0)
            sums["m3"] += np.einsum("ij,ij->j", square, values)
            sums["m4"] += np.einsum("ij,ij->j", square, square)
        norms -= norm
        powers = {name: _append_norm(sums[name], (norms**power).sum()) for power, name in enumerate(sums, 2)}
        found = {"mean": _append_norm(mean, norm), **powers, **ends}
        return {"n": np.array([len(block)]), **{name: values[None] for name, values in found.items()}}

    def _several(self, values: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> State:
        """Return the state of rows that are sorted by group, shapes (groups, features + 1)."""
        state = {"n": counts}
        if self.order == 4:
            norms = np.sqrt(np.einsum("ij,ij->i", values, values))
            values = np.concatenate([values, norms[:, None]], axis=1)
            state |= {"min": np.minimum.reduceat(values, starts), "max": np.maximum.reduceat(values, starts)}
        state["mean"] = np.add.reduceat(values, starts) / counts[:, None]
        values -= np.repeat(state["mean"], counts, axis=0)
        power = values * values
        state["m2"] = np.add.reduceat(power, starts)
        for name in SUMS[2 : self.order]:
            power *= values
            state[name] = np.add.reduceat(power, starts)
        return state


@accept_store_path
def compute(
    store: Store,
    site: str,
    *,
    by: str | Sequence[str] = ("layer",),
    layers: Layers = "all",
    order: int = 4,
    positions: Sequence[int] | None = None,
    token_types: Any = None,
    scheduler: Any = "threads",
    workers: int | None = None,
    progress: bool = True,
) -> xr.Dataset:
    """Return the moments of a site.

    ::

        moments.compute(store, "resid_post", by=["layer", "position"])["norm_mean"]

    Parameters
    ----------
    by
        ``layer``, ``position``, ``token_id``, ``token_type``, columns of the documents; see
        `analysis.statistics.onepass.grouping`. Without ``layer``, the rows of all layers are pooled.
    order
        2 computes mean and variance alone, which is faster.
    scheduler, workers, progress
        See `analysis.statistics.onepass.read`.

    Returns
    -------
    Dataset with dims (layer, *by*, feature)
        See `Moments.result`.

    Raises
    ------
    AnalysisError
        The store does not have the site, layer or column, or the groups would not fit into memory.
    """
    by = listed(by, str, "by")
    groups = grouping(store, by, positions=positions, token_types=token_types)
    found = read(
        store,
        site,
        {"moments": Moments(groups, order)},
        layers=layers,
        scheduler=scheduler,
        workers=workers,
        progress=progress,
    )
    return found["moments"] if "layer" in by else found.merged("moments")


def _two_moments(block: RowBlock) -> State:
    """Return mean and m2 of a block as one group, in one pass around the mean of its first piece.

    The piece is a sixteenth of a full block, so the term that cancels is at most sixteen times the result.
    """
    pivot: np.ndarray | None = None
    first, second = np.zeros(block.features), np.zeros(block.features)
    for _, values in block.float64_pieces():
        pivot = values.mean(0) if pivot is None else pivot
        values -= pivot
        first += values.sum(0)
        second += np.einsum("ij,ij->j", values, values)
    assert pivot is not None
    n = len(block)
    m2 = np.maximum(second - first * first / n, 0.0)
    return {"n": np.array([n]), "mean": (pivot + first / n)[None], "m2": m2[None]}


def _append_norm(values: np.ndarray, norm: float | np.floating) -> np.ndarray:
    return np.append(values, norm)


def _add(state: State, at: Any, new: State) -> None:
    """Add the groups *new* to the groups *at* of *state*, in place."""
    old_n, new_n = state["n"][at].astype(np.float64)[:, None], new["n"].astype(np.float64)[:, None]
    n = old_n + new_n
    share = np.divide(new_n, n, out=np.zeros_like(n), where=n > 0)
    rest = 1.0 - share
    delta = np.where(new_n > 0, np.where(old_n > 0, new["mean"] - state["mean"][at], 0.0), 0.0)
    m2, m2_new = state["m2"][at], new["m2"]
    if "m4" in state:
        m3, m3_new = state["m3"][at], new["m3"]
        both = old_n * share  # n_a n_b / n
        state["m4"][at] += new["m4"] + (
            delta**4 * both * (rest * rest - rest * share + share * share)
            + 6.0 * delta**2 * (rest * rest * m2_new + share * share * m2)
            + 4.0 * delta * (rest * m3_new - share * m3)
        )
        state["m3"][at] = m3 + m3_new + delta**3 * both * (rest - share) + 3.0 * delta * (rest * m2_new - share * m2)
    state["m2"][at] = m2 + m2_new + delta**2 * (old_n * share)
    state["mean"][at] = np.where(old_n > 0, state["mean"][at] + delta * share, new["mean"])
    if "min" in state:
        state["min"][at] = np.minimum(state["min"][at], new["min"])
        state["max"][at] = np.maximum(state["max"][at], new["max"])
    state["n"][at] += new["n"]
