"""Outliers: massive activations, rogue features with their share of cosines, dead and always-on neurons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from analysis.dataset.store_argument import accept_store_path
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
    """Largest magnitudes of every feature with their rows, and the contribution of each feature to cosines.

    ::

        onepass.read(store, "resid_post", {"outliers": Extremes(largest=8)})["outliers"]["value"]

    The first token of documents, position 0, is separate from the rest, because its activations are of another kind.

    Attributes
    ----------
    largest : int
        Number of magnitudes kept for each feature, with their rows.
    """

    largest: int = 4

    def zero(self, features: int) -> State:
        """Return the state of no rows."""
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
        """Return *state* with the rows of *block* added."""
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
            self._keep_largest(state, part, np.take_along_axis(values, top, 0), rows[top])
            norms = np.sqrt(np.einsum("ij,ij->i", values, values))
            units = values / np.where(norms > 0, norms, 1)[:, None]
            state["unit"][part] += units.sum(0)
            state["unit_square"][part] += np.einsum("ij,ij->j", units, units)
        return state

    def merge(self, first: State, second: State) -> State:
        """Return the state of the rows of both."""
        total = {name: values.copy() for name, values in first.items()}
        for part in range(len(PARTS)):
            self._keep_largest(total, part, second["value"][part], second["row"][part])
        for name in ("n", "unit", "unit_square", "nonzero", "positive"):
            total[name] += second[name]
        return total

    def result(self, state: State) -> xr.Dataset:
        """Return largest values and contributions to the cosine, by ``part`` (first token or rest).

        ``value`` and ``row`` (part, rank, feature): the largest magnitudes, signed; row -1 if there are fewer rows.
        ``cosine`` (part): mean cosine of two different rows (Ethayarajh 2019). ``cosine_part`` (part, feature): the
        contribution of each feature; ``rogue`` is the feature with the largest one and ``rogue_share`` its share
        (Timkey & van Schijndel 2021). ``nonzero``, ``positive`` (part, feature): shares of the rows.
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
        """Return the bytes of one state."""
        return len(PARTS) * features * 8 * (2 * self.largest + 4)

    def describe(self) -> dict[str, Any]:
        """Return the arguments as plain values."""
        return {"statistic": "outliers", "largest": self.largest}

    def _keep_largest(self, state: State, part: int, values: np.ndarray, rows: np.ndarray) -> None:
        """Keep the largest magnitudes of each feature; of equal ones, the lower row."""
        values = np.concatenate([state["value"][part], values])
        rows = np.concatenate([state["row"][part], rows])
        missing = rows < 0
        order = np.lexsort((rows, -np.abs(values), missing), axis=0)[: self.largest]
        state["value"][part] = np.take_along_axis(values, order, 0)
        state["row"][part] = np.take_along_axis(rows, order, 0)


@accept_store_path
def compute(
    store: Store, site: str, *, largest: int = 4, active: float = 0.01, layers: Layers = "all", **where: Any
) -> xr.Dataset:
    """Return massive activations, rogue features, and dead and always-on features of every layer.

    ::

        found = outliers.compute(store, "mlp_post")
        found["dead"].sum("feature")

    Parameters
    ----------
    largest
        Number of magnitudes kept for each feature.
    active
        A feature is active in a row if its magnitude is above this share of a typical large magnitude: the median over
        features of their 99 % quantile.
    where
        scheduler, workers and progress; see `analysis.statistics.onepass.read`.

    Returns
    -------
    Dataset
        See `Extremes.result` and `judged`.
    """
    statistics: dict[str, Statistic] = {"outliers": Extremes(largest), "quantiles": Histogram()}
    found = read(store, site, statistics, layers=layers, **where)
    return judged(found["outliers"], found["quantiles"], active)


def judged(extremes: xr.Dataset, quantiles: xr.Dataset, active: float = 0.01) -> xr.Dataset:
    """Return *extremes* with massive, dead and always-on features, judged by the distribution of magnitudes.

    ::

        found = onepass.read(store, "mlp_post", {"outliers": Extremes(), "quantiles": Histogram()})
        outliers.judged(found["outliers"], found["quantiles"])

    ``median`` (layer): median of all magnitudes, to within a factor of two. ``massive`` (layer, part, rank, feature): a
    magnitude of more than 100 that is more than 1,000 times the median (Sun et al. 2024, arXiv 2402.17762).
    ``activity`` (layer, feature): share of rows in which a feature is active, with the threshold rounded to a power of
    two; ``dead`` if it is 0 and ``always_on`` if it is above 0.99. These are meant for neurons after a non-linearity,
    ``mlp_post``.

    Raises
    ------
    AnalysisError
        Extremes and quantiles are of different layers.
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
    """Return the massive activations of all layers, largest first.

    ::

        outliers.massive(outliers.compute(store, "resid_post"), store)[0]["position"]

    Each is a dict with layer, dim, value, row, document id and position.
    """
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
