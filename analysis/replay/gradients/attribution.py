"""Attribution: the effect of patching each token, estimated from gradients."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from torch import nn

from analysis.arguments import check_whole
from analysis.dataset.layer_choice import choose_layers
from analysis.dataset.store_argument import accept_store_path
from analysis.replay.edits.donors import Donor, Patch, donor_ids, donor_lines
from analysis.replay.edits.edit_context import StoreRows
from analysis.replay.engine.engine import Engine
from analysis.replay.engine.starts import find_start
from analysis.replay.gradients.integrated import integrate_gradients
from analysis.replay.gradients.objectives import stored_objective
from flexcache.errors import AnalysisError
from flexcache.recording.forward.objective import Objective
from flexcache.site import GRADIENT, Layers
from flexcache.store.read.store import Store

Method = Literal["patching", "ig"]


@accept_store_path
def attribution(
    store: Store,
    donor: str | Mapping[str, str],
    site: str = "resid_post",
    method: Method = "patching",
    layers: Layers | None = "all",
    *,
    steps: int | None = None,
    model: nn.Module | None = None,
    objective: Objective | None = None,
    accept: Collection[str] = (),
) -> xr.DataArray:
    """Return the estimated change of the objective if each token's activation were its donor's.

    ``"patching"``: the gradient at the document times the difference to the donor (attribution patching; Nanda 2023;
    Kramár et al. 2024, arXiv 2403.00745), without the model. ``"ig"``: the mean gradient between document and donor,
    times the difference: integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365). Without *steps*, it is the
    trapezoidal rule on the two gradients that the store holds; that of the donor is of the donor's own objective. With
    *steps*, the model runs with all tokens of the document moved from their own activations to the donor's, by the
    midpoint rule (Hanna et al. 2024, arXiv 2403.17806): then the estimates of a document sum to the change of its
    objective, and the largest error of these sums is the attribute ``completeness_error``.

    All are estimates: saturation and cancellation cause false negatives, and first tokens, whose activations are often
    hundreds of times larger than others, are estimated badly. `verify` replays a sample. One layer is in memory at a
    time. ::

        estimate = replay.attribution(store, replay.same_length(store), method="ig", steps=8, model=model)

    Parameters
    ----------
    donor
        The id of one document for all, or a mapping from id to id. Tokens are aligned by position; tokens that the
        donor lacks are left out.
    site
        A stored site; without *steps*, its gradient ``<site>.grad`` is stored too.
    layers
        All layers with both by default.
    steps
        Number of points between document and donor at which ``"ig"`` computes the gradient.
    model, objective, accept
        Needed with *steps*, as in `verify`.

    Returns
    -------
    DataArray with dims (layer, token), in units of the objective; coordinates document (id), position and donor (id);
    the layer of a site without layers is -1

    Raises
    ------
    AnalysisError
        An activation or gradient is not stored, a donor is not in the store, no document has a donor, or the arguments
        do not fit each other.
    MismatchError
        *model* or *objective* is not that of the store.
    """
    chosen, source, rows, theirs = check_attribution(store, donor, site, method, layers, steps, model)
    attrs: dict[str, Any] = {"site": site, "method": method}
    found = np.empty((len(chosen), len(rows)))
    if steps is None:
        for line, layer in enumerate(chosen):
            found[line] = _estimate(store, site, layer, method, rows, theirs)
    else:
        assert model is not None
        engine, target = Engine(store, model, accept), stored_objective(store, objective)
        errors = [0.0]
        for line, layer in enumerate(chosen):
            found[line], error = integrate_gradients(engine, target, (site, layer), rows, theirs, steps)
            errors.append(error)
        attrs |= {"steps": steps, "completeness_error": max(errors)}
    ids = np.array(store.documents["id"].to_pylist(), object)
    document = np.asarray(store.coordinates["document"].values)[rows]
    return xr.DataArray(
        found,
        {
            "layer": [-1 if layer is None else layer for layer in chosen],
            "document": ("token", ids[document]),
            "position": ("token", np.asarray(store.coordinates["position"].values)[rows].astype(np.int64)),
            "donor": ("token", ids[_owner(source, theirs)]),
        },
        ("layer", "token"),
        name="attribution",
        attrs=attrs,
    )


def check_attribution(
    store: Store,
    donor: str | Mapping[str, str],
    site: str,
    method: str,
    layers: Layers | None,
    steps: int | None,
    model: nn.Module | None,
) -> tuple[tuple[int | None, ...], StoreRows, NDArray[np.int64], NDArray[np.int64]]:
    """Return the layers of an attribution, the store's rows by document, and the rows of tokens and their donors.

    Raises
    ------
    AnalysisError
        See `attribution`.
    """
    if method not in ("patching", "ig"):
        raise AnalysisError(f"there is no method {method!r}", expected='"patching" or "ig"')
    _check_steps(steps, method, model)
    _check_sites(store, site, gradient=steps is None)
    chosen = _choose_layers(store, site, layers, gradient=steps is None)
    if steps is not None:
        for layer in chosen:
            find_start(store, site, layer)
    return chosen, *_align(store, Patch(donor).donor)


def _check_steps(steps: int | None, method: str, model: nn.Module | None) -> None:
    if steps is None:
        return
    check_whole("steps", steps, 1)
    if method != "ig" or model is None:
        raise AnalysisError(
            "steps belong to integrated gradients, which then run the model",
            expected='method="ig", and model=',
            found=f"method={method!r}, " + ("no model" if model is None else "a model"),
        )


def _check_sites(store: Store, site: str, gradient: bool) -> None:
    needed = (site, site + GRADIENT) if gradient else (site,)
    if any(name not in store.arrays for name in needed):
        raise AnalysisError(
            "attribution needs activations and their gradients" if gradient else "attribution needs activations",
            where=str(store.path),
            expected=f"sites {' and '.join(needed)}",
            found=", ".join(store.sites),
            remedy=f"capture with sites: [{', '.join(needed)}]",
        )


def _choose_layers(store: Store, site: str, layers: Layers | None, gradient: bool) -> tuple[int | None, ...]:
    """Return the layers that *layers* names; by default all with activation and gradient."""
    every = layers is None or layers == "all"
    chosen = choose_layers(store, site, "all" if layers is None else layers)
    if not gradient or None in chosen:
        return chosen
    known = store.layers(site + GRADIENT)
    missing = [layer for layer in chosen if layer not in known]
    if missing and (not every or len(missing) == len(chosen)):
        raise AnalysisError(
            f"the gradient of {site} was not captured in layer {', '.join(map(str, missing))}",
            expected=f"layers {', '.join(map(str, known))}",
            found=str(layers),
        )
    return tuple(layer for layer in chosen if layer in known)


def _align(store: Store, donor: Donor) -> tuple[StoreRows, NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows whose donor has a row at the same position, and these donors' rows."""
    source = StoreRows(store)
    source.check_documents(donor_ids(donor), "donor")
    lines = donor_lines(donor, source.numbers, np.arange(len(source.lengths)))
    rows = store.committed_rows
    document = np.asarray(store.coordinates["document"].values)[rows]
    position = np.asarray(store.coordinates["position"].values)[rows]
    theirs = lines[document]
    known = (theirs >= 0) & (theirs != document) & (position < source.lengths[theirs])
    if not known.any():
        raise AnalysisError("no document has a donor", expected="ids of the store's documents", found=str(donor)[:200])
    return source, rows[known], source.row_start[theirs[known]] + position[known]


def _estimate(
    store: Store, site: str, layer: int | None, method: Method, rows: NDArray[np.int64], theirs: NDArray[np.int64]
) -> NDArray[np.float64]:
    total = np.empty(len(rows))
    for first in range(0, len(rows), 8192):
        part = slice(first, first + 8192)
        away = store.read(site, layer, theirs[part]).astype(np.float64) - store.read(site, layer, rows[part])
        slope = store.read(site + GRADIENT, layer, rows[part]).astype(np.float64)
        if method == "ig":
            slope = (slope + store.read(site + GRADIENT, layer, theirs[part])) / 2
        total[part] = np.einsum("ij,ij->i", slope, away)
    return total


def _owner(source: StoreRows, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    order = np.argsort(source.row_start, kind="stable")
    return order[np.searchsorted(source.row_start[order], rows, side="right") - 1]
