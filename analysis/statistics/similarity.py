"""Similarity of layers, sites and stores: debiased CKA, CCA and cosine, each with its distribution under chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike

from analysis.arguments import check_whole
from analysis.dataset.layer_choice import choose_layers
from analysis.dataset.store_argument import accept_store_path
from analysis.statistics.kept_rows import Rows
from analysis.statistics.onepass import DocumentSample, read
from flexcache.errors import AnalysisError
from flexcache.site import Layers
from flexcache.store.read.row_alignment import matching_rows
from flexcache.store.read.store import Store

ROWS = 1024
FEWEST = 4
"""Number of rows from which unbiased HSIC is defined."""
ROUNDING = 1e-12
"""Difference up to which a random pairing counts as equal to the value."""
MEASURES = ("cka", "cca", "cosine")


@accept_store_path
def compute(
    store: Store,
    sites: str | Sequence[str],
    *,
    rows: int = ROWS,
    permutations: int = 100,
    seed: int = 0,
    skip: int = 1,
    layers: Layers = "all",
    **where: Any,
) -> xr.Dataset:
    """Compare every layer of one or more sites of a store with every other, on the same sampled rows.

    ::

        similarity.compute(store, ["resid_post", "mlp_out"], rows=2048)["cka"]

    Parameters
    ----------
    rows
        Approximate number of rows, whole documents of a seeded sample; ``n`` in the attributes is the exact number.
        Memory is n² float64 values per layer.
    permutations, seed
        See `between`.
    skip
        Number of first tokens of each document to leave out, because single huge values dominate CKA and cosine.
    where
        scheduler, workers and progress; see `analysis.statistics.onepass.read`.

    Returns
    -------
    Dataset with dims (one, two); see `between`
    """
    check_permutations(permutations, seed)
    names = [sites] if isinstance(sites, str) else list(dict.fromkeys(sites))
    statistic = Rows(rows, DocumentSample.of_rows(rows, store.n_rows, seed, skip))
    matrices: dict[str, np.ndarray] = {}
    document = np.empty(0, np.int64)
    for site in names:
        stacked = site not in store.arrays or store.arrays[site].layers is not None
        chosen: Layers = layers if stacked else "all"
        found = read(store, site, {"rows": statistic}, layers=chosen, **where)
        for layer in found.layers:
            kept = found.states[layer]["rows"]
            matrices[_label(site, layer)] = kept["values"]
            document = np.asarray(store.coordinates["document"].values)[kept["row"]]
    return between(matrices, documents=document, permutations=permutations, seed=seed)


@accept_store_path
def stores(
    store: Store,
    other: Store,
    site: str,
    other_site: str | None = None,
    *,
    rows: int = ROWS,
    permutations: int = 100,
    seed: int = 0,
    skip: int = 1,
    layers: Layers = "all",
) -> xr.Dataset:
    """Compare the layers of two stores over the same documents, matched by document and position.

    ::

        similarity.stores(base, tuned, "resid_post")["cka"]

    Returns
    -------
    Dataset with dims (one, two): layers of *store* and of *other*; see `between`

    Raises
    ------
    AnalysisError
        The stores have too few rows in common, or different tokens at the same position.
    """
    check_permutations(permutations, seed)
    second = other_site or site
    match = matching_rows(store, other)
    sample = DocumentSample.of_rows(rows, int((match >= 0).sum()), seed, skip)
    kept = match >= 0
    if sample is not None:
        kept &= sample(*(np.asarray(other.coordinates[name].values) for name in ("document", "position")))
    there = np.flatnonzero(kept)
    if len(there) < FEWEST:
        raise AnalysisError(
            "the stores have too few rows in common",
            where=str(other.path),
            expected=f"the same documents, at least {FEWEST} rows",
            found=f"{len(there)} rows",
        )
    here = match[there]
    one = {_label(site, layer): store.read(site, layer, here) for layer in choose_layers(store, site, layers)}
    two = {_label(second, layer): other.read(second, layer, there) for layer in choose_layers(other, second, layers)}
    document = np.asarray(other.coordinates["document"].values)[there]
    return between(one, two, documents=document, permutations=permutations, seed=seed)


def check_permutations(permutations: int, seed: int) -> None:
    """Raise AnalysisError if a number of permutations or a seed cannot be used."""
    check_whole("permutations", permutations, 0)
    check_whole("seed", seed, 0)


def between(
    one: Mapping[str, np.ndarray],
    two: Mapping[str, np.ndarray] | None = None,
    *,
    documents: ArrayLike | None = None,
    permutations: int = 100,
    seed: int = 0,
) -> xr.Dataset:
    """Compare every matrix with every other, over the same rows.

    ::

        similarity.between({"a": X, "b": Y})["cka"].sel(one="a", two="b")

    - ``cka``: linear CKA (Kornblith et al. 2019) by the unbiased HSIC of Song et al. (2012), which is 0 for
      independent rows with any number of features; the biased one is not (arXiv 2405.01012).
    - ``cca``: mean squared canonical correlation of the leading principal components, at most a tenth as many as rows
      (SVCCA, Raghu et al. 2017), because CCA with as many features as rows is 1 even for noise.
    - ``cosine``: mean cosine of equal rows; NaN if the numbers of features differ.

    Each has a ``_null``, the 95 % quantile over random pairings of the documents, and a ``_p``, the share of random
    pairings that reach the value: (1 + count) / (1 + permutations). Rows of one document are not independent, so whole
    documents are paired with each other, row by row (a permutation test of clusters). That needs documents of equal
    length: null and p use the first rows of those long enough, ``null_rows`` in total, as many as possible from at
    least half of the documents; the value itself uses all rows. Similarity that comes from the position alone is part
    of the null.

    Parameters
    ----------
    one, two
        Matrices by name, each of shape (rows, features); *two* is *one* by default.
    documents
        The document of each row, (rows,), in row order; by default each row is one of its own.

    Returns
    -------
    Dataset with dims (one, two)
        Null and p are NaN if there are fewer than two documents.

    Raises
    ------
    AnalysisError
        The matrices have different numbers of rows, or fewer than 4.
    """
    check_permutations(permutations, seed)
    second = one if two is None else two
    sizes = {len(values) for values in (*one.values(), *second.values())}
    if len(sizes) != 1 or min(sizes) < FEWEST:
        raise AnalysisError(
            "the matrices cannot be compared",
            expected=f"the same rows in each, at least {FEWEST}",
            found=f"{', '.join(map(str, sorted(sizes))) or 'no'} rows",
            remedy="sample more documents",
        )
    n = sizes.pop()
    owner = np.arange(n) if documents is None else np.asarray(documents)
    if owner.shape != (n,):
        raise AnalysisError("documents cannot be used", expected=f"one for each of {n} rows", found=str(owner.shape))
    rows = _equal_documents(owner)
    rng = np.random.default_rng(seed)
    places = np.arange(rows.size).reshape(rows.shape)
    orders = [places[rng.permutation(len(rows))].ravel() for _ in range(permutations)]
    data: dict[str, Any] = {}
    for name, comparison in (("cka", _CKA), ("cca", _CCA), ("cosine", _Cosine)):
        left: Any = comparison(list(one.values()))
        right: Any = left if two is None else comparison(list(second.values()))
        value = left.compare_with(right, None)
        data[name] = (("one", "two"), value)
        null, p = np.full((2, *value.shape), np.nan)
        if permutations and len(rows) > 1 and rows.size >= FEWEST:
            if rows.size < n:
                left = comparison([values[rows.ravel()] for values in one.values()])
                right = left if two is None else comparison([values[rows.ravel()] for values in second.values()])
                value = left.compare_with(right, None)
            chance = np.stack([left.compare_with(right, order) for order in orders])
            with np.errstate(invalid="ignore"):
                null = np.quantile(chance, 0.95, axis=0)
                p = (1 + (chance >= value - ROUNDING).sum(0)) / (1 + permutations) + 0 * value  # NaN stays NaN
        if permutations:
            data |= {f"{name}_null": (("one", "two"), null), f"{name}_p": (("one", "two"), p)}
    told = {"n": n, "permutations": permutations, "null_documents": len(rows), "null_rows": rows.size}
    return xr.Dataset(data, {"one": list(one), "two": list(second)}, told)


def debiased_cka(one: np.ndarray, two: np.ndarray) -> float:
    """Return the debiased linear CKA of two matrices over the same rows, see `between`; NaN for fewer than 4 rows.

    >>> rows = np.random.default_rng(0).normal(size=(20, 3))
    >>> round(debiased_cka(rows, 2 * rows), 6)
    1.0
    """
    return float(_CKA([one]).compare_with(_CKA([two]), None)[0, 0]) if len(one) >= FEWEST else np.nan


def _equal_documents(owner: np.ndarray) -> np.ndarray:
    """Return the rows that stand for documents in the null, (documents, rows of each): see `between`."""
    _, place, sizes = np.unique(owner, return_inverse=True, return_counts=True)
    by_document = np.split(np.argsort(place, kind="stable"), np.cumsum(sizes)[:-1])
    longest = np.sort(sizes)[-((len(sizes) + 1) // 2)]  # at least half of the documents are as long as this
    lengths = np.arange(1, longest + 1)
    kept = lengths[np.argmax(lengths * (sizes[:, None] >= lengths).sum(0))]
    return np.stack([rows[:kept] for rows in by_document if len(rows) >= kept])


class _CKA:
    """U-centred kernels (Székely & Rizzo 2014) with upper triangles as unit vectors; products are debiased CKA."""

    def __init__(self, matrices: list[np.ndarray]) -> None:
        self.n = len(matrices[0])
        self.upper = np.triu_indices(self.n, 1)
        self.kernels = np.stack([_u_centred(values)[self.upper] for values in matrices])
        norms = np.sqrt(np.einsum("ai,ai->a", self.kernels, self.kernels))
        self.kernels /= np.where(norms > 0, norms, 1)[:, None]

    def compare_with(self, other: _CKA, order: np.ndarray | None) -> np.ndarray:
        right = other.kernels
        if order is not None:
            one, two = order[self.upper[0]], order[self.upper[1]]
            low, high = np.minimum(one, two), np.maximum(one, two)
            right = right.take(low * self.n - low * (low + 1) // 2 + high - low - 1, axis=1)
        return np.asarray(self.kernels @ right.T)


class _CCA:
    """Orthonormal bases of the leading principal components, with at most the same number for each matrix."""

    def __init__(self, matrices: list[np.ndarray]) -> None:
        kept = max(1, min(len(matrices[0]) // 10, min(values.shape[1] for values in matrices)))
        self.bases = []
        for values in matrices:
            centred = _centred(values)
            sizes, vectors = np.linalg.eigh(centred.T @ centred)
            full = sizes[-kept:] > max(sizes[-1], 0.0) * 1e-12
            self.bases.append(np.linalg.qr(centred @ vectors[:, -kept:][:, full])[0])

    def compare_with(self, other: _CCA, order: np.ndarray | None) -> np.ndarray:
        found = np.zeros((len(self.bases), len(other.bases)))
        right = [basis if order is None else basis[order] for basis in other.bases]
        ends = np.cumsum([0, *(basis.shape[1] for basis in right)])
        stacked = np.concatenate(right, axis=1)
        for i, basis in enumerate(self.bases):
            square = (basis.T @ stacked) ** 2
            for j in range(len(right)):
                shared = min(basis.shape[1], right[j].shape[1])
                found[i, j] = square[:, ends[j] : ends[j + 1]].sum() / shared if shared else 0.0
        return found


class _Cosine:
    """Rows scaled to length 1; matrices of the same width are stacked as (rows, matrices, features)."""

    def __init__(self, matrices: list[np.ndarray]) -> None:
        self.count, self.units = len(matrices), {}
        for width in {values.shape[1] for values in matrices}:
            places = [i for i, values in enumerate(matrices) if values.shape[1] == width]
            units = np.stack([np.asarray(matrices[i], np.float64) for i in places], axis=1)
            norms = np.linalg.norm(units, axis=2, keepdims=True)
            self.units[width] = (places, units / np.where(norms > 0, norms, 1))

    def compare_with(self, other: _Cosine, order: np.ndarray | None) -> np.ndarray:
        found = np.full((self.count, other.count), np.nan)
        for width in self.units.keys() & other.units.keys():
            (rows, left), (columns, right) = self.units[width], other.units[width]
            right = right if order is None else right[order]
            found[np.ix_(rows, columns)] = np.matmul(left, right.transpose(0, 2, 1)).mean(0)
        return found


def _centred(values: np.ndarray) -> np.ndarray:
    exact = np.asarray(values, np.float64)
    return np.asarray(exact - exact.mean(0))


def _u_centred(values: np.ndarray) -> np.ndarray:
    """Return the linear kernel, U-centred so that products are unbiased."""
    centred = _centred(values)
    kernel = centred @ centred.T
    n = len(kernel)
    np.fill_diagonal(kernel, 0.0)
    rows = kernel.sum(0)
    kernel -= (rows[:, None] + rows) / (n - 2)
    kernel += rows.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(kernel, 0.0)
    return kernel


def _label(site: str, layer: int | None) -> str:
    return site if layer is None else f"{site} {layer}"
