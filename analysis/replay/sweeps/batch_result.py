"""The results of one batch of a sweep, and the forwards that produce them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from analysis.replay.edits.donors import donor_lines, iterate_donor_edits
from analysis.replay.edits.edit import Edit
from analysis.replay.edits.features import Identity
from analysis.replay.edits.noise import NormMatched
from analysis.replay.engine.engine import Engine
from analysis.replay.engine.forward_hooks import ForwardResult, PlacedEdit
from analysis.replay.engine.identity import Discrepancy, check_discrepancy, compare_logits
from analysis.replay.engine.path_patching import PathForwards
from analysis.replay.metrics import Outcome, compute_metric
from analysis.replay.sweeps.grid import has_readout, readout_positions, select_tokens
from analysis.replay.sweeps.sweep_plan import SweepPlan
from flexcache.recording.forward.batch import Batch
from flexcache.virtual.plan import Start


@dataclass(frozen=True)
class BatchResult:
    """The results of one batch.

    Attributes
    ----------
    documents : ndarray of int64, shape (documents,)
        Lines in the store.
    values : ndarray of float64
        Of the shape of `SweepPlan.shape`, for these documents.
    discrepancies : ndarray of float64, shape (layers, 2)
        Largest and relative distance of the replay that changes nothing from the forward.
    changed : ndarray of bool, shape (layers, positions, edits, metrics)
        True where a metric of an edited document differs from that of the replay that changes nothing.
    unedited : ndarray of float64, shape (edits, documents, metrics)
        Values of the complete forward; they depend on the edit where a metric compares with its donors.
    noise : ndarray of float64, shape (layers, metrics)
        Largest distance of the values of the replay that changes nothing from those of the complete forward.
    """

    documents: NDArray[np.int64]
    values: NDArray[np.float64]
    discrepancies: NDArray[np.float64]
    changed: NDArray[np.bool_]
    unedited: NDArray[np.float64]
    noise: NDArray[np.float64]


@dataclass(frozen=True)
class SweepCell:
    """One forward of a batch: where its values belong, and the edit; without an edit, the replay that changes nothing.

    Attributes
    ----------
    row : int
        Index of the layer.
    at : tuple of int
        Indices of arm, position, edit and strength.
    """

    row: int
    start: Start
    at: tuple[int, int, int, int] = (0, 0, 0, 0)
    edit: Edit | None = None
    tokens: tuple[NDArray[np.int64], NDArray[np.int64]] = (np.zeros(0, np.int64), np.zeros(0, np.int64))


def run_batch(engine: Engine, plan: SweepPlan, batch: Batch, advance: Callable[[], None] = lambda: None) -> BatchResult:
    """Return the effect of each edit on the documents of a batch that are in the plan.

    The complete forward runs once; then, for each layer, the replay that changes nothing, which must equal it, and each
    edit: `SweepPlan.copies` of them side by side, each from its own layer on. With several copies, the batch's other
    documents are left out, so that bits may differ. *advance* is called after each forward.

    Raises
    ------
    AnalysisError
        The identity check fails, or an edit cannot be made.
    """
    lines = np.flatnonzero(np.isin(batch.documents, plan.documents))
    if plan.copies > 1:
        batch, lines = _select_documents(batch, lines), np.arange(len(lines))
    ids = [str(engine.store.documents["id"][int(document)].as_py()) for document in batch.documents]
    lengths = np.array([len(tokens) for tokens in batch.tokens], np.int64)
    read, readable = readout_positions(plan.readout, lengths), has_readout(plan.readout, lengths)
    points = tuple(dict.fromkeys(key for metric in plan.metrics for key in metric.reads))
    values = np.full((*plan.shape[:5], len(lines), len(plan.metrics)), np.nan)
    unchanged = np.full((len(plan.layers), len(plan.edits), *values.shape[-2:]), np.nan)
    discrepancies = np.zeros((len(plan.layers), 2))
    noise = np.zeros((len(plan.layers), len(plan.metrics)))
    base = engine.run(batch, read=read, points=points)
    donors = [_donor_logits(engine, plan, edit, batch, lines) for edit in plan.edits]
    path = None
    if plan.receiver is not None:
        receiving = np.where(np.isin(np.arange(len(lengths)), lines), lengths, 0)
        tokens = select_tokens(plan.receiver.positions, receiving, ids)
        path = PathForwards.prepare(engine, plan.receiver, batch, tokens)

    def score(edited: ForwardResult, given: Sequence[dict[int, torch.Tensor]]) -> NDArray[np.float64]:
        return np.array(
            [
                [
                    _scores(plan, batch, ids, read, base, edited, line, donor.get(line))
                    if readable[line]
                    else np.full(len(plan.metrics), np.nan)
                    for line in lines.tolist()
                ]
                for donor in given
            ]
        ).reshape(len(given), len(lines), len(plan.metrics))

    unedited = score(base, donors)
    cells = sorted(_cells(engine, plan, batch, lines, ids), key=lambda cell: cell.start.skipped)
    for first in range(0, len(cells), plan.copies):
        together = cells[first : first + plan.copies]
        placed = [
            PlacedEdit(
                engine.point(plan.site, plan.layers[cell.row]),
                cell.edit,
                (cell.tokens[0] + copy * batch.shape[0], cell.tokens[1]),
                plan.seed,
            )
            for copy, cell in enumerate(together)
            if cell.edit is not None
        ]
        if path is not None and placed:
            result = path.run_path(together[0].start, placed[0], read=read, points=points)
        else:
            result = engine.run(batch, [cell.start for cell in together], placed, read=read, points=points)
        advance()
        for copy, cell in enumerate(together):
            own = _select_copy(engine, cell.start, result, base, copy * batch.shape[0], batch.shape[0])
            scores = score(own, donors if cell.edit is None else [donors[cell.at[2]]])
            if cell.edit is None:
                found = compare_logits(own.logits, base.logits, batch, read)
                check_discrepancy(engine, cell.start, found, engine.notes_on(cell.start), plan.copies)
                discrepancies[cell.row], unchanged[cell.row] = (found.largest, found.relative), scores
                with np.errstate(invalid="ignore"):  # infinity less infinity
                    noise[cell.row] = np.fmax.reduce(np.abs(scores - unedited), axis=(0, 1), initial=0.0)
            else:
                made = np.isin(lines, cell.tokens[0]) & ~np.isin(lines, list(own.left_out))
                arm, position, edit, strength = cell.at
                values[arm, cell.row, position, edit, strength][made] = scores[0][made]
    with np.errstate(invalid="ignore"):  # infinity less infinity
        moved = np.abs(values[0] - unchanged[:, None, :, None])
    error = 2 * discrepancies[:, 0].max() if plan.copies > 1 else 0.0  # otherwise equal bits are no change
    changed = (moved > error).any((3, 4))
    if "identity" in plan.baselines:
        made = np.isfinite(values[0]).any(-1, keepdims=True)
        values[plan.arms.index("identity")] = np.where(made, unchanged[:, None, :, None], np.nan)
    return BatchResult(batch.documents[lines], values, discrepancies, changed, unedited, noise)


def worst_discrepancies(results: Sequence[BatchResult]) -> list[Discrepancy]:
    """Return the worst discrepancy of each layer."""
    worst = np.stack([result.discrepancies for result in results]).max(0)
    return [Discrepancy(float(largest), float(relative)) for largest, relative in worst]


def _select_documents(batch: Batch, lines: NDArray[np.int64]) -> Batch:
    """Return a batch of some of a batch's documents."""
    return replace(batch, sequences=tuple(batch.sequences[line] for line in lines))


def _select_copy(
    engine: Engine, start: Start, result: ForwardResult, base: ForwardResult, first: int, count: int
) -> ForwardResult:
    """Return the lines of one copy of a batch; sites before its start are those of the complete forward."""
    own = slice(first, first + count)
    residuals = {
        key: result.residuals[key][own] if engine.reaches(start, key) else base.residuals[key] for key in base.residuals
    }
    left_out = {line - first for line in result.left_out if first <= line < first + count}
    return ForwardResult(result.logits[own], residuals, left_out)


def _scores(
    plan: SweepPlan,
    batch: Batch,
    ids: Sequence[str],
    read: NDArray[np.int64] | None,
    base: ForwardResult,
    edited: ForwardResult,
    line: int,
    donor: torch.Tensor | None,
) -> NDArray[np.float64]:
    """Return each metric's value for one document."""
    length = len(batch.tokens[line])
    positions: NDArray[np.int64] = np.arange(length)
    here: Any = slice(0, length)
    if read is not None:
        positions, here = np.unique(read[line], return_index=True)  # each token once, in the order of the document
    outcome = Outcome(
        logits=edited.logits[line, here].float(),
        base=base.logits[line, here].float(),
        positions=positions,
        tokens=batch.tokens[line],
        answer=plan.answers.get(ids[line]) if isinstance(plan.answers, Mapping) else plan.answers,
        donor=donor,
        residuals={},
        base_residuals={},
        document=int(batch.documents[line]),
    )
    scores = np.empty(len(plan.metrics))
    for number, metric in enumerate(plan.metrics):
        if metric.reads:
            residuals = {key: edited.residuals[key][line, :length].float() for key in metric.reads}
            before = {key: base.residuals[key][line, :length].float() for key in metric.reads}
            scores[number] = compute_metric(metric, replace(outcome, residuals=residuals, base_residuals=before))
        else:
            scores[number] = compute_metric(metric, outcome)
    return scores


def _cells(
    engine: Engine, plan: SweepPlan, batch: Batch, lines: NDArray[np.int64], ids: Sequence[str]
) -> Iterator[SweepCell]:
    """Yield the cells of each layer, the replay that changes nothing first."""
    lengths = np.array([len(tokens) for tokens in batch.tokens], np.int64)
    lengths[np.setdiff1d(np.arange(len(lengths)), lines)] = 0  # documents that are not in the plan are not edited
    features = next(engine.model.parameters()).shape[-1]
    tokens_at = [select_tokens(positions, lengths, ids) for positions in plan.positions.values()]
    edits = [
        ((arm, position, number, plan.strengths.index(strength)), made, tokens)
        for position, tokens in enumerate(tokens_at)
        if len(tokens[0])
        for number, edit in enumerate(plan.edits)
        for strength in edit.strengths
        for arm, name in enumerate(plan.arms)
        if (made := _edit_of_arm(name, edit.at_strength(strength), plan.seed, features)) is not None
    ]
    for row, layer in enumerate(plan.layers):
        start = engine.start_at(plan.site, layer, stored=layer is not None)
        yield SweepCell(row, start)
        yield from (SweepCell(row, start, at, edit, tokens) for at, edit, tokens in edits)


def _edit_of_arm(arm: str, edit: Edit, seed: int, features: int) -> Edit | None:
    """Return the edit, or its control; None if the edit has no such control."""
    if arm == "edit":
        return edit
    if arm == "random_direction":
        return edit.with_random_directions(seed, features)
    return NormMatched(edit) if arm == "norm_matched" and not isinstance(edit, Identity) else None


def _donor_logits(
    engine: Engine, plan: SweepPlan, edit: Edit, batch: Batch, lines: NDArray[np.int64]
) -> dict[int, torch.Tensor]:
    """Return the last logits of each line's donor, if a metric needs them and the edit has donors."""
    first = next(iterate_donor_edits(edit), None)
    if first is None or not any(metric.donors for metric in plan.metrics):
        return {}
    donors = donor_lines(first.donor, engine.source.numbers, batch.documents[lines])
    pairs = zip(lines.tolist(), donors.tolist(), strict=True)
    return {line: engine.last_logits(donor) for line, donor in pairs if donor >= 0}
