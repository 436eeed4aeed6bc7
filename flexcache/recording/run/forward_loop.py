"""Run a model over the batches of claimed units, and record its activations."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from flexcache.cpu import has_native_bfloat16
from flexcache.errors import CaptureError
from flexcache.hooks.read.measure import input_device
from flexcache.paths import shown
from flexcache.recording.forward.batch import Batch, Padding
from flexcache.recording.forward.capture_targets import CaptureTargets
from flexcache.recording.forward.image_inputs import padding
from flexcache.recording.forward.objective import OBJECTIVE
from flexcache.recording.run.batch_forward import FAILURES, Sink, open_forward
from flexcache.recording.run.model_parallel_group import DONE, IDLE, ModelParallelGroup
from flexcache.recording.run.progress import CaptureProgress, time_table
from flexcache.recording.run.recorder import Recorder
from flexcache.store.format.text import size
from flexcache.store.write.election import POLL

SLOW = (
    "this processor has no instructions for bfloat16: a forward may take 40 times as long as in float32. "
    "Load the model in float32; dtype: bfloat16 still stores two bytes a value"
)


Opener = Callable[
    [torch.nn.Module, CaptureTargets, Padding, Sink, ModelParallelGroup],
    AbstractContextManager[Callable[[Batch | None], None]],
]
"""Opens the forward of a batch, as `open_forward` does."""


def complete_store(
    model: torch.nn.Module,
    tokenizer: Any,
    targets: CaptureTargets,
    recorder: Recorder,
    bars: CaptureProgress,
    group: ModelParallelGroup,
    name: Any = None,
    unchanged: Callable[[], None] = lambda: None,
    opener: Opener = open_forward,
) -> None:
    """Fill a recorder's pending units, and print what it took; errors as of `run_pending_units`.

    Where the memory is that of a device, the largest batch is tried first. A CPU does not raise an error for too large
    a batch, so that a trial would show nothing.

    *name* is shown for the store, if the recorder fills an extension that is not in place yet, or several stores.
    """
    name = shown(recorder.store.path if name is None else name)
    if not recorder.growing and not recorder.pending():
        bars.say(f"{name} is complete: nothing to do")
        return
    if in_bfloat16(model) and not has_native_bfloat16():
        bars.say(SLOW)
    began, pad = time.perf_counter(), padding(model, tokenizer)
    if on_device(model):
        try_largest(model, targets, recorder, pad, bars, group, opener)
    run_pending_units(model, targets, recorder, pad, bars, group, unchanged, opener)
    stats, seconds = recorder.stats, time.perf_counter() - began
    bars.console.print(time_table(stats, seconds))
    speed = f"{stats.tokens / seconds:,.0f} tokens/s, {size(stats.bytes / seconds)}/s"
    done = f"{stats.rows:,} rows" + ("" if stats.rows == recorder.store.n_rows else " by this process")
    bars.say(f"{done}, {size(stats.bytes)} in {seconds:.1f} s ({speed}) → {name}")


def on_device(model: torch.nn.Module) -> bool:
    """Return True if a model runs in the memory of a device, even if only some of its modules do."""
    devices = {input_device(model).type, *(parameter.device.type for parameter in model.parameters())}
    return not devices <= {"cpu", "meta"}


def in_bfloat16(model: torch.nn.Module) -> bool:
    """Return True if a model computes in bfloat16 on a CPU."""
    first = next(model.parameters(), None)
    return first is not None and first.dtype == torch.bfloat16 and input_device(model).type == "cpu"


def run_pending_units(
    model: torch.nn.Module,
    targets: CaptureTargets,
    recorder: Recorder,
    pad: Padding,
    bars: CaptureProgress | None = None,
    group: ModelParallelGroup | None = None,
    unchanged: Callable[[], None] = lambda: None,
    opener: Opener = open_forward,
) -> None:
    """Fill a recorder's pending units: run every batch as far as its sites need, and record its kept rows.

    If a batch does not fit into the memory of the device, its unit starts again with smaller batches, which later units
    keep; the ledger records the budget of each unit. Before a unit is committed, *unchanged* may raise an error: then
    nothing of the unit is kept.

    Raises
    ------
    CaptureError
        One sequence alone does not fit, or any batch if the model is on several processes; a forward fails; the disk
        refuses.
    """
    group, bars = group or ModelParallelGroup(model), bars or CaptureProgress(show=False)
    with opener(model, targets, pad, _sink(recorder), group) as forward, recorder:
        bar = bars.capturing(recorder)
        batches: deque[Batch] = deque()
        unit = IDLE
        while True:
            if not batches and unit != DONE:
                if unit >= 0:
                    unchanged()
                    group.commit_unit(recorder)
                unit = group.claim_unit(recorder)
                batches.extend(recorder.begin_unit(unit) if unit >= 0 else ())
            running, done = group.agree_on_work(bool(batches), unit == DONE)
            if batches:
                batch, full = batches.popleft(), ""
                try:
                    with recorder.unit_writer.fill_batch(batch):
                        forward(batch)
                except torch.OutOfMemoryError as error:
                    full = str(error)
                except FAILURES as error:
                    raise _failed(recorder, batch, error) from error
                if full:  # not above: the error holds the tensors of the forward
                    recorder.abandon_unit()
                    lower_batch_tokens(recorder, full, bars, group)
                    batches.clear()
                    unit = IDLE
                bar.advance()
            elif running:
                forward(None)
            elif done:
                bar.advance()
                return
            else:
                bar.wait(len(recorder.pending()))
                time.sleep(POLL)


def try_largest(
    model: torch.nn.Module,
    targets: CaptureTargets,
    recorder: Recorder,
    pad: Padding,
    bars: CaptureProgress | None = None,
    group: ModelParallelGroup | None = None,
    opener: Opener = open_forward,
) -> None:
    """Run the largest batch once as a dry run, so that an out-of-memory error is handled before anything is written."""
    group, bars = group or ModelParallelGroup(model), bars or CaptureProgress(show=False)
    with opener(model, targets, pad, lambda batch, array, layer, values: None, group) as forward:
        while True:
            try:
                return forward(recorder.largest_batch())
            except torch.OutOfMemoryError as error:
                full = str(error)
            except FAILURES as error:
                raise _failed(recorder, recorder.largest_batch(), error) from error
            lower_batch_tokens(recorder, full, bars, group)


def _failed(recorder: Recorder, batch: Batch, error: Exception) -> CaptureError:
    sequences, longest = batch.extent
    return CaptureError(
        "a forward fails: the model, a hook on it, a transform or the objective",
        where=f"{recorder.store.path}, unit {batch.unit}, batch {batch.index}",
        expected=f"a forward of {sequences} × {longest} tokens",
        found=f"{type(error).__name__}: {error}",
        remedy="capture documents that the model can run into a new store; committed units are kept",
    )


def lower_batch_tokens(recorder: Recorder, found: str, bars: CaptureProgress, group: ModelParallelGroup) -> None:
    """Halve the budget of tokens after an out-of-memory error.

    CaptureError if the largest batch is one sequence already, or other processes are in the same forward.
    """
    sequences, longest = recorder.largest_batch().extent
    if sequences == 1:
        raise CaptureError(
            "one sequence alone does not fit into the device's memory",
            where=str(recorder.store.path),
            expected=f"room for a forward of {longest} tokens",
            found=found.partition("\n")[0],
            remedy="lower max_length in a new store, or distribute the model over more devices",
        )
    budget = math.ceil(sequences / 2) * longest
    if not group.alone:
        raise CaptureError(
            "a batch does not fit into the device's memory, and other processes are in the same forward",
            where=str(recorder.store.path),
            found=found.partition("\n")[0],
            remedy=f"run it again with batch_tokens {budget}: committed units are kept",
        )
    recorder.lower_batch_tokens(budget)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    bars.say(f"out of memory: continuing with batches of {budget:,} tokens")


def _sink(recorder: Recorder) -> Sink:
    """Return the sink of a recorder's keys; the values of an objective may not be among them."""
    put_padded, without = recorder.unit_writer.put_padded, (OBJECTIVE, None) not in recorder.keys

    def put_values(batch: Batch, array: str, layer: int | None, values: torch.Tensor) -> None:
        if not (without and array == OBJECTIVE):
            put_padded(array, layer, values)

    return put_values
