"""Measure the error of stored rows, or estimate it from the scales of int8."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.dataset.store_argument import accept_store_path
from flexcache.errors import UncommittedError
from flexcache.store.format.int8 import default_outliers, outlier_count, scale_name
from flexcache.store.read.selection import select
from flexcache.store.read.store import Store

SAMPLE_BYTES = 8 << 20

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Loss:
    """Error of a codec on the sampled rows of one layer.

    >>> Loss("resid_post", 12, mean=0.001, largest=0.01, others=0.02, cosine=0.9999, spread=8.0).largest
    0.01

    Attributes
    ----------
    mean, largest : float
        Mean and maximum of ‖x − x̂‖ ÷ ‖x‖ over the rows; infinite if a value overflows.
    others : float
        Mean of the same without the largest values of each row, as many as int8 keeps exactly (one in 128).
    cosine : float
        Smallest cosine between a row and the decoded row.
    spread : float
        Largest magnitude of a row ÷ its median magnitude, as a median over the rows: the range that one scale covers.
    """

    site: str
    layer: int | None
    mean: float
    largest: float
    others: float
    cosine: float
    spread: float


@accept_store_path
def estimate_losses(
    store: Store,
    sites: Sequence[str] | None = None,
    layers: Any = "all",
    *,
    sample_bytes: int = SAMPLE_BYTES,
    seed: int = 0,
) -> list[Loss]:
    """Return the error of rows that are stored as int8, estimated from their scales.

    ::

        codecs.estimate_losses(store)[0].others

    A rounding error is taken as uniform over a step, with the mean square step² ÷ 12, and as orthogonal to its row, so
    that the values before rounding are not needed.

    Raises
    ------
    UncommittedError, SiteError
        As for `compare`.
    """
    random = np.random.default_rng(seed)
    losses = []
    for name, layer in stored_keys(store, sites, layers, coarse=True):
        rows = sample_rows(store, name, sample_bytes, random)
        values = np.sort(np.abs(store.read(name, layer, rows)).astype(np.float64), axis=1)
        step = store.read(scale_name(name), layer, rows, raw=True)[:, 0].astype(np.float64) / np.sqrt(12)
        rounded, others = (values[:, : -count or None] for count in (outlier_count(name, store.arrays), _count(values)))
        error, apart = (
            step * np.sqrt(part.shape[1]) / np.maximum(np.linalg.norm(whole, axis=1), 1e-30)
            for part, whole in ((rounded, values), (others, others))
        )
        cosine = float(1 / np.sqrt(1 + error.max() ** 2))
        losses.append(
            Loss(name, layer, float(error.mean()), float(error.max()), float(apart.mean()), cosine, _spread(values))
        )
    return losses


def stored_keys(store: Store, sites: Sequence[str] | None, layers: Any, coarse: bool) -> list[tuple[str, int | None]]:
    """Return the layers of the sites that are stored as int8, or of the others."""
    if not len(store.committed_units):
        raise UncommittedError("no unit is committed, so there is nothing to encode", where=str(store.path))
    names = set(store.sites)
    chosen = [array for array in select(store, sites, layers) if array.name in names]
    return [(array.name, layer) for array in chosen if (array.dtype == "int8") == coarse for layer in array.slices]


def sample_rows(store: Store, name: str, size: int, random: np.random.Generator) -> slice:
    """Return consecutive rows of a random committed unit that take about *size* bytes."""
    reader = store.reader(name)
    held = reader.layout.rows(int(random.choice(store.committed_units)))
    count = min(len(held), max(1, size // reader.layout.row_bytes))
    start = held.start + int(random.integers(0, len(held) - count + 1))
    return slice(start, start + count)


def measure_loss(name: str, layer: int | None, exact: Floats, back: Floats) -> Loss:
    """Return the error of decoded rows, both float32 of shape (rows, features)."""
    magnitude = np.abs(exact)
    spread = _spread(magnitude)
    if not np.isfinite(back).all():
        return Loss(name, layer, float("inf"), float("inf"), float("inf"), 0.0, spread)
    wide = exact.astype(np.float64)
    norm = np.linalg.norm(wide, axis=1)
    other = np.linalg.norm(back.astype(np.float64), axis=1)
    apart = _relative(wide - back, wide)
    cosine = (wide * back).sum(axis=1) / np.maximum(norm * other, 1e-30)
    count = _count(wide)
    places = np.argpartition(-magnitude, count - 1, axis=1)[:, :count]
    error = wide - back
    for values in (error, wide):
        np.put_along_axis(values, places, 0, axis=1)
    others = _relative(error, wide)
    return Loss(name, layer, float(apart.mean()), float(apart.max()), float(others.mean()), float(cosine.min()), spread)


def _count(rows: NDArray[Any]) -> int:
    return default_outliers(rows.shape[1])


def _spread(magnitude: NDArray[Any]) -> float:
    return float(np.median(magnitude.max(axis=1) / np.maximum(np.median(magnitude, axis=1), 1e-30)))


def _relative(error: NDArray[np.float64], rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.linalg.norm(error, axis=1) / np.maximum(np.linalg.norm(rows, axis=1), 1e-30))
