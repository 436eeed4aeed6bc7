"""Covariance of the features of a site, and class means: the base of PCA, whitening and LEACE."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import xarray as xr

from analysis.statistics.onepass import DocumentSample, Grouping, RowBlock, State, Statistic

ROWS = 65_536
"""Default number of rows for covariances, whose cost per row is the square of the number of features."""


@dataclass(frozen=True, eq=False)
class Covariance(Statistic):
    """Mean and centred Gram matrix of the rows, and the mean of each group.

    >>> rows = np.arange(4)
    >>> block = RowBlock(np.array([[0, 1], [2, 1], [4, 1], [6, 3]], np.float32), rows, rows, rows, rows)
    >>> statistic = Covariance()
    >>> statistic.result(statistic.update(statistic.zero(2), block))["mean"].values.tolist()
    [3.0, 1.5]

    Blocks are centred on their own mean in float64 and combined by Chan, Golub & LeVeque (1979).

    Attributes
    ----------
    sample : DocumentSample, or None
        Sampled documents; a covariance is limited by computation, not by reading.
    groups : Grouping
        Groups whose means are kept too, such as the classes of a label. Rows in no group are ignored.
    """

    sample: DocumentSample | None = None
    groups: Grouping = field(default_factory=Grouping)

    def zero(self, features: int) -> State:
        """Return the state of no rows."""
        return {
            "n": np.zeros((), np.int64),
            "mean": np.zeros(features),
            "gram": np.zeros((features, features)),
            "group_n": np.zeros(self.groups.size, np.int64),
            "group_mean": np.zeros((self.groups.size, features)),
        }

    def update(self, state: State, block: RowBlock) -> State:
        """Return *state* with the rows of *block* added."""
        values = block.float64
        codes = self.groups.codes(block)
        if (codes < 0).any():
            values, codes = values[codes >= 0], codes[codes >= 0]
        if not len(values):
            return state
        mean = values.mean(0)
        centred = values - mean
        new = {"n": np.array(len(values)), "mean": mean, "gram": centred.T @ centred}
        new |= {"group_n": np.bincount(codes, minlength=self.groups.size), "group_mean": mean[None]}
        if self.groups.keys:
            sums = np.zeros((self.groups.size, block.features))
            np.add.at(sums, codes, centred)
            new["group_mean"] = mean + sums / np.maximum(new["group_n"], 1)[:, None]
        return self.merge(state, new)

    def merge(self, first: State, second: State) -> State:
        """Return the state of the rows of both."""
        n_first, n_second = float(first["n"]), float(second["n"])
        n = max(1.0, n_first + n_second)
        delta = second["mean"] - first["mean"] if n_first and n_second else np.zeros_like(first["mean"])
        gram = first["gram"] + second["gram"]
        gram += np.outer(delta, delta * (n_first * n_second / n))
        counts = first["group_n"] + second["group_n"]
        share = (second["group_n"] / np.maximum(counts, 1))[:, None]
        return {
            "n": first["n"] + second["n"],
            "mean": first["mean"] + delta * (n_second / n) if n_first else second["mean"].copy(),
            "gram": gram,
            "group_n": counts,
            "group_mean": first["group_mean"] * (1 - share) + second["group_mean"] * share,
        }

    def result(self, state: State) -> xr.Dataset:
        """Return n, mean, covariance (divided by n - 1), and n and mean of each group."""
        with np.errstate(divide="ignore", invalid="ignore"):
            covariance = state["gram"] / (state["n"] - 1.0)
        found: dict[str, Any] = {
            "n": ((), state["n"]),
            "mean": ("feature", state["mean"]),
            "covariance": (("feature", "other"), covariance),
        }
        if self.groups.keys:
            found["group_n"] = self.groups.unfold(state["group_n"])
            means = np.where(state["group_n"][:, None] > 0, state["group_mean"], np.nan)
            found["group_mean"] = self.groups.unfold(means, "feature")
        return xr.Dataset(found, self.groups.coordinates())

    def state_bytes(self, features: int) -> int:
        """Return the bytes of one state and of another that is merged into it."""
        return 16 * features * (features + 1 + self.groups.size)

    def describe(self) -> dict[str, Any]:
        """Return the arguments as plain values."""
        found: dict[str, Any] = {"statistic": type(self).__name__.lower(), "by": self.groups.describe()}
        if self.sample is not None:
            found |= asdict(self.sample)
        return found
