"""Spectra, effective rank, principal components, whitening and projections of activations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr

import flexcache
from analysis.dataset.store_argument import accept_store_path
from analysis.statistics.covariance import ROWS, Covariance
from analysis.statistics.onepass import DocumentSample, State, read
from flexcache.errors import AnalysisError
from flexcache.site import Layers
from flexcache.store.format.text import TABLE_COLUMNS
from flexcache.store.read.row_alignment import rows_in
from flexcache.store.read.store import Store


@dataclass(frozen=True, eq=False)
class PCA(Covariance):
    """Principal components from the covariance in one read; an SVD would need all rows in memory.

    ::

        found = onepass.read(store, "resid_post", {"pca": PCA(components=16)})["pca"]
        found["variance"], found["direction"]

    Attributes
    ----------
    components : int, or None
        Number of directions to keep; the spectrum is always complete.
    """

    components: int | None = None

    def result(self, state: State) -> xr.Dataset:
        """Return spectrum and directions of one layer.

        ``variance`` (component): eigenvalues, descending, divided by n - 1. ``share``: their share of the sum.
        ``direction`` (kept, feature): orthonormal, the largest entry of each positive. ``effective_rank``: exp of the
        entropy of the shares (Roy & Vetterli 2007). ``participation_ratio``: (Σλ)² / Σλ². ``mean`` (feature) and ``n``.
        """
        n = int(state["n"])
        if n < 2:
            raise AnalysisError("principal components need two rows", found=f"{n}", remedy="sample more documents")
        values, vectors = np.linalg.eigh(state["gram"] / (n - 1))
        values, vectors = np.clip(values[::-1], 0.0, None), vectors[:, ::-1].T
        vectors = vectors[: self.components]
        vectors = vectors * np.sign(vectors[np.arange(len(vectors)), np.abs(vectors).argmax(1)])[:, None]
        total = values.sum()
        share = values / total if total > 0 else np.zeros_like(values)
        positive = share[share > 0]
        return xr.Dataset(
            {
                "n": ((), n),
                "mean": ("feature", state["mean"]),
                "variance": ("component", values),
                "share": ("component", share),
                "direction": (("kept", "feature"), vectors),
                "effective_rank": ((), float(np.exp(-(positive * np.log(positive)).sum()))),
                "participation_ratio": ((), float(1 / (share**2).sum()) if total > 0 else 0.0),
            }
        )


@accept_store_path
def pca(
    store: Store,
    site: str,
    *,
    components: int | None = None,
    rows: int | None = ROWS,
    seed: int = 0,
    skip: int = 0,
    layers: Layers = "all",
    **where: Any,
) -> xr.Dataset:
    """Return spectrum, effective rank and principal components of every layer.

    ::

        found = geometry.pca(store, "resid_post", components=16, skip=1)
        found["effective_rank"], found.sel(layer=12)["direction"]

    Parameters
    ----------
    components
        Number of directions to keep; all by default.
    rows
        Approximate number of rows, whole documents of a seeded sample; None means all. ``n`` is the exact number.
    skip
        Number of first tokens of each document to leave out; otherwise one massive activation may be the first
        component and nearly all of the variance.
    where
        scheduler, workers and progress; see `analysis.statistics.onepass.read`.

    Returns
    -------
    Dataset with dims (layer, component, kept, feature); see `PCA.result`
    """
    statistic = PCA(DocumentSample.of_rows(rows, store.n_rows, seed, skip), components=components)
    found = read(store, site, {"pca": statistic}, layers=layers, **where)["pca"]
    return found.assign_attrs(site=site, store=str(store.path))


def projected(values: np.ndarray, found: xr.Dataset, components: int | None = None) -> np.ndarray:
    """Return rows of one layer in the coordinates of its principal components, as ``sklearn.decomposition.PCA`` does.

    ::

        geometry.projected(store.read("resid_post", 12), found.sel(layer=12), components=2)

    Parameters
    ----------
    values : ndarray of shape (rows, features)
    found
        One layer of the result of `pca`: ``found.sel(layer=12)``.
    """
    directions = found["direction"].values[:components]
    return np.asarray((np.asarray(values, np.float64) - found["mean"].values) @ directions.T)


def whitened(
    values: np.ndarray, found: xr.Dataset, kind: Literal["pca", "zca"] = "zca", floor: float = 1e-12
) -> np.ndarray:
    """Return rows of one layer with unit covariance; directions with almost no variance become 0.

    ::

        geometry.whitened(store.read("resid_post", 12), found.sel(layer=12))

    Parameters
    ----------
    found
        One layer of the result of `pca`, with all components.
    kind
        ``pca`` for the coordinates of the components, or ``zca`` for the original ones.
    floor
        Share of the largest variance up to which a direction becomes 0.
    """
    directions, variance = found["direction"].values, found["variance"].values[: found.sizes["kept"]]
    full = variance > floor * variance[0]
    scale = np.where(full, 1 / np.sqrt(np.where(full, variance, 1.0)), 0.0)
    turned = projected(values, found) * scale
    return turned if kind == "pca" else turned @ directions


@accept_store_path
def project(
    store: Store, found: xr.Dataset, path: str | Path, *, components: int = 16, dtype: str = "float32"
) -> Store:
    """Write the principal components of every row as a small new store over the same documents.

    ::

        small = geometry.project(store, geometry.pca(store, "resid_post"), "small.zarr", components=16)

    The site keeps its name, layers and tokens, and has *components* features; `flexcache.store.rows_in` matches the
    rows of both stores. An interrupted call can be repeated to resume.

    Raises
    ------
    AnalysisError
        *found* is not a result for a site of the store, or the store does not hold every token.
    """
    site = str(found.attrs.get("site", ""))
    rows: str = store.spec.rows
    if store.spec.windows is not None or store.spec.packing is not None:
        rows = "of parts of documents"
    if site not in store.sites or found.sizes["kept"] < components or rows != "all":
        raise AnalysisError(
            "the rows cannot be projected",
            where=str(store.path),
            expected=f"a result of pca over a site of the store, with at least {components} components, and rows: all",
            found=f"site {site!r}, {found.sizes['kept']} components, rows: {rows}",
        )
    layers = [int(layer) for layer in found["layer"].values]
    stacked = layers != [-1]
    depth = store.arrays[site].depth or 1
    with flexcache.record(
        path,
        store_documents(store),
        sites={site: (depth, components) if stacked else components},
        layers=layers if stacked else "all",
        model={"name": f"{components} principal components of {store.path.name}", "class": "PCA"},
        dtype=dtype,
        max_length=None,
        seed=store.spec.seed,
    ) as recorder:
        place = rows_in(store, recorder.store)
        for batch in recorder.batches():
            for layer in layers:
                values = store.read(site, layer if stacked else None, place[batch.rows])
                values = projected(values, found.sel(layer=layer), components)
                recorder.put(site, values, rows=batch.rows, layer=layer if stacked else None)
    return flexcache.open(path)


def store_documents(store: Store) -> list[dict[str, Any]]:
    """Return the documents of a store with tokens and labels, for another store over the same documents."""
    tokens: dict[int, list[int]] = {}
    table = store.tokens.select(["document", "tokens"])
    for number, ids in zip(table["document"].to_pylist(), table["tokens"].to_pylist()):
        tokens.setdefault(number, ids)
    inner = TABLE_COLUMNS - {"id"}
    labels = store.documents.drop_columns([name for name in store.documents.column_names if name in inner])
    return [{**row, "tokens": tokens[number]} for number, row in enumerate(labels.to_pylist())]
