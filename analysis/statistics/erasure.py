"""LEACE: an affine map after which no linear predictor can tell a concept, and that changes as little as possible."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr

from analysis.dataset.opens_store import opens_store
from analysis.statistics.covariance import Covariance
from analysis.statistics.onepass import DocumentSample, State, grouping, read
from flexcache.errors import AnalysisError
from flexcache.site import Layers
from flexcache.store.read.store import Store


@dataclass(frozen=True, eq=False)
class LEACE(Covariance):
    """Erasers of the classes of ``groups``, from the covariance and the class means alone.

    Least-squares concept erasure of Belrose et al. (2023, arXiv 2306.03819): r(x) = x - W⁺ P W (x - mean), with
    W the symmetric whitening and P the projection onto the whitened cross-covariance with the classes. Its
    guarantee, that the covariance with every class is 0 and no linear predictor beats a constant, is for the rows
    it was fitted to. No singular value is rounded away but those at the precision of float64.
    """

    precision: float = field(default=1e-10)

    def result(self, state: State) -> xr.Dataset:
        """Return mean, and left and right factors (feature, direction): r(x) = x - left @ (rightᵀ (x - mean))."""
        n, counts = int(state["n"]), state["group_n"]
        if (counts > 0).sum() < 2:
            raise AnalysisError(
                "there is nothing to erase",
                expected="rows of at least two classes",
                found=f"{n} rows of {int((counts > 0).sum())}",
            )
        share = counts / n
        cross = ((state["group_mean"] - state["mean"]) * share[:, None]).T  # cov(x, one-hot class), (feature, class)
        values, vectors = np.linalg.eigh(state["gram"] / n)
        full = values > max(values[-1], 0.0) * self.precision * 1e-4
        vectors, root = vectors[:, full], np.sqrt(values[full])
        whitened = (vectors / root) @ (vectors.T @ cross)
        left, sizes, _ = np.linalg.svd(whitened, full_matrices=False)
        kept = sizes > sizes[0] * self.precision if sizes[0] > 0 else np.zeros(len(sizes), bool)
        basis = np.where(kept, left, 0.0)  # as many directions for every layer; what is not needed is 0
        turned = vectors.T @ basis
        return xr.Dataset(
            {
                "n": ((), n),
                "mean": ("feature", state["mean"]),
                "left": (("feature", "direction"), (vectors * root) @ turned),
                "right": (("feature", "direction"), (vectors / root) @ turned),
                "rank": ((), int(kept.sum())),
            }
        )


@opens_store
def leace(
    store: Store,
    site: str,
    target: str,
    *,
    rows: int | None = None,
    seed: int = 0,
    layers: Layers = "all",
    token_types: Any = None,
    **where: Any,
) -> xr.Dataset:
    """Return an eraser of a label for every layer, to be used by `erase`.

    Parameters
    ----------
    target
        A column of the documents, ``token_type``, ``token_id`` or ``position``; rows without a value are left out.
    rows
        About how many rows to fit it to, whole documents of a seeded sample; None for all.
    where
        scheduler, workers and progress, see `analysis.statistics.onepass.read`.
    """
    sample = DocumentSample.of_rows(rows, store.n_rows, seed)
    statistic = LEACE(sample, grouping(store, [target], token_types=token_types))
    found = read(store, site, {"leace": statistic}, layers=layers, **where)["leace"]
    return found.assign_attrs(site=site, target=target, store=str(store.path))


def erase(values: np.ndarray, found: xr.Dataset) -> np.ndarray:
    """Return rows of one layer without the concept.

    Parameters
    ----------
    values : ndarray of shape (rows, features)
    found
        One layer of what `leace` returned: ``found.sel(layer=12)``.
    """
    values = np.asarray(values, np.float64)
    return np.asarray(values - (values - found["mean"].values) @ found["right"].values @ found["left"].values.T)
