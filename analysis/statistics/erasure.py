"""LEACE: the affine map of least change after which no linear predictor finds a concept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from analysis.dataset.store_argument import accept_store_path
from analysis.statistics.covariance import Covariance
from analysis.statistics.onepass import DocumentSample, State, grouping, read
from flexcache.errors import AnalysisError
from flexcache.site import Layers
from flexcache.store.read.store import Store

PRECISION = 1e-10
"""Singular values below this share of the largest are rounding errors of float64."""


@dataclass(frozen=True, eq=False)
class LEACE(Covariance):
    """LEACE erasers of the classes of ``groups``, from the covariance and the class means alone; see `fit_eraser`.

    ::

        groups = onepass.grouping(store, ["label"])
        onepass.read(store, "resid_post", {"leace": LEACE(groups=groups)})["leace"]
    """

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
        left, right = fit_eraser(state["gram"] / n, cross)
        empty = np.zeros((len(left), min(cross.shape) - left.shape[1]))  # as many directions in every layer
        return xr.Dataset(
            {
                "n": ((), n),
                "mean": ("feature", state["mean"]),
                "left": (("feature", "direction"), np.hstack([left, empty])),
                "right": (("feature", "direction"), np.hstack([right, empty])),
                "rank": ((), left.shape[1]),
            }
        )


@accept_store_path
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
    """Return an eraser of a label for every layer, for `erase`.

    ::

        eraser = erasure.leace(store, "resid_post", "label")
        erasure.erase(store.read("resid_post", 12), eraser.sel(layer=12))

    Parameters
    ----------
    target
        A column of the documents, ``token_type``, ``token_id`` or ``position``; rows without a value are ignored.
    rows
        Approximate number of rows to fit to, whole documents of a seeded sample; None means all.
    where
        scheduler, workers and progress; see `analysis.statistics.onepass.read`.
    """
    sample = DocumentSample.of_rows(rows, store.n_rows, seed)
    statistic = LEACE(sample, grouping(store, [target], token_types=token_types))
    found = read(store, site, {"leace": statistic}, layers=layers, **where)["leace"]
    return found.assign_attrs(site=site, target=target, store=str(store.path))


def erase(values: np.ndarray, found: xr.Dataset) -> np.ndarray:
    """Return rows of one layer without the concept.

    ::

        clean = erasure.erase(store.read("resid_post", 12), eraser.sel(layer=12))

    Parameters
    ----------
    values : ndarray of shape (rows, features)
    found
        One layer of the result of `leace`: ``found.sel(layer=12)``.
    """
    mean, left, right = (found[name].values for name in ("mean", "left", "right"))
    return np.asarray(apply_eraser(np.asarray(values, np.float64), mean, left, right))


def fit_eraser(covariance: np.ndarray, cross: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the factors *left* and *right* of a LEACE eraser, both of shape (features, k); see `apply_eraser`.

    Least-squares concept erasure of Belrose et al. (2023, arXiv 2306.03819): r(x) = x - W⁺ P W (x - mean), with W the
    whitening and P the projection onto the whitened cross-covariance with the concept. On the rows of the fit, the
    covariance of the erased activations with the concept is 0, so that no linear predictor beats a constant.
    Directions without variance are left as they are.

    Parameters
    ----------
    covariance : ndarray of shape (features, features)
    cross : ndarray of shape (features, concepts)
        Covariance of the activations with the concepts, such as one-hot classes.
    """
    values, vectors = np.linalg.eigh(covariance)
    kept = values > max(values[-1], 0.0) * len(values) * np.finfo(np.float64).eps
    root, vectors = np.sqrt(values[kept]), vectors[:, kept]
    basis, sizes, _ = np.linalg.svd((vectors / root).T @ cross, full_matrices=False)
    basis = basis[:, sizes > sizes.max(initial=0.0) * PRECISION]
    return (vectors * root) @ basis, (vectors / root) @ basis


def apply_eraser(values: Any, mean: Any, left: Any, right: Any) -> Any:
    """Return rows of arrays or tensors without the concept of an eraser, shape (rows, features)."""
    return values - ((values - mean) @ right) @ left.T
