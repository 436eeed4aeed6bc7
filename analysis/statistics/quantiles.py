"""Quantiles and histograms of every feature, from mergeable counts of values by their leading bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from analysis.dataset.store_argument import accept_store_path
from analysis.statistics.onepass import DocumentSample, RowBlock, State, Statistic, read
from analysis.statistics.onepass.row_block import widen
from flexcache.errors import AnalysisError
from flexcache.site import Layers
from flexcache.store.read.store import Store

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
BITS = 12


@dataclass(frozen=True, eq=False)
class Histogram(Statistic):
    """Counts of the values of every feature, by the leading *bits* of their float32.

    ::

        onepass.read(store, "mlp_post", {"quantiles": Histogram((0.5, 0.99))})["quantiles"]["value"]

    The bits are sign, exponent and ``bits - 9`` of the mantissa, so the width of a bin is ``2^(9 - bits)`` of its
    value: 12 bits resolve values to 12.5 %, and quantiles, given as the middle of a bin, to 6.25 %. 16 bits are all
    bits of a bfloat16, so results are exact. Extremes are always exact.

    Attributes
    ----------
    quantiles : tuple of float
        Quantiles from 0 to 1.
    bits : int
        Number of leading bits, from 10 to 16.
    """

    quantiles: tuple[float, ...] = QUANTILES
    bits: int = BITS
    sample: DocumentSample | None = None

    def __post_init__(self) -> None:
        if not 10 <= self.bits <= 16:
            raise AnalysisError("values are counted by 10 to 16 bits", found=str(self.bits))
        if not self.quantiles or not all(0 <= q <= 1 for q in self.quantiles):
            raise AnalysisError("quantiles lie from 0 to 1", found=str(list(self.quantiles)))

    def zero(self, features: int) -> State:
        """Return the state of no rows."""
        ends = {"min": np.full(features, np.inf), "max": np.full(features, -np.inf)}
        return {"n": np.zeros((), np.int64), "counts": np.zeros((features, 1 << self.bits), np.int64), **ends}

    def update(self, state: State, block: RowBlock) -> State:
        """Return *state* with the rows of *block* added."""
        values = widen(block.stored) + np.float32(0)  # -0 and 0 are one value
        state["n"] = state["n"] + len(block)
        state["min"] = np.minimum(state["min"], values.min(0))
        state["max"] = np.maximum(state["max"], values.max(0))
        columns = np.ascontiguousarray(self._order(values).T)
        for counts, column in zip(state["counts"], columns):
            counts += np.bincount(column, minlength=len(counts))
        return state

    def merge(self, first: State, second: State) -> State:
        """Return the state of the rows of both."""
        return {
            "n": first["n"] + second["n"],
            "counts": first["counts"] + second["counts"],
            "min": np.minimum(first["min"], second["min"]),
            "max": np.maximum(first["max"], second["max"]),
        }

    def result(self, state: State) -> xr.Dataset:
        """Return the quantiles, and a histogram by powers of two.

        ``value`` (quantile, feature): the smallest value that at least that share of the rows do not exceed, as
        ``numpy.quantile(method="inverted_cdf")``, to within ``error`` times its magnitude; ``low`` and ``high`` are the
        ends of its bin. ``count`` (bin, feature): number of values between ``bin_low`` and ``bin_high``, signed powers
        of two; a bin includes its end towards 0. ``below`` (magnitude, feature): share of magnitudes below
        2^magnitude.
        """
        n, counts = int(state["n"]), state["counts"]
        edges = self.edges()
        total = counts.cumsum(1)
        rank = np.maximum(1, np.ceil(np.array(self.quantiles) * n)).astype(np.int64)
        place = np.stack([(total < r).sum(1) for r in rank])
        low = np.clip(edges[place], state["min"], state["max"])
        high = np.clip(edges[place + 1], state["min"], state["max"])
        inner = np.where(
            place < len(edges) // 2, high, low
        )  # the end towards 0 is the value whose remaining bits are 0
        middle = inner if self.bits == 16 else (low + high) / 2
        for i, q in enumerate(self.quantiles):
            middle[i] = state["min"] if q == 0 else state["max"] if q == 1 else middle[i]
        powers = np.arange(-24, 17)
        starts = np.abs(np.minimum(np.abs(edges[:-1]), np.abs(edges[1:])))
        below = np.stack([counts[:, starts < 2.0**p].sum(1) for p in powers]) / max(n, 1)
        ends = np.concatenate([[-np.inf], -(2.0 ** powers[::-1]), 2.0**powers, [np.inf]])
        first = np.searchsorted(edges[:-1], ends[:-1])  # every end is the lower edge of a bin
        first[0] = 0
        return xr.Dataset(
            {
                "n": ((), n),
                "count": (("bin", "feature"), np.add.reduceat(counts, first, axis=1).T),
                "value": (("quantile", "feature"), middle),
                "low": (("quantile", "feature"), low),
                "high": (("quantile", "feature"), high),
                "below": (("magnitude", "feature"), below),
                "error": ((), self.error),
            },
            {
                "quantile": list(self.quantiles),
                "magnitude": powers,
                "bin_low": ("bin", ends[:-1]),
                "bin_high": ("bin", ends[1:]),
            },
        )

    @property
    def error(self) -> float:
        """Largest relative error of a quantile; 0 for 16 bits, which are all bits of a bfloat16."""
        return 0.0 if self.bits == 16 else 2.0 ** (8 - self.bits)

    def edges(self) -> np.ndarray:
        """Return the ends of the bins in ascending order, float64, one more than there are bins."""
        half = 1 << (self.bits - 1)
        ends = (np.arange(half + 1, dtype=np.uint64) << np.uint64(32 - self.bits)).astype(np.uint32)
        finite = np.uint32(0x7F7FFFFF)
        magnitude = np.minimum(ends, finite).view(np.float32).astype(np.float64)
        return np.concatenate([-magnitude[:0:-1], magnitude])

    def state_bytes(self, features: int) -> int:
        """Return the bytes of one state."""
        return 8 * (features << self.bits)

    def describe(self) -> dict[str, Any]:
        """Return the arguments as plain values."""
        return {"statistic": "quantiles", "quantiles": list(self.quantiles), "bits": self.bits}

    def _order(self, values: np.ndarray) -> np.ndarray:
        """Return the bin of each value; bins are in the order of the values."""
        bits = np.ascontiguousarray(values).view(np.int32)
        half = 1 << (self.bits - 1)
        magnitude = (bits & 0x7FFFFFFF) >> (32 - self.bits)
        return np.where(bits < 0, half - 1 - magnitude, half + magnitude)


@accept_store_path
def compute(
    store: Store,
    site: str,
    quantiles: Sequence[float] = QUANTILES,
    *,
    exact: bool = False,
    bits: int = BITS,
    rows: int | None = None,
    seed: int = 0,
    layers: Layers = "all",
    **where: Any,
) -> xr.Dataset:
    """Return quantiles of every feature and layer.

    ::

        quantiles.compute(store, "mlp_post", [0.5, 0.99])["value"]

    (``dask.array.percentile`` averages the quantiles of chunks, which is not a quantile: dask issue 3099.)

    Parameters
    ----------
    exact
        Count all 16 bits of a bfloat16, which is exact and takes 512 KiB per feature. For wider dtypes, the rows of one
        layer at a time are sorted in memory.
    rows
        Approximate number of rows, whole documents of a seeded sample; None means all.
    where
        scheduler, workers and progress; see `analysis.statistics.onepass.read`.

    Returns
    -------
    Dataset with dims (layer, quantile, feature); see `Histogram.result`
    """
    sample = DocumentSample.of_rows(rows, store.n_rows, seed)
    wide = exact and site in store.sites and store.arrays[site].dtype != "bfloat16"
    statistic: Statistic = Histogram(tuple(quantiles), 16 if exact else bits, sample)
    if wide:
        statistic = Sorted(tuple(quantiles), store.n_rows, sample)
    return read(store, site, {"quantiles": statistic}, layers=layers, **where)["quantiles"]


@dataclass(frozen=True, eq=False)
class Sorted(Statistic):
    """Exact quantiles of values wider than 16 bits, from all rows of a layer in memory, float32.

    ::

        onepass.read(store, "mlp_post", {"median": Sorted((0.5,), store.n_rows)})["median"]["value"]

    Attributes
    ----------
    quantiles : tuple of float
    n_rows : int
        Rows of a layer, for the bound on memory.
    """

    quantiles: tuple[float, ...]
    n_rows: int
    sample: DocumentSample | None = None

    def zero(self, features: int) -> State:
        """Return the state of no rows."""
        return {"values": np.empty((0, features), np.float32)}

    def update(self, state: State, block: RowBlock) -> State:
        """Return *state* with the rows of *block* added."""
        return {"values": np.concatenate([state["values"], widen(block.stored)])}

    def merge(self, first: State, second: State) -> State:
        """Return the state of the rows of both."""
        return {"values": np.concatenate([first["values"], second["values"]])}

    def result(self, state: State) -> xr.Dataset:
        """Return n and the quantiles, by ``numpy.quantile(method="inverted_cdf")``."""
        values = np.quantile(state["values"], self.quantiles, axis=0, method="inverted_cdf").astype(np.float64)
        names = ("value", "low", "high")
        data = dict.fromkeys(names, (("quantile", "feature"), values))
        return xr.Dataset(
            {"n": ((), len(state["values"])), **data, "error": ((), 0.0)}, {"quantile": list(self.quantiles)}
        )

    def state_bytes(self, features: int) -> int:
        """Return the bytes of all rows of a layer."""
        return 4 * features * self.n_rows
