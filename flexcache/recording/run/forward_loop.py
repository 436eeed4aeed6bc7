"""Runs a model over the batches of claimed units, and records what is read of it."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

from flexcache import hooks
from flexcache.errors import CaptureError
from flexcache.hooks.read.activation_hooks import activations_only
from flexcache.hooks.read.measure import input_device
from flexcache.model import native_bfloat16
from flexcache.parallel.fsdp import settle
from flexcache.paths import shown
from flexcache.recording.forward.batch import Batch
from flexcache.recording.forward.capture_targets import CaptureTargets
from flexcache.recording.forward.image_inputs import Padding, padding, tensors
from flexcache.recording.forward.objective import OBJECTIVE, by_token, checked
from flexcache.recording.run.cuda_sink import CudaLane, pinned_slab
from flexcache.recording.run.model_parallel_group import DONE, IDLE, ModelParallelGroup
from flexcache.recording.run.progress import CaptureProgress, time_table
from flexcache.recording.run.recorder import Recorder
from flexcache.site import PATTERN
from flexcache.store.format.text import size
from flexcache.store.write.election import POLL
from flexcache.store.write.slabs import Slab, anonymous_slab

SLOW = (
    "this processor has no instructions for bfloat16: a forward may take 40 times as long as in float32. "
    "Load the model in float32; dtype: bfloat16 still stores two bytes a value"
)

FAILURES = (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError, AssertionError)
"""Errors that the code of a model raises on inputs that it cannot run."""

Sink = Callable[[str, int | None, torch.Tensor], None]
"""Takes the name of an array, a layer, and values of shape (sequences, longest, features…)."""


def complete(
    model: torch.nn.Module,
    tokenizer: Any,
    targets: CaptureTargets,
    recorder: Recorder,
    bars: CaptureProgress,
    group: ModelParallelGroup,
    name: Any = None,
    unchanged: Callable[[], None] = lambda: None,
) -> None:
    """Fill a recorder's pending units, after a try of the largest batch, and say what it took.

    *name* is the store's for people, where the recorder fills a part of it that is not in place yet.

    Raises
    ------
    CaptureError
        See `run`.
    """
    store, name = recorder.store, shown(recorder.store.path if name is None else name)
    if not recorder.pending():
        bars.say(f"{name} is complete: nothing to do")
        return
    if in_bfloat16(model) and not native_bfloat16():
        bars.say(SLOW)
    began, pad = time.perf_counter(), padding(model, tokenizer)
    try_largest(model, targets, recorder, pad, bars, group)
    run(model, targets, recorder, pad, bars, group, unchanged)
    stats, seconds = recorder.stats, time.perf_counter() - began
    bars.console.print(time_table(stats, seconds))
    speed = f"{stats.tokens / seconds:,.0f} tokens/s, {size(stats.bytes / seconds)}/s"
    done = f"{stats.rows:,} rows" + ("" if stats.rows == store.n_rows else " by this process")
    bars.say(f"{done}, {size(stats.bytes)} in {seconds:.1f} s ({speed}) → {name}")


def in_bfloat16(model: torch.nn.Module) -> bool:
    """Return whether a model computes in bfloat16 on a processor."""
    first = next(model.parameters(), None)
    return first is not None and first.dtype == torch.bfloat16 and input_device(model).type == "cpu"


def allocation(model: torch.nn.Module) -> Callable[[int], Slab]:
    """Return what makes the slabs for a model: pinned memory where it is on a GPU."""
    return pinned_slab if input_device(model).type == "cuda" else anonymous_slab


def run(
    model: torch.nn.Module,
    targets: CaptureTargets,
    recorder: Recorder,
    pad: Padding,
    bars: CaptureProgress | None = None,
    group: ModelParallelGroup | None = None,
    unchanged: Callable[[], None] = lambda: None,
) -> None:
    """Fill a recorder's pending units: every batch is run as far as its sites need, and its kept rows are recorded.

    Where a batch does not fit into the memory of the device, its unit is begun again with smaller batches, and so
    are those that follow; the ledger records the budget of each. Before a unit is committed, *unchanged* may raise an
    error: then nothing of the unit is kept.

    Raises
    ------
    CaptureError
        One sequence alone does not fit, a forward fails, or the disk refuses. Where a model is on several processes, a
        batch that does not fit.
    """
    group = group or ModelParallelGroup(model)
    with forwards(model, targets, pad, _sink(recorder, input_device(model)), group) as forward, recorder:
        advance: Callable[[], None] = bars.capturing(recorder) if bars else lambda: None
        batches: deque[Batch] = deque()
        unit = IDLE
        while True:
            if not batches:
                if unit >= 0:
                    unchanged()
                    group.commit(recorder)
                unit = group.claim(recorder)
                batches.extend(recorder.begin(unit) if unit >= 0 else ())
            running, done = group.agree(bool(batches), unit == DONE)
            if batches:
                batch, full = batches.popleft(), ""
                try:
                    with recorder.filling(batch):
                        forward(batch)
                except torch.OutOfMemoryError as error:
                    full = str(error)
                except FAILURES as error:
                    raise _failed(recorder, batch, error) from error
                if full:  # not above: the error holds the tensors of the forward
                    recorder.abandon()
                    smaller_batches(recorder, full, bars, group)
                    batches.clear()
                    unit = IDLE
                advance()
            elif running:
                forward(None)
            elif done:
                advance()
                return
            else:
                recorder.on_wait(len(recorder.pending()))
                time.sleep(POLL)


def try_largest(
    model: torch.nn.Module,
    targets: CaptureTargets,
    recorder: Recorder,
    pad: Padding,
    bars: CaptureProgress | None = None,
    group: ModelParallelGroup | None = None,
) -> None:
    """Run the largest batch and keep nothing, so that a lack of memory shows, and is met, before anything is written.

    Raises
    ------
    CaptureError
        See `run`.
    """
    group = group or ModelParallelGroup(model)
    with forwards(model, targets, pad, lambda array, layer, values: None, group) as forward:
        while True:
            try:
                return forward(recorder.largest())
            except torch.OutOfMemoryError as error:
                full = str(error)
            except FAILURES as error:
                raise _failed(recorder, recorder.largest(), error) from error
            smaller_batches(recorder, full, bars, group)


def _failed(recorder: Recorder, batch: Batch, error: Exception) -> CaptureError:
    sequences, longest = batch.extent
    return CaptureError(
        "a forward fails: the model, a hook on it, a transform or the objective",
        where=f"{recorder.store.path}, unit {batch.unit}, batch {batch.index}",
        expected=f"a forward of {sequences} × {longest} tokens",
        found=f"{type(error).__name__}: {error}",
        remedy="a new store with documents that the model can run; units that are committed are kept",
    )


def smaller_batches(recorder: Recorder, found: str, bars: CaptureProgress | None, group: ModelParallelGroup) -> None:
    """Halve the budget of tokens after a batch did not fit into the device's memory.

    Raises
    ------
    CaptureError
        The largest batch is one sequence already, or others are in the middle of the same forward.
    """
    sequences, longest = recorder.largest().extent
    if sequences == 1:
        raise CaptureError(
            "one sequence alone does not fit into the device's memory",
            where=str(recorder.store.path),
            expected=f"room for a forward of {longest} tokens",
            found=found.partition("\n")[0],
            remedy="lower max_length, in a new store, or spread the model over more devices",
        )
    budget = math.ceil(sequences / 2) * longest
    if not group.alone:
        raise CaptureError(
            "a batch does not fit into the device's memory, and other processes are in the same forward",
            where=str(recorder.store.path),
            found=found.partition("\n")[0],
            remedy=f"run it again with batch_tokens {budget}: units that are committed are kept",
        )
    recorder.batch_tokens = budget
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if bars:
        bars.say(f"out of memory: going on with batches of {recorder.batch_tokens:,} tokens")


@contextmanager
def forwards(
    model: torch.nn.Module, targets: CaptureTargets, pad: Padding, sink: Sink, group: ModelParallelGroup
) -> Iterator[Callable[[Batch | None], None]]:
    """Give a function that runs the model over a batch, right-padded, and feeds what is read of it to *sink*.

    On several processes each sink gets what its process writes. Without a batch, one token is run and nothing is read,
    for others who share the weights. The forward stops after the last site; with an objective it runs to the end, and
    back.
    """
    objective, gathering = targets.objective, group.gathering
    numbers = {point: number for number, point in enumerate(targets.points)}
    now: list[Batch] = []

    def take(point: hooks.HookPoint, tensor: torch.Tensor) -> None:
        if not now:
            return
        batch, values = now[0], tensor.detach()
        if gathering is not None:
            whole = gathering.whole(point, numbers[point], values)
            if whole is None:
                return
            longest = batch.shape[1]
            values = point.shaped(whole, (batch.shape[0], gathering.width(longest)))
            values = values[:, :, :longest, :longest] if point.side == PATTERN else values[:, :longest]
        transform = targets.transforms.get(point.array)
        sink(point.array, point.layer, values if transform is None else transform(values, batch))

    def forward(batch: Batch | None) -> None:
        now[:] = [] if batch is None else [batch]
        batch = ONE_TOKEN if batch is None else batch
        width = None if gathering is None else gathering.width(batch.shape[1])
        inputs = tensors(model, batch.inputs(pad, width))
        if gathering is not None:
            inputs |= gathering.inputs(inputs["input_ids"])
            inputs = inputs if gathering.masked else {k: v for k, v in inputs.items() if k != "attention_mask"}
        if objective is None:
            points.forward(**inputs)
            return
        value = points.differentiate(lambda output: checked(objective(output, batch), batch), **inputs)
        spread = by_token(value, batch)
        if spread is not None and now and group.leads:
            sink(OBJECTIVE, None, spread)

    own = targets.points if gathering is None else gathering.owned(targets.points)
    stop = objective is None and (gathering is None or gathering.stop)
    flowing = nullcontext() if objective is None else activations_only(model)
    try:
        with flowing, hooks.ActivationHooks(model, own, take, stop=stop, shape=gathering is None) as points:
            yield forward
    finally:
        settle(model)


ONE_TOKEN = Batch(0, 0, range(1), np.zeros(1, np.int64), (np.zeros(1, np.int32),), ((0, 1),))


def _sink(recorder: Recorder, device: torch.device) -> Sink:
    """Return what takes the values of a recorder's keys: of an objective alone there may be values beside them."""
    into, keys = _into(recorder, device), set(recorder.keys)

    def take(array: str, layer: int | None, values: torch.Tensor) -> None:
        if array != OBJECTIVE or (OBJECTIVE, None) in keys:
            into(array, layer, values)

    return take


def _into(recorder: Recorder, device: torch.device) -> Sink:
    if device.type != "cuda":
        return recorder.record
    lane = CudaLane(device)
    dtypes = {name: getattr(torch, array.dtype) for name, array in recorder.store.arrays.items()}

    def take(array: str, layer: int | None, values: torch.Tensor) -> None:
        if recorder.store.arrays[array].dtype == "int8":  # scaled on the host
            recorder.record(array, layer, values)
            return
        content, n_rows = lane.rows(recorder.current(), values, dtypes[array])
        recorder.append(array, layer, content, n_rows, lane.copy)

    return take
