"""Attribution: the effect of patching each token, estimated from stored gradients; the largest are then replayed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import nn

from analysis.dataset.store_argument import accept_store_path
from analysis.replay.edits.donors import Donor, Patch, donor_ids, donor_lines
from analysis.replay.edits.edit_context import StoreRows
from analysis.replay.engine.compatibility import check_no_images
from analysis.replay.engine.engine import Engine
from analysis.replay.engine.forward_hooks import ForwardResult, PlacedEdit
from analysis.replay.engine.identity import check_discrepancy, compare_logits
from flexcache.errors import AnalysisError
from flexcache.recording.forward.batch import Batch
from flexcache.recording.forward.objective import NextTokenLoss, Objective
from flexcache.site import GRADIENT
from flexcache.store.read.store import Store

Method = Literal["patching", "ig"]


@accept_store_path
def attribution(
    store: Store,
    donor: str | Mapping[str, str],
    site: str = "resid_post",
    method: Method = "patching",
    layers: Collection[int] | None = None,
) -> xr.DataArray:
    """Return the estimated change of the objective if each token's activation were its donor's, without the model.

    ``"patching"``: the gradient at the document times the difference to the donor (attribution patching; Nanda 2023;
    Kramár et al. 2024, arXiv 2403.00745). ``"ig"``: the mean of the gradients at the document and at the donor, times
    the difference: integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365) by the trapezoidal rule on the two
    ends that a store holds. Both are estimates: saturation and cancellation cause false negatives. One layer is in
    memory at a time. ::

        estimate = replay.attribution(store, replay.same_length(store), method="ig")

    Parameters
    ----------
    donor
        The id of one document for all, or a mapping from id to id. Tokens are aligned by position; tokens that the
        donor lacks are left out.
    site
        A stored site whose gradient ``<site>.grad`` is stored too.
    layers
        All layers with both by default.

    Returns
    -------
    DataArray with dims (layer, token), in units of the objective; coordinates document (id), position and donor (id)

    Raises
    ------
    AnalysisError
        The gradient is not stored, a donor is not in the store, or no document has a donor.
    """
    if site not in store.arrays or site + GRADIENT not in store.arrays:
        raise AnalysisError(
            "attribution needs activations and their gradients",
            where=str(store.path),
            expected=f"sites {site} and {site}{GRADIENT}",
            found=", ".join(store.sites),
            remedy=f"capture with sites: [{site}, {site}{GRADIENT}]",
        )
    if method not in ("patching", "ig"):
        raise AnalysisError(f"there is no method {method!r}", expected='"patching" or "ig"')
    source, rows, theirs = _aligned(store, Patch(donor).donor)
    both = sorted(set(store.layers(site)) & set(store.layers(site + GRADIENT)))
    chosen = both if layers is None else [layer for layer in layers if layer in both]
    found = np.empty((len(chosen), len(rows)))
    for line, layer in enumerate(chosen):
        found[line] = _estimate(store, site, layer, method, rows, theirs)
    document = np.asarray(store.coordinates["document"].values)[rows]
    return xr.DataArray(
        found,
        {
            "layer": chosen,
            "document": ("token", np.array(store.documents["id"].to_pylist(), object)[document]),
            "position": ("token", np.asarray(store.coordinates["position"].values)[rows].astype(np.int64)),
            "donor": ("token", np.array(store.documents["id"].to_pylist(), object)[_owner(source, theirs)]),
        },
        ("layer", "token"),
        name="attribution",
        attrs={"site": site, "method": method},
    )


@accept_store_path
def verify(
    store: Store,
    model: nn.Module,
    attributed: xr.DataArray,
    top: int = 32,
    objective: Objective | None = None,
    accept: Collection[str] = (),
) -> xr.Dataset:
    """Replay the *top* cells with the largest estimates, and compare the exact effects with the estimates.

    ::

        exact = replay.verify(store, model, estimate, top=50)
        exact.attrs["rank_correlation"]

    Parameters
    ----------
    attributed
        What `attribution` returned.
    objective
        The objective of the capture, by default the loss of the next token; its change is summed over the
        tokens of a document.

    Returns
    -------
    Dataset with dim cell: ``attributed`` and ``exact``, with coordinates layer, document, position; the attribute
    ``rank_correlation`` is Spearman's, ``identity_error`` is as in a sweep

    Raises
    ------
    AnalysisError, MismatchError
        See `analysis.replay.sweep`.
    """
    if objective is None:
        check_no_images(store)
    engine, objective = Engine(store, model, accept), objective or NextTokenLoss()
    order = np.argsort(-np.abs(attributed.values), axis=None, kind="stable")[:top]
    rows, tokens = np.unravel_index(order, attributed.shape)
    cells = [
        (int(attributed["layer"][row]), *(attributed[name].values[token] for name in ("document", "position", "donor")))
        for row, token in zip(rows, tokens, strict=True)
    ]
    exact, worst = np.empty(len(cells)), 0.0
    documents = {engine.source.numbers[cell[1]] for cell in cells}
    for batch in engine.batches(documents):
        base = engine.run(batch)
        before = _per_document(objective, base, batch)
        place = {int(document): line for line, document in enumerate(batch.documents)}
        mine = [n for n, cell in enumerate(cells) if engine.source.numbers[cell[1]] in place]
        for layer in sorted({cells[n][0] for n in mine}):
            start = engine.start_at(attributed.attrs["site"], layer)
            found = compare_logits(engine.run(batch, start).logits, base.logits, batch)
            check_discrepancy(engine, start, found, engine.notes_on(start))
            worst = max(worst, found.largest)
            for together in _rounds([n for n in mine if cells[n][0] == layer], cells):
                lines = np.array([place[engine.source.numbers[cells[n][1]]] for n in together], np.int64)
                positions = np.array([cells[n][2] for n in together], np.int64)
                patch = Patch({cells[n][1]: cells[n][3] for n in together})
                placed = PlacedEdit(engine.point(attributed.attrs["site"], layer), patch, (lines, positions))
                after = _per_document(objective, engine.run(batch, start, [placed]), batch)
                exact[together] = (after - before)[lines]
    estimate = attributed.values[rows, tokens]
    return xr.Dataset(
        {"attributed": ("cell", estimate), "exact": ("cell", exact)},
        {
            "layer": ("cell", [cell[0] for cell in cells]),
            "document": ("cell", np.array([cell[1] for cell in cells], object)),
            "position": ("cell", [int(cell[2]) for cell in cells]),
        },
        {
            "rank_correlation": float(spearmanr(estimate, exact).statistic) if len(cells) > 1 else float("nan"),
            "identity_error": worst,
            "method": attributed.attrs["method"],
        },
    )


def _aligned(store: Store, donor: Donor) -> tuple[StoreRows, NDArray[np.int64], NDArray[np.int64]]:
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
    store: Store, site: str, layer: int, method: Method, rows: NDArray[np.int64], theirs: NDArray[np.int64]
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


def _per_document(objective: Objective, ran: ForwardResult, batch: Batch) -> NDArray[np.float64]:
    output: Any = _Output(ran.logits)
    with torch.no_grad():
        value = objective(output, batch)
    return value.double().reshape(batch.shape[0], -1).sum(1).cpu().numpy()


class _Output:
    """The part of a model's output that an objective reads."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


def _rounds(numbers: list[int], cells: list[tuple[Any, ...]]) -> list[list[int]]:
    """Split cells so that no document has two cells in one forward."""
    rounds: list[list[int]] = []
    for number in numbers:
        for group in rounds:
            if cells[number][1] not in {cells[other][1] for other in group}:
                group.append(number)
                break
        else:
            rounds.append([number])
    return rounds
