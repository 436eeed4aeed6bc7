"""Outliers: massive activations, rogue dims and the share of the cosine they carry, dead and always-on neurons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from analysis.dataset.opens_store import opens_store
from analysis.statistics.onepass import RowBlock, State, Statistic, read
from analysis.statistics.quantiles import Histogram
from flexcache.errors import AnalysisError
from flexcache.site import Layers
from flexcache.store.read.store import Store

MASSIVE = 100.0
TIMES_MEDIAN = 1000.0
PARTS = np.array(["first", "rest"])


@dataclass(frozen=True, eq=False)
class Extremes(Statistic):
    """The largest magnitudes of every dim and where they are, and how much each dim adds to cosines.

    The first token of documents, position 0, is kept apart from the rest: its activations are of another kind.

    Attributes
    ----------
    largest : int
        How many magnitudes of each dim are kept, with their rows.
    """

    largest: int = 4

    def zero(self, features: int) -> State:
        """Return no rows."""
        shape = (len(PARTS), self.largest, features)
        return {
            "n": np.zeros(len(PARTS), np.int64),
            "value": np.zeros(shape),
            "row": np.full(shape, -1, np.int64),
            "unit": np.zeros((len(PARTS), features)),
            "unit_square": np.zeros((len(PARTS), features)),
            "nonzero": np.zeros((len(PARTS), features), np.int64),
            "positive": np.zeros((len(PARTS), features), np.int64),
        }

    def update(self, state: State, block: RowBlock) -> State:
        """Add rows."""
        for part, chosen in enumerate((block.position == 0, block.position != 0)):
            if not chosen.any():
                continue
            rows = block.rows[chosen]
            values = block.float64[chosen]
            state["n"][part] += len(values)
            state["nonzero"][part] += (values != 0).sum(0)
            state["positive"][part] += (values > 0).sum(0)
            count = min(self.largest, len(values))
            top = np.argpartition(-np.abs(values), count - 1, axis=0)[:count]
            self._keep(state, part, np.take_along_axis(values, top, 0), rows[top])
            norms = np.sqrt(np.einsum("ij,ij->i", values, values))
            units = values / np.where(norms > 0, norms, 1)[:, None]
            state["unit"][part] += units.sum(0)
            state["unit_square"][part] += np.einsum("ij,ij->j", units, units)
        return state

    def merge(self, first: State, second: State) -> State:
        """Return both together."""
        total = {name: values.copy() for name, values in first.items()}
        for part in range(len(PARTS)):
            self._keep(total, part, second["value"][part], second["row"][part])
        for name in ("n", "unit", "unit_square", "nonzero", "positive"):
            total[name] += second[name]
        return total

    def result(self, state: State) -> xr.Dataset:
        """Return, by ``part`` (first token or rest), what is largest and who carries the cosine.

        ``value`` and ``row`` (part, rank, feature): the largest magnitudes, signed; row -1 where there are fewer rows.
        ``cosine`` (part): mean cosine of two different rows (Ethayarajh 2019). ``cosine_part`` (part, feature): what
        each dim adds to it; ``rogue`` is the dim that adds most and ``rogue_share`` its share (Timkey & van Schijndel
        2021). ``nonzero``, ``positive`` (part, feature): shares of the rows.
        """
        n = state["n"].astype(np.float64)[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            parts = (state["unit"] ** 2 - state["unit_square"]) / (n * (n - 1))
            cosine = parts.sum(1)
            rogue = np.where(n[:, 0] > 1, parts.argmax(1), -1)
            share = parts.max(1) / cosine
            nonzero, positive = state["nonzero"] / n, state["positive"] / n
        per_dim = ("part", "feature")
        return xr.Dataset(
            {
                "n": ("part", state["n"]),
                "value": (("part", "rank", "feature"), state["value"]),
                "row": (("part", "rank", "feature"), state["row"]),
                "cosine": ("part", cosine),
                "cosine_part": (per_dim, parts),
                "rogue": ("part", rogue),
                "rogue_share": ("part", share),
                "nonzero": (per_dim, nonzero),
                "positive": (per_dim, positive),
            },
            {"part": PARTS},
        )

    def state_bytes(self, features: int) -> int:
        """Return the bytes of a state."""
        return len(PARTS) * features * 8 * (2 * self.largest + 4)

    def describe(self) -> dict[str, Any]:
        """Return what was asked."""
        return {"statistic": "outliers", "largest": self.largest}

    def _keep(self, state: State, part: int, values: np.ndarray, rows: np.ndarray) -> None:
        """Keep the largest magnitudes of each dim, of equals the lower row."""
        values = np.concatenate([state["value"][part], values])
        rows = np.concatenate([state["row"][part], rows])
        missing = rows < 0
        order = np.lexsort((rows, -np.abs(values), missing), axis=0)[: self.largest]
        state["value"][part] = np.take_along_axis(values, order, 0)
        state["row"][part] = np.take_along_axis(rows, order, 0)


@opens_store
def compute(
    store: Store, site: str, *, largest: int = 4, active: float = 0.01, layers: Layers = "all", **where: Any
) -> xr.Dataset:
    """Return massive activations, rogue dims, and dead and always-on dims of every layer.

    Parameters
    ----------
    largest
        How many of the largest magnitudes of each dim are kept.
    active
        A dim is active in a row where its magnitude is above this share of the median, over dims, of how large dims
        get (their 99 % quantile of magnitude).
    where
        scheduler, workers and progress, see `analysis.statistics.onepass.read`.

    Returns
    -------
    Dataset
        See `Extremes.result` and `judged`.
    """
    statistics: dict[str, Statistic] = {"outliers": Extremes(largest), "quantiles": Histogram()}
    found = read(store, site, statistics, layers=layers, **where)
    return judged(found["outliers"], found["quantiles"], active)


def judged(extremes: xr.Dataset, quantiles: xr.Dataset, active: float = 0.01) -> xr.Dataset:
    """Return *extremes* with what the distribution of magnitudes says about them.

    ``median`` (layer): of all magnitudes, to within a factor of two. ``massive`` (layer, part, rank, feature): a
    magnitude of more than 100 that is more than 1,000 times the median (Sun et al. 2024, arXiv 2402.17762).
    ``activity`` (layer, feature): share of rows in which a dim is active, the threshold rounded to a power of two;
    ``dead`` where it is 0 and ``always_on`` where it is above 0.99. These are meant
    for neurons after a non-linearity, ``mlp_post``.

    Raises
    ------
    AnalysisError
        The quantiles are of other layers.
    """
    if not np.array_equal(extremes["layer"], quantiles["layer"]) or "below" not in quantiles:
        raise AnalysisError("extremes and quantiles are not of the same layers", remedy="compute both in one read")
    power = quantiles["magnitude"].values.astype(np.float64)
    below = quantiles["below"].values  # (layer, magnitude, feature)
    pooled = below.mean(2)
    median = np.array([2.0 ** np.interp(0.5, row, power) for row in pooled])
    massive = np.abs(extremes["value"]) > np.maximum(MASSIVE, TIMES_MEDIAN * median)[:, None, None, None]
    reach = power[(below < 0.99).sum(1).clip(0, len(power) - 1)]  # (layer, feature): log2 of the 99 % quantile
    at = np.floor(np.median(reach, axis=1) + np.log2(active)).clip(power[0], power[-1]) - power[0]
    activity = 1 - below[np.arange(len(below)), at.astype(np.int64)]
    return extremes.assign(
        median=("layer", median),
        massive=massive,
        activity=(("layer", "feature"), activity),
        dead=(("layer", "feature"), activity == 0),
        always_on=(("layer", "feature"), activity > 0.99),
    )


def massive(found: xr.Dataset, store: Store) -> list[dict[str, Any]]:
    """Return the massive activations of all layers, largest first: layer, dim, value, row, document id, position."""
    places = np.argwhere(found["massive"].values)
    values, rows = found["value"].values, found["row"].values
    document, position = (store.coordinates[name].values for name in ("document", "position"))
    ids = store.documents["id"]
    lines = []
    for layer, part, rank, feature in places.tolist():
        row = int(rows[layer, part, rank, feature])
        lines.append(
            {
                "layer": int(found["layer"].values[layer]),
                "dim": feature,
                "value": float(values[layer, part, rank, feature]),
                "row": row,
                "document": ids[int(document[row])].as_py(),
                "position": int(position[row]),
            }
        )
    return sorted(lines, key=lambda line: -abs(float(line["value"])))
