"""What a sweep asks: cells, edits, metrics and controls, as one value; and its answer for one batch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from analysis.replay.edits.donors import donated, donor_lines
from analysis.replay.edits.edit import Edit
from analysis.replay.edits.standard import Identity, NormMatched
from analysis.replay.engine.engine import Engine, Start
from analysis.replay.engine.hooking import Placed, Ran
from analysis.replay.engine.identity import Discrepancy, compare, refuse_misfit
from analysis.replay.sweeps.grid import Place, chosen
from analysis.replay.sweeps.metrics import Metric, Outcome, score
from flexcache.provenance import origin
from flexcache.recording.forward.batch import Batch

BASELINES = ("identity", "random_direction", "norm_matched")
Answers = Sequence[int] | Sequence[Sequence[int]] | Mapping[str, Sequence[int]] | None


@dataclass(frozen=True)
class Question:
    """A sweep, spelt out.

    Attributes
    ----------
    documents : tuple of int
        Lines in the store.
    readout : {"all", "last"} or tuple of int
        At which tokens the logits with and without an edit are compared; negative numbers from the end.
    copies : int
        Cells side by side in one forward, along its first dim.
    """

    site: str
    layers: tuple[int | None, ...]
    positions: Mapping[str, Place]
    edits: tuple[Edit, ...]
    metrics: tuple[Metric, ...]
    baselines: tuple[str, ...]
    answers: tuple[int, int] | dict[str, tuple[int, int]] | None
    documents: tuple[int, ...]
    readout: str | tuple[int, ...] = "all"
    copies: int = 1
    seed: int = 0

    @property
    def arms(self) -> tuple[str, ...]:
        """The edit and its controls."""
        return ("edit", *self.baselines)

    @property
    def strengths(self) -> tuple[float, ...]:
        """All strengths of all edits, sorted."""
        return tuple(sorted({strength for edit in self.edits for strength in edit.strengths}))

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the dims arm, layer, position, edit, alpha, document and metric."""
        parts = (self.arms, self.layers, self.positions, self.edits, self.strengths, self.documents, self.metrics)
        return tuple(len(part) for part in parts)

    def describe(self) -> dict[str, Any]:
        """Return the question as plain values."""
        return {
            "site": self.site,
            "layers": list(self.layers),
            "positions": {
                label: place if isinstance(place, dict) else str(place) for label, place in self.positions.items()
            },
            "edits": [edit.to_json() for edit in self.edits],
            "metrics": [metric.name if metric.name in _own() else origin(metric.function) for metric in self.metrics],
            "baselines": list(self.baselines),
            "answers": dict(self.answers) if isinstance(self.answers, Mapping) else self.answers,
            "documents": list(self.documents),
            "readout": self.readout,
            "copies": self.copies,
            "seed": self.seed,
        }

    @property
    def digest(self) -> str:
        """XXH3-128 of the question."""
        return xxhash.xxh3_128_hexdigest(json.dumps(self.describe(), sort_keys=True, default=str).encode())

    def forwards(self) -> int:
        """Return how many forwards a batch takes at most."""
        jobs = len(self.positions) * sum(len(edit.strengths) for edit in self.edits)
        jobs *= 1 + sum(name != "identity" for name in self.baselines)
        return 1 + -(-len(self.layers) * (1 + jobs) // self.copies)


@dataclass(frozen=True)
class Part:
    """A batch's answer: values of its documents, shape as `Question.shape`, and the misfit of each layer."""

    documents: NDArray[np.int64]
    values: NDArray[np.float64]
    misfits: NDArray[np.float64]


@dataclass(frozen=True)
class Job:
    """One cell: its place in the results, and the edit that is made there; the replay that changes nothing has none.

    Attributes
    ----------
    row : int
        Of the layer.
    at : tuple of int
        Arm, position, edit and strength.
    """

    row: int
    start: Start
    at: tuple[int, int, int, int] = (0, 0, 0, 0)
    edit: Edit | None = None
    tokens: tuple[NDArray[np.int64], NDArray[np.int64]] = (np.zeros(0, np.int64), np.zeros(0, np.int64))


def answer(engine: Engine, question: Question, batch: Batch, advance: Callable[[], None] = lambda: None) -> Part:
    """Return what each edit does to the documents of a batch that are asked about.

    The whole forward is run once; then, of each layer, the replay that changes nothing, which must be the same, and
    each edit: `Question.copies` of them side by side, each from its own layer on; then the batch's other documents,
    without which bits may differ, are left out. *advance* is called after each forward.

    Raises
    ------
    AnalysisError
        The identity check fails, or an edit cannot be made.
    """
    lines = np.flatnonzero(np.isin(batch.documents, question.documents))
    if question.copies > 1:
        batch, lines = _of(batch, lines), np.arange(len(lines))
    ids = [_id(engine, int(document)) for document in batch.documents]
    read = read_positions(question.readout, batch)
    points = tuple(dict.fromkeys(place for metric in question.metrics for place in metric.reads))
    values = np.full((*question.shape[:5], len(lines), len(question.metrics)), np.nan)
    same = np.full((len(question.layers), len(question.edits), *values.shape[-2:]), np.nan)
    misfits = np.zeros((len(question.layers), 2))
    base = engine.run(batch, read=read, points=points)
    donors = [_donor_logits(engine, question, edit, batch, lines) for edit in question.edits]
    jobs = sorted(_jobs(engine, question, batch, lines, ids), key=lambda job: job.start.skipped)
    for first in range(0, len(jobs), question.copies):
        together = jobs[first : first + question.copies]
        placed = [
            Placed(
                engine.point(question.site, question.layers[job.row]),
                job.edit,
                (job.tokens[0] + copy * batch.shape[0], job.tokens[1]),
                question.seed,
            )
            for copy, job in enumerate(together)
            if job.edit is not None
        ]
        ran = engine.run(batch, [job.start for job in together], placed, read=read, points=points)
        advance()
        for copy, job in enumerate(together):
            mine = _copy(engine, job.start, ran, base, copy * batch.shape[0], batch.shape[0])
            scores = [
                [_scores(question, batch, ids, read, base, mine, line, given.get(line)) for line in lines.tolist()]
                for given in (donors if job.edit is None else [donors[job.at[2]]])
            ]
            if job.edit is None:
                found = compare(mine.logits, base.logits, batch, read)
                refuse_misfit(engine, job.start, found, engine.notes_on(job.start), question.copies)
                misfits[job.row], same[job.row] = (found.largest, found.relative), scores
            else:
                made = np.isin(lines, job.tokens[0]) & ~np.isin(lines, list(mine.left_out))
                cell = values[job.at[0], job.row, job.at[1], job.at[2], job.at[3]]
                cell[made] = np.array(scores[0])[made]
    if "identity" in question.baselines:
        made = np.isfinite(values[0]).any(-1, keepdims=True)
        values[question.arms.index("identity")] = np.where(made, same[:, None, :, None], np.nan)
    return Part(batch.documents[lines], values, misfits)


def _of(batch: Batch, lines: NDArray[np.int64]) -> Batch:
    """Return a batch of some of the documents of a batch."""
    tokens, keep = tuple(batch.tokens[line] for line in lines), tuple(batch.keep[line] for line in lines)
    return replace(batch, documents=batch.documents[lines], tokens=tokens, keep=keep)


def _copy(engine: Engine, start: Start, ran: Ran, base: Ran, first: int, count: int) -> Ran:
    """Return the lines of one copy of a batch; before it began, everything is as it was."""
    mine = slice(first, first + count)
    residuals = {
        place: ran.residuals[place][mine] if engine.reaches(start, place) else base.residuals[place]
        for place in base.residuals
    }
    return Ran(ran.logits[mine], residuals, {line - first for line in ran.left_out if first <= line < first + count})


def read_positions(readout: str | tuple[int, ...], batch: Batch) -> NDArray[np.int64] | None:
    """Return which positions of each sequence are read, shape (sequences, read); None for all."""
    if readout == "all":
        return None
    asked = (-1,) if readout == "last" else tuple(int(place) for place in readout)
    lengths = np.array([len(tokens) for tokens in batch.tokens])[:, None]
    places = np.array(asked)[None] + np.where(np.array(asked)[None] < 0, lengths, 0)
    return np.clip(places, 0, lengths - 1)


def _scores(
    question: Question,
    batch: Batch,
    ids: Sequence[str],
    read: NDArray[np.int64] | None,
    base: Ran,
    ran: Ran,
    line: int,
    donor: torch.Tensor | None,
) -> NDArray[np.float64]:
    length = len(batch.tokens[line])
    positions = np.arange(length) if read is None else read[line]
    here: Any = slice(0, length) if read is None else slice(None)
    outcome = Outcome(
        logits=ran.logits[line, here].float(),
        base=base.logits[line, here].float(),
        positions=positions,
        tokens=batch.tokens[line],
        answer=question.answers.get(ids[line]) if isinstance(question.answers, Mapping) else question.answers,
        donor=donor,
        residuals={},
        base_residuals={},
        document=int(batch.documents[line]),
    )
    scores = np.empty(len(question.metrics))
    for number, metric in enumerate(question.metrics):
        if metric.reads:
            residuals = {key: ran.residuals[key][line, :length].float() for key in metric.reads}
            before = {key: base.residuals[key][line, :length].float() for key in metric.reads}
            scores[number] = score(metric, replace(outcome, residuals=residuals, base_residuals=before))
        else:
            scores[number] = score(metric, outcome)
    return scores


def _jobs(
    engine: Engine, question: Question, batch: Batch, lines: NDArray[np.int64], ids: Sequence[str]
) -> Iterator[Job]:
    """Yield the jobs of each layer, the one that changes nothing first."""
    lengths = np.array([len(tokens) for tokens in batch.tokens], np.int64)
    lengths[np.setdiff1d(np.arange(len(lengths)), lines)] = 0  # documents that are not asked about stay as they are
    features = next(engine.model.parameters()).shape[-1]
    places = [chosen(place, lengths, ids) for place in question.positions.values()]
    cells = [
        ((arm, position, number, question.strengths.index(strength)), made, tokens)
        for position, tokens in enumerate(places)
        if len(tokens[0])
        for number, edit in enumerate(question.edits)
        for strength in edit.strengths
        for arm, name in enumerate(question.arms)
        if (made := _control(name, edit.at_strength(strength), question.seed, features)) is not None
    ]
    for row, layer in enumerate(question.layers):
        start = engine.start_at(question.site, layer, stored=layer is not None)
        yield Job(row, start)
        yield from (Job(row, start, at, edit, tokens) for at, edit, tokens in cells)


def _control(arm: str, edit: Edit, seed: int, features: int) -> Edit | None:
    if arm == "edit":
        return edit
    if arm == "random_direction":
        return edit.with_random_directions(seed, features)
    return NormMatched(edit) if arm == "norm_matched" and not isinstance(edit, Identity) else None


def _donor_logits(
    engine: Engine, question: Question, edit: Edit, batch: Batch, lines: NDArray[np.int64]
) -> dict[int, torch.Tensor]:
    """Return the logits at the end of each line's donor, where a metric needs them and the edit has donors."""
    first = next(donated(edit), None)
    if first is None or not any(metric.donors for metric in question.metrics):
        return {}
    donors = donor_lines(first.donor, engine.source.numbers, batch.documents[lines])
    pairs = zip(lines.tolist(), donors.tolist(), strict=True)
    return {line: last_logits(engine, donor) for line, donor in pairs if donor >= 0}


def last_logits(engine: Engine, document: int) -> torch.Tensor:
    """Return the logits at a document's last token in its own batch, float32 (vocabulary,); kept once computed."""
    kept = engine.ends
    if document not in kept:
        batch = engine.batch_of(document)
        last = read_positions("last", batch)
        logits = engine.run(batch, read=last).logits[:, 0].float().cpu()
        kept |= dict(zip(batch.documents.tolist(), logits, strict=True))
    return kept[document]


def _id(engine: Engine, document: int) -> str:
    return str(engine.store.documents["id"][document].as_py())


def _own() -> Mapping[str, Metric]:
    from analysis.replay.sweeps.metrics import NAMED

    return NAMED


def merge_misfits(parts: Sequence[Part]) -> list[Discrepancy]:
    """Return the worst misfit of each layer."""
    worst = np.stack([part.misfits for part in parts]).max(0)
    return [Discrepancy(float(largest), float(relative)) for largest, relative in worst]
