"""Sweeps: edits at every layer, position and strength, over the documents of a store."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import numpy as np
import xarray as xr
from torch import nn

from analysis.dataset.store_argument import accept_store_path
from analysis.progress import bar
from analysis.replay.edits.edit import Alternatives, Edit, label_edits
from analysis.replay.edits.heads import OnHeads
from analysis.replay.edits.held_out import describe_split, iterate_fitted
from analysis.replay.engine.compatibility import check_no_images
from analysis.replay.engine.engine import Engine
from analysis.replay.metrics import MetricLike
from analysis.replay.sweeps.arguments import Answers, ModelLoader, check_grid, load_model
from analysis.replay.sweeps.batch_result import BatchResult, run_batch, worst_discrepancies
from analysis.replay.sweeps.execution_options import ExecutionOptions
from analysis.replay.sweeps.grid import Grid
from analysis.replay.sweeps.notes import sweep_notes
from analysis.replay.sweeps.results import FORMAT, Sweep
from analysis.replay.sweeps.sweep_folder import SweepFolder, batch_name
from analysis.replay.sweeps.sweep_plan import SweepPlan, plan_sweep
from analysis.replay.sweeps.workers import run_batches_on_workers
from flexcache.errors import AnalysisError
from flexcache.paths import output_folder
from flexcache.recording.forward.batch import Batch
from flexcache.store.read.store import Store


@accept_store_path
def sweep(
    store: Store,
    model: nn.Module | ModelLoader,
    at: Grid | None = None,
    edit: Edit | Alternatives | Sequence[Edit] = (),
    metrics: MetricLike | Sequence[MetricLike] = ("kl_sum",),
    baselines: str | Sequence[str] = ("identity",),
    *,
    answers: Answers = None,
    documents: str | Sequence[str] | None = None,
    readout: str | int | Sequence[int] = "all",
    seed: int = 0,
    accept: Collection[str] = (),
    options: ExecutionOptions | None = None,
    **named: Any,
) -> Sweep:
    """Make edits at each layer and position, run only the rest of the model, and measure the effects.

    Batches are the capture's own, and the complete forward of each runs once, for comparison. At each layer the replay
    that changes nothing is compared with it first: if the storage dtype is the compute dtype it must be equal bit for
    bit, otherwise close. The results keep the difference as ``identity_error``. ::

        found = replay.sweep(store, model, replay.grid(layers="all"), replay.Steer(vector, alpha=[0, 2, 8]))
        found.effect()

    Parameters
    ----------
    model
        The model that filled the store; or a function without arguments that loads it, required with *scheduler*.
    at
        What `grid` returned; by default the last token, at every layer that the store allows.
    edit
        An edit, or several: ``a | b``. Each is made at all of its strengths.
    metrics
        Names of `analysis.replay.metrics.NAMED`, metrics, or functions of an `Outcome`.
    baselines
        ``"identity"``: nothing is changed. ``"random_direction"``: the edit with random directions of equal length, for
        edits that have directions. ``"norm_matched"``: a random change as large as the edit's, token by token.
    answers
        Two tokens, by id or as texts such as ``" good"`` of one token each; or a pair for each document: a mapping by
        id, or a list in the order of *documents*. Texts need the tokenizer of the store's model. The logit difference
        is the logit of the first less that of the second; probability and rank are of the first.
    documents
        Ids; all committed documents by default. Documents that an edit was fitted to by ``fit_store`` are left out: it
        is judged on the others. The other documents of their batches run too, without an edit.
    readout
        Tokens at which logits are compared: ``"all"``, the ``"last"``, or positions, negative from the document's end.
        The model's head runs on these alone. Values of a document that lacks one of the positions are NaN.
    seed
        Seed of random edits and baselines.
    accept
        Names of incompatibilities to ignore, see `find_incompatibilities`.
    options, named
        An `ExecutionOptions`, and its fields as keywords, which take precedence: copies, folder, scheduler, workers,
        progress.

    Raises
    ------
    MismatchError
        The store cannot be replayed with this model, or *folder* holds another sweep.
    AnalysisError
        The identity check fails; an argument is unknown or cannot be used; an edit or metric fails; a named document is
        not in the store; no document has a token at any of the positions; the documents are images.
    ConfigError, OutputError
        *folder* cannot be written to, at the beginning or later: then the error says where the results are.
    """
    run = ExecutionOptions.merge(options, named, sweep)
    output = None if run.folder is None else output_folder(run.folder)
    first = load_model(store, model)
    check_no_images(store)
    engine = Engine(store, first, accept)
    plan = plan_sweep(engine, check_grid(at), edit, metrics, baselines, answers, documents, readout, run.copies, seed)
    batches = list(engine.batches(plan.documents))
    if not batches:
        raise AnalysisError("no document can be replayed", found="none of the documents is committed")
    folder = None if output is None else SweepFolder(output, plan)
    done = {} if folder is None else folder.read_results()
    pending = [batch for batch in batches if batch_name(batch) not in done]
    with bar(run.progress) as shown:
        each = plan.count_forwards()
        task = shown.add_task("replaying (forwards)", total=len(batches) * each, completed=len(done) * each)
        advance: Callable[[], None] = lambda: shown.advance(task)  # noqa: E731
        for batch, result in _run_batches(engine, model, plan, pending, run, accept, advance):
            done[batch_name(batch)] = result
            if folder is not None:
                folder.write_result(batch, result)
            shown.update(task, completed=len(done) * each)
    found = Sweep(_dataset(engine, plan, [done[batch_name(batch)] for batch in batches]))
    if output is not None:
        found.save(output)
    return found


def _run_batches(
    engine: Engine,
    model: nn.Module | ModelLoader,
    plan: SweepPlan,
    batches: list[Batch],
    run: ExecutionOptions,
    accept: Collection[str],
    advance: Callable[[], None],
) -> Iterable[tuple[Batch, BatchResult]]:
    if run.scheduler is None:
        return ((batch, run_batch(engine, plan, batch, advance)) for batch in batches)
    if isinstance(model, nn.Module):
        raise AnalysisError(
            "a sweep on several workers must load the model on each of them",
            expected="a function without arguments that returns the model",
            found=type(model).__name__,
            remedy="write model=ModelSource(name=…).load",
        )
    return run_batches_on_workers(engine.store.path, model, plan, batches, run.scheduler, run.workers, accept)


def _head_coordinate(edits: Sequence[Edit]) -> dict[str, Any]:
    """Return the head of each edit as a coordinate, if all are edits of one head."""
    heads = [edit.heads[0] for edit in edits if isinstance(edit, OnHeads) and len(edit.heads) == 1]
    return {"head": ("edit", heads)} if len(heads) == len(edits) else {}


def _dataset(engine: Engine, plan: SweepPlan, results: Sequence[BatchResult]) -> xr.Dataset:
    """Return the results of all batches as `Sweep.results`."""
    documents = np.concatenate([result.documents for result in results])
    order = np.argsort(documents, kind="stable")
    values = np.concatenate([result.values for result in results], axis=5)[:, :, :, :, :, order]
    unedited = np.concatenate([result.unedited for result in results], axis=1)[:, order]
    ids = np.array(engine.store.documents["id"].to_pylist(), object)
    starts = [engine.start_at(plan.site, layer, stored=layer is not None) for layer in plan.layers]
    changed = np.any([result.changed for result in results], axis=0)
    notes = sweep_notes(engine, plan, documents[order], values, changed)
    fits = dict.fromkeys(iterate_fitted(plan.edits))
    discrepancies = worst_discrepancies(results)
    return xr.Dataset(
        {
            "value": (("arm", "layer", "position", "edit", "alpha", "document", "metric"), values),
            "identity_error": (("layer",), [one.largest for one in discrepancies]),
            "identity_error_relative": (("layer",), [one.relative for one in discrepancies]),
            "skipped": (("layer",), [start.skipped for start in starts]),
            "unedited": (("edit", "document", "metric"), unedited),
            "noise_floor": (("layer", "metric"), np.stack([result.noise for result in results]).max(0)),
        },
        {
            "arm": np.array(plan.arms, object),
            "layer": [-1 if layer is None else layer for layer in plan.layers],
            "position": np.array(list(plan.positions), object),
            "edit": np.array(label_edits(plan.edits), object),
            **_head_coordinate(plan.edits),
            "alpha": list(plan.strengths),
            "document": ids[documents[order]],
            "metric": np.array([metric.name for metric in plan.metrics], object),
        },
        {
            "format": FORMAT,
            "store": engine.store.path.name,
            "model": engine.store.provenance.model_name,
            "depth": engine.depth,
            "notes": notes,
            "splits": [describe_split(part, len(documents)) for part in fits if part.held_out],
            "one_sided": [metric.name for metric in plan.metrics if metric.one_sided],
            "question": {k: v for k, v in plan.describe().items() if k not in ("documents", "answers")},
        },
    )
