"""Verification: exact replays of a sample of attributed patches, compared with the estimates."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import nn

from analysis.arguments import check_whole
from analysis.dataset.store_argument import accept_store_path
from analysis.replay.edits.donors import Patch
from analysis.replay.engine.compatibility import check_no_images
from analysis.replay.engine.engine import Engine
from analysis.replay.engine.forward_hooks import PlacedEdit
from analysis.replay.engine.identity import check_discrepancy, compare_logits
from analysis.replay.gradients.objectives import stored_objective, sum_by_document
from flexcache.errors import AnalysisError
from flexcache.recording.forward.objective import Objective
from flexcache.store.read.store import Store

DRAWS = ("top", "uniform", "first")
Cell = tuple[int | None, str, int, str]
"""Layer, document, position and donor."""


@accept_store_path
def verify(
    store: Store,
    model: nn.Module,
    attributed: xr.DataArray,
    top: int = 32,
    objective: Objective | None = None,
    accept: Collection[str] = (),
    *,
    sample: int = 32,
    seed: int = 0,
) -> xr.Dataset:
    """Replay the largest estimates and a random sample, and compare the exact effects with the estimates.

    A correlation over the largest estimates alone says little about the others, because cells that were missed are not
    among them. So ``rank_correlation`` is that of *sample* cells that are drawn uniformly from all. First tokens are
    kept apart, in a sample of their own: their activations are often so large that estimates are off by an order of
    magnitude. ::

        exact = replay.verify(store, model, estimate, top=50, sample=200)
        exact.attrs["rank_correlation"], exact.attrs["rank_correlation_top"]

    Parameters
    ----------
    attributed
        What `attribution` returned.
    top
        Number of cells with the largest estimates.
    objective
        The objective of the capture, needed if it was a function of your own; its change is summed over the tokens of a
        document.
    sample
        Number of cells that are drawn uniformly from all but first tokens; and, at most, of first tokens whose estimate
        is not 0.
    seed
        Seed of the sample.

    Returns
    -------
    Dataset with dim cell: ``attributed`` and ``exact``, with coordinates layer, document, position, donor and ``drawn``
    (``"top"``, ``"uniform"`` or ``"first"``; a cell may be in both of the former). Attributes: ``rank_correlation`` is
    Spearman's over the uniform sample, ``rank_correlation_top`` and ``rank_correlation_first`` over the others, NaN for
    fewer than three cells; ``identity_error`` is as in a sweep

    Raises
    ------
    AnalysisError, MismatchError
        See `analysis.replay.sweep`; or the store's gradients are of another objective.
    """
    check_whole("top", top, 0)
    check_whole("sample", sample, 0)
    check_whole("seed", seed, 0)
    if objective is None:
        check_no_images(store)
    objective = stored_objective(store, objective)
    engine, attributed = Engine(store, model, accept), attributed.transpose("layer", "token")
    drawn = draw_cells(attributed, top, sample, seed)
    flat, again = np.unique(np.concatenate([drawn[name] for name in DRAWS]), return_inverse=True)
    if not len(flat):
        raise AnalysisError("no cell is to be replayed", found=f"top={top}, sample={sample}, {attributed.size} cells")
    rows, tokens = np.unravel_index(flat, attributed.shape)
    cells: list[Cell] = [
        (
            None if (layer := int(attributed["layer"][row])) < 0 else layer,
            *(attributed[name].values[token] for name in ("document", "position", "donor")),
        )
        for row, token in zip(rows, tokens, strict=True)
    ]
    exact, worst = _replay_cells(engine, objective, attributed.attrs["site"], cells)
    values = {"attributed": attributed.values[rows, tokens], "exact": exact}
    found = xr.Dataset(
        {name: ("cell", value[again]) for name, value in values.items()},
        {
            "layer": ("cell", np.asarray(attributed["layer"].values)[rows][again]),
            **{name: ("cell", attributed[name].values[tokens][again]) for name in ("document", "position", "donor")},
            "drawn": ("cell", np.repeat(np.array(DRAWS, object), [len(drawn[name]) for name in DRAWS])),
        },
        {"identity_error": worst, "method": attributed.attrs["method"]},
    )
    for name in DRAWS:
        cell = found.isel(cell=np.flatnonzero(found["drawn"].values == name))
        key = "rank_correlation" if name == "uniform" else f"rank_correlation_{name}"
        found.attrs[key] = _rank_correlation(cell["attributed"].values, cell["exact"].values)
    return found


def draw_cells(attributed: xr.DataArray, top: int, sample: int, seed: int) -> dict[str, NDArray[np.int64]]:
    """Return flat indices of the cells to replay: the *top* ones, a uniform sample, and first tokens.

    >>> values = xr.DataArray([[3.0, 1.0, -2.0]], {"position": ("token", [0, 1, 2])}, ("layer", "token"))
    >>> {name: found.tolist() for name, found in draw_cells(values, top=1, sample=2, seed=0).items()}
    {'top': [2], 'uniform': [1, 2], 'first': [0]}
    """
    rng, size = np.random.default_rng(seed), np.abs(attributed.values).ravel()
    first = np.broadcast_to(attributed["position"].values == 0, attributed.shape).ravel()
    later, begins = np.flatnonzero(~first), np.flatnonzero(first & (size > 0))
    return {
        "top": later[np.argsort(-size[later], kind="stable")[:top]],
        "uniform": np.sort(rng.choice(later, min(sample, len(later)), replace=False)),
        "first": np.sort(rng.choice(begins, min(sample, len(begins)), replace=False)),
    }


def _replay_cells(
    engine: Engine, objective: Objective, site: str, cells: list[Cell]
) -> tuple[NDArray[np.float64], float]:
    """Return the exact effect of each cell, and the largest identity error."""
    exact, worst = np.empty(len(cells)), 0.0
    lines_of = [engine.source.numbers[cell[1]] for cell in cells]
    for batch in engine.batches(set(lines_of)):
        base = engine.run(batch)
        with torch.no_grad():
            before = sum_by_document(objective, base, batch)
        place = {int(document): line for line, document in enumerate(batch.documents)}
        mine = [number for number, line in enumerate(lines_of) if line in place]
        for layer in dict.fromkeys(cells[number][0] for number in mine):
            start, point = engine.start_at(site, layer), engine.point(site, layer)
            found = compare_logits(engine.run(batch, start).logits, base.logits, batch)
            check_discrepancy(engine, start, found, engine.notes_on(start))
            worst = max(worst, found.largest)
            for together in _rounds([number for number in mine if cells[number][0] == layer], cells):
                lines = np.array([place[lines_of[number]] for number in together], np.int64)
                positions = np.array([cells[number][2] for number in together], np.int64)
                patch = Patch({cells[number][1]: cells[number][3] for number in together})
                ran = engine.run(batch, start, [PlacedEdit(point, patch, (lines, positions))])
                with torch.no_grad():
                    after = sum_by_document(objective, ran, batch)
                exact[together] = (after - before).cpu().numpy()[lines]
    return exact, worst


def _rounds(numbers: list[int], cells: list[Cell]) -> list[list[int]]:
    """Split cells so that no document has two cells in one forward."""
    rounds: list[tuple[list[int], set[Any]]] = []
    for number in numbers:
        group = next((group for group in rounds if cells[number][1] not in group[1]), None)
        if group is None:
            rounds.append(group := ([], set()))
        group[0].append(number)
        group[1].add(cells[number][1])
    return [group for group, _ in rounds]


def _rank_correlation(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Return Spearman's rank correlation; NaN for fewer than three cells, or equal values."""
    if len(one) < 3 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    return float(spearmanr(one, other).statistic)
