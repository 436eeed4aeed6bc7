"""What a sweep asks: cells, edits, metrics and controls, as one value; and its answer for one batch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from analysis.replay.donors import Donated, donor_lines
from analysis.replay.edit import Chain, Edit
from analysis.replay.edits import ByLayer, Identity, NormMatched
from analysis.replay.engine import Engine
from analysis.replay.grid import Place, chosen
from analysis.replay.hooking import Placed, Ran
from analysis.replay.identity import Misfit, compare, refuse_misfit
from analysis.replay.metrics import Metric, Outcome
from flexcache.recorder.batch import Batch
from flexcache.recorder.origin import origin

BASELINES = ("identity", "random_direction", "norm_matched")
Answers = tuple[int, int] | Mapping[str, tuple[int, int]] | None


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
        Edits side by side in one forward, along its first dim.
    """

    site: str
    layers: tuple[int | None, ...]
    positions: Mapping[str, Place]
    edits: tuple[Edit, ...]
    metrics: tuple[Metric, ...]
    baselines: tuple[str, ...]
    answers: Answers
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
        return 1 + len(self.layers) * (int(self.copies == 1) + -(-jobs // self.copies))


@dataclass(frozen=True)
class Part:
    """A batch's answer: values of its documents, shape as `Question.shape`, and the misfit of each layer."""

    documents: NDArray[np.int64]
    values: NDArray[np.float64]
    misfits: NDArray[np.float64]


@dataclass(frozen=True)
class Job:
    """One cell: its place in the results, and the edit that is made there."""

    at: tuple[int, int, int, int]
    edit: Edit
    tokens: tuple[NDArray[np.int64], NDArray[np.int64]]


def answer(engine: Engine, question: Question, batch: Batch, advance: Callable[[], None] = lambda: None) -> Part:
    """Return what each edit does to the documents of a batch that are asked about.

    The whole forward is run once; then, of each layer, the replay that changes nothing, which must be the same, and
    each edit. *advance* is called after each forward.

    Raises
    ------
    AnalysisError
        The identity check fails, or an edit cannot be made.
    """
    lines = np.flatnonzero(np.isin(batch.documents, question.documents))
    ids = [_id(engine, int(document)) for document in batch.documents]
    read = read_positions(question.readout, batch)
    taps = tuple(dict.fromkeys(place for metric in question.metrics for place in metric.reads))
    values = np.full((*question.shape[:5], len(lines), len(question.metrics)), np.nan)
    misfits = np.zeros((len(question.layers), 2))
    base = engine.run(batch, read=read, taps=taps)
    donors = [_donor_logits(engine, question, edit, batch, lines) for edit in question.edits]
    for row, layer in enumerate(question.layers):
        start = engine.start_at(question.site, layer, stored=layer is not None)
        jobs = list(_jobs(engine, question, batch, lines, ids, layer))
        spare = int(question.copies > 1 and bool(jobs))  # one more copy, which no edit changes, to measure the error by
        found, unchanged = Misfit(0.0, 0.0), None
        if not spare:
            unchanged = engine.run(batch, start, read=read, taps=taps)
            found = compare(unchanged.logits, base.logits, batch, read)
            advance()
        tap = engine.tap(question.site, layer)
        for first in range(0, len(jobs), question.copies):
            together = jobs[first : first + question.copies]
            placed = [
                Placed(tap, job.edit, (job.tokens[0] + copy * batch.shape[0], job.tokens[1]), question.seed)
                for copy, job in enumerate(together)
            ]
            ran = engine.run(batch, start, placed, copies=len(together) + spare, read=read, taps=taps)
            advance()
            if spare:
                unchanged = _lines_of(ran, len(together) * batch.shape[0])
                found |= compare(unchanged.logits, base.logits, batch, read)
            for copy, job in enumerate(together):
                score = values[job.at[0], row, job.at[1], job.at[2], job.at[3]]
                touched = set(job.tokens[0].tolist())
                for place, line in enumerate(lines.tolist()):
                    if line in touched and line + copy * batch.shape[0] not in ran.left_out:
                        case = (line, copy, donors[job.at[2]].get(line))
                        score[place] = _scores(question, batch, ids, read, base, ran, *case)
        assert unchanged is not None
        refuse_misfit(engine, start, found, engine.notes_on(start), question.copies)
        misfits[row] = found.largest, found.relative
        if "identity" in question.baselines:
            same = np.stack(
                [
                    [_scores(question, batch, ids, read, base, unchanged, int(n), 0, given.get(int(n))) for n in lines]
                    for given in donors
                ]
            )[:, None]
            made = np.isfinite(values[0, row]).any(-1, keepdims=True)
            values[question.arms.index("identity"), row] = np.where(made, same, np.nan)
    return Part(batch.documents[lines], values, misfits)


def _lines_of(ran: Ran, first: int) -> Ran:
    return Ran(ran.logits[first:], {place: values[first:] for place, values in ran.residuals.items()})


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
    copy: int,
    donor: torch.Tensor | None,
) -> NDArray[np.float64]:
    length, at = len(batch.tokens[line]), line + copy * batch.shape[0]
    positions = np.arange(length) if read is None else read[line]
    here: Any = slice(0, length) if read is None else slice(None)
    outcome = Outcome(
        logits=ran.logits[at, here].float(),
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
            residuals = {key: ran.residuals[key][at, :length].float() for key in metric.reads}
            before = {key: base.residuals[key][line, :length].float() for key in metric.reads}
            scores[number] = metric.function(replace(outcome, residuals=residuals, base_residuals=before))
        else:
            scores[number] = metric.function(outcome)
    return scores


def _jobs(
    engine: Engine, question: Question, batch: Batch, lines: NDArray[np.int64], ids: Sequence[str], layer: int | None
) -> list[Job]:
    lengths = np.array([len(tokens) for tokens in batch.tokens], np.int64)
    lengths[np.setdiff1d(np.arange(len(lengths)), lines)] = 0  # documents that are not asked about stay as they are
    features = next(engine.model.parameters()).shape[-1]
    jobs = []
    for position, place in enumerate(question.positions.values()):
        tokens = chosen(place, lengths, ids)
        if not len(tokens[0]):
            continue
        for number, edit in enumerate(question.edits):
            for strength in edit.strengths:
                at_strength = edit.at_strength(strength)
                column = question.strengths.index(strength)
                for arm, name in enumerate(question.arms):
                    made = _control(name, at_strength, question.seed, features)
                    if made is not None:
                        jobs.append(Job((arm, position, number, column), made, tokens))
    return jobs


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
    donated = _donated(edit)
    if donated is None or not any(metric.donors for metric in question.metrics):
        return {}
    donors = donor_lines(donated.donor, engine.source.numbers, batch.documents[lines])
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


def _donated(edit: Edit) -> Donated | None:
    if isinstance(edit, Chain):
        return next((found for part in edit.edits if (found := _donated(part))), None)
    if isinstance(edit, ByLayer):
        return _donated(edit.edits[0][1])
    return edit if isinstance(edit, Donated) else None


def _id(engine: Engine, document: int) -> str:
    return str(engine.store.documents["id"][document].as_py())


def _own() -> Mapping[str, Metric]:
    from analysis.replay.metrics import NAMED

    return NAMED


def merge_misfits(parts: Sequence[Part]) -> list[Misfit]:
    """Return the worst misfit of each layer."""
    worst = np.stack([part.misfits for part in parts]).max(0)
    return [Misfit(float(largest), float(relative)) for largest, relative in worst]
