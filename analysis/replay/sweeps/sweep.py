"""Sweeps: edits at every layer, position and strength, over the documents of a store."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from torch import nn

from analysis.dataset.opens_store import opens_store
from analysis.progress import bar
from analysis.replay.edits.donors import donated, donor_ids
from analysis.replay.edits.edit import Alternatives, Edit, alternatives, labels
from analysis.replay.engine.compatibility import refuse_images
from analysis.replay.engine.engine import Engine
from analysis.replay.sweeps import metrics as measures
from analysis.replay.sweeps.arguments import checked_answers, checked_grid, loaded
from analysis.replay.sweeps.grid import Grid, number, reachable, several
from analysis.replay.sweeps.metrics import Asked
from analysis.replay.sweeps.results import FORMAT, Sweep
from analysis.replay.sweeps.sweep_plan import BASELINES, Answers, Part, Question, answer, merge_misfits
from analysis.replay.sweeps.workers import Loader, run_on_workers
from flexcache.errors import AnalysisError, MismatchError, StoreError, nearest
from flexcache.paths import output_folder
from flexcache.recording.forward.batch import Batch
from flexcache.spec import listed
from flexcache.store.read.store import Store
from flexcache.store.storage.atomic_files import write_json

PARTS, ASKED = "parts", "question.json"


@opens_store
def sweep(
    store: Store,
    model: nn.Module | Loader,
    at: Grid | None = None,
    edit: Edit | Alternatives | Sequence[Edit] = (),
    metrics: Asked | Sequence[Asked] = ("kl", "loss"),
    baselines: str | Sequence[str] = ("identity",),
    *,
    answers: Answers = None,
    documents: str | Sequence[str] | None = None,
    readout: str | Sequence[int] = "all",
    copies: int = 1,
    seed: int = 0,
    accept: Collection[str] = (),
    folder: str | Path | None = None,
    scheduler: str | None = None,
    workers: int = 2,
    progress: bool = True,
) -> Sweep:
    """Make edits at each layer and position, run only the rest of the model, and measure what changed.

    Batches are the capture's own, and the whole forward of each is run once, to compare with. At each layer the replay
    that changes nothing is compared with it first: where the storage dtype is the compute dtype it must be equal bit
    for bit, elsewhere near; the difference found stands in the results as ``identity_error``.

    Parameters
    ----------
    model
        The model that filled the store; or a function without arguments that loads it, needed with *scheduler*.
    at
        What `grid` returned; by default the last token, at every layer that the store allows.
    edit
        An edit, or several: ``a | b``. Each is made at all of its strengths.
    metrics
        Names of `analysis.replay.sweeps.metrics.NAMED`, metrics, or functions of an `Outcome`.
    baselines
        ``"identity"``: nothing is changed. ``"random_direction"``: the edit with random directions of equal length, for
        edits that have directions. ``"norm_matched"``: a random change that is as far as the edit's, token by token.
    answers
        Ids of two tokens; or a pair for each document: a mapping by id, or a list in the order of *documents*. The
        logit of the first less that of the second is the logit difference; probability and rank are of the first.
    documents
        Ids; by default all that are committed. Others of their batches are run along, and not edited.
    readout
        The tokens at which logits are compared: ``"all"``, the ``"last"``, or positions. The head of the model runs on
        those alone.
    copies
        How many cells go side by side through one forward, each from its own layer on; the others of a batch that are
        not asked about are then left out. More than 1 is much faster for few or short documents, and no longer exact
        bit for bit: the error is measured at each layer, as for a narrower storage dtype.
    folder
        Where parts are kept as they are done: the same sweep goes on after them.
    scheduler
        ``"processes"``: *workers* Dask processes that load the model once each; ``"tcp://…"``: a Dask cluster. By
        default all is done here.

    Raises
    ------
    MismatchError
        The store cannot be replayed with this model, or *folder* holds parts of another sweep.
    AnalysisError
        The identity check fails; an argument cannot be used; an edit or metric fails; a document that is named is not
        in the store; no document has a token at any of the positions; the documents are images.
    ConfigError, OutputError
        Nothing can be written to *folder*, at the beginning, or later: then the error says where the results are.
    """
    place = None if folder is None else output_folder(folder)
    first = loaded(store, model)
    refuse_images(store)
    engine = Engine(store, first, accept)
    question = ask(engine, checked_grid(at), edit, metrics, baselines, answers, documents, readout, copies, seed)
    batches = list(engine.batches(question.documents))
    if not batches:
        raise AnalysisError("no document can be replayed", found="none of those asked about is committed")
    kept = None if place is None else _folder(place, question)
    done = {} if kept is None else _done(kept, question)
    left = [batch for batch in batches if _name(batch) not in done]
    with bar(progress) as shown:
        total = len(batches) * question.forwards()
        task = shown.add_task("replaying (forwards)", total=total, completed=len(done) * question.forwards())
        advance: Callable[[], None] = lambda: shown.advance(task)  # noqa: E731
        for batch, part in _answers(engine, model, question, left, scheduler, workers, accept, advance):
            done[_name(batch)] = part
            if kept is not None:
                _keep(kept / PARTS / f"{_name(batch)}.npz", part)
            shown.update(task, completed=len(done) * question.forwards())
    result = Sweep(_dataset(engine, question, [done[_name(batch)] for batch in batches]))
    if place is not None:
        result.save(place)
    return result


def ask(
    engine: Engine,
    at: Grid,
    edit: Any,
    metrics: Any,
    baselines: str | Sequence[str],
    answers: Answers,
    documents: str | Sequence[str] | None,
    readout: str | Sequence[int],
    copies: int,
    seed: int,
) -> Question:
    """Return a sweep, spelt out; see `sweep`.

    Raises
    ------
    AnalysisError
    """
    baselines = listed(baselines, str, "baselines")
    documents = None if documents is None else listed(documents, str, "documents")
    for name in baselines:
        if name not in BASELINES:
            raise AnalysisError(f"there is no baseline {name!r}", remedy=nearest(name, BASELINES))
    if isinstance(readout, str) and readout not in ("all", "last"):
        raise AnalysisError(f"readout cannot be {readout!r}", remedy=nearest(readout, ("all", "last")))
    if copies < 1:
        raise AnalysisError("copies is too small", expected="at least 1", found=str(copies))
    layers, positions = at.resolve(engine.store, engine.depth)
    if not layers:
        raise AnalysisError("the store allows no layer to start at", where=at.site)
    for layer in layers:
        engine.start_at(at.site, layer, stored=layer is not None)
    found_answers = None
    if answers is not None:
        found_answers = checked_answers(answers, engine.source, documents, engine.vocabulary)
    found = [
        replace(metric, reads=tuple((s, None if n is None else n % engine.depth) for s, n in metric.reads))
        for metric in measures.find(metrics, answers is not None)
    ]
    if documents is None:
        chosen = list(range(len(engine.store.documents)))
    else:
        engine.source.check(documents, str(engine.store.path), StoreError)
        chosen = sorted({engine.source.numbers[str(name)] for name in documents})
    edits = alternatives(edit)
    for donor in (part.donor for one in edits for part in donated(one)):
        engine.source.check(donor_ids(donor), "donor")
    for label, place in positions.items():
        if isinstance(place, dict):
            engine.source.check(place, f"positions {label!r}")
    asked = set(chosen)
    lengths = {n: int(engine.source.lengths[line]) for n, line in engine.source.numbers.items() if line in asked}
    if lengths and not any(reachable(place, lengths) for place in positions.values()):
        raise AnalysisError(
            "no document has a token at these positions",
            where="positions",
            expected=f"positions of documents of up to {max(lengths.values())} tokens",
            found=", ".join(positions),
        )
    return Question(
        site=at.site,
        layers=layers,
        positions=positions,
        edits=edits,
        metrics=tuple(found),
        baselines=tuple(baselines),
        answers=found_answers,
        documents=tuple(chosen),
        readout=readout if isinstance(readout, str) else tuple(number(place, "readout") for place in several(readout)),
        copies=copies,
        seed=seed,
    )


def _answers(
    engine: Engine,
    model: nn.Module | Loader,
    question: Question,
    batches: list[Batch],
    scheduler: str | None,
    workers: int,
    accept: Collection[str],
    advance: Callable[[], None],
) -> Iterable[tuple[Batch, Part]]:
    if scheduler is None:
        return ((batch, answer(engine, question, batch, advance)) for batch in batches)
    if isinstance(model, nn.Module):
        raise AnalysisError(
            "a sweep on several workers needs to load the model on each",
            expected="a function without arguments that returns the model",
            found=type(model).__name__,
            remedy="write model=ModelSource(name=…).load",
        )
    return run_on_workers(engine.store.path, model, question, batches, scheduler, workers, accept)


def _dataset(engine: Engine, question: Question, parts: Sequence[Part]) -> xr.Dataset:
    documents = np.concatenate([part.documents for part in parts])
    order = np.argsort(documents, kind="stable")
    values = np.concatenate([part.values for part in parts], axis=5)[:, :, :, :, :, order]
    ids = np.array(engine.store.documents["id"].to_pylist(), object)
    starts = [engine.start_at(question.site, layer, stored=layer is not None) for layer in question.layers]
    notes = [*engine.notes, *dict.fromkeys(note for start in starts for note in engine.notes_on(start))]
    if question.copies > 1:
        notes.append(f"{question.copies} edits went through each forward, so that bits may differ from the capture's.")
    made = np.isfinite(values[0]).any(axis=(0, 3, 4, 5))
    for label, found in zip(question.positions, made, strict=True):
        missing = [name for name, any_value in zip(labels(question.edits), found, strict=True) if not any_value]
        if missing:
            why = "no document could be edited, or no metric has a value"
            notes.append(f"At position {label} every value is NaN ({why}): {', '.join(missing)}.")
    misfits = merge_misfits(parts)
    return xr.Dataset(
        {
            "value": (("arm", "layer", "position", "edit", "alpha", "document", "metric"), values),
            "identity_error": (("layer",), [misfit.largest for misfit in misfits]),
            "identity_error_relative": (("layer",), [misfit.relative for misfit in misfits]),
            "skipped": (("layer",), [start.skipped for start in starts]),
        },
        {
            "arm": np.array(question.arms, object),
            "layer": [-1 if layer is None else layer for layer in question.layers],
            "position": np.array(list(question.positions), object),
            "edit": np.array(labels(question.edits), object),
            "alpha": list(question.strengths),
            "document": ids[documents[order]],
            "metric": np.array([metric.name for metric in question.metrics], object),
        },
        {
            "format": FORMAT,
            "store": engine.store.path.name,
            "model": str(engine.store.provenance.get("model", {}).get("name", "")),
            "depth": engine.depth,
            "notes": notes,
            "question": {k: v for k, v in question.describe().items() if k not in ("documents", "answers")},
        },
    )


# Parts on the disk


def _folder(folder: Path, question: Question) -> Path:
    (folder / PARTS).mkdir(parents=True, exist_ok=True)
    path = folder / ASKED
    if path.exists():
        earlier = json.loads(path.read_text("utf-8")).get("digest")
        if earlier != question.digest:
            raise MismatchError(
                "the folder holds another sweep",
                where=str(folder),
                expected=f"the question {question.digest[:12]}…",
                found=f"{str(earlier)[:12]}…",
                remedy="choose another folder, or remove this one",
            )
    else:
        write_json(path, {"digest": question.digest, **question.describe()})
    return folder


def _done(folder: Path, question: Question) -> dict[str, Part]:
    found = {}
    for path in sorted((folder / PARTS).glob("*.npz")):
        with np.load(path, allow_pickle=False) as data:
            found[path.stem] = Part(data["documents"], data["values"], data["misfits"])
    return found


def _keep(path: Path, part: Part) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.savez(file, documents=part.documents, values=part.values, misfits=part.misfits)
    temporary.replace(path)


def _name(batch: Batch) -> str:
    return f"{batch.unit}-{batch.rows.start}"
