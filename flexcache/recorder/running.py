"""Runs a model over the batches of claimed units, and records what is read of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch

from flexcache import hooks
from flexcache.errors import CaptureError
from flexcache.hooks.taps import activations_only
from flexcache.recorder.batch import Batch
from flexcache.recorder.cuda import CudaLane
from flexcache.recorder.objective import OBJECTIVE, by_token, checked
from flexcache.recorder.progress import CaptureProgress
from flexcache.recorder.reading import Reading
from flexcache.recorder.recorder import Recorder

Sink = Callable[[str, int | None, torch.Tensor], None]
"""Takes the name of an array, a layer, and values of shape (sequences, longest, features…)."""


def run(
    model: torch.nn.Module, reading: Reading, recorder: Recorder, pad: int, bars: CaptureProgress | None = None
) -> None:
    """Fill a recorder's pending units: every batch is run as far as its sites need, and its kept rows are recorded.

    Where a batch does not fit into the memory of the device, its unit is begun again with smaller batches, and so
    are those that follow; the ledger records the budget of each.

    Raises
    ------
    CaptureError
        One sequence alone does not fit, or the disk refuses.
    """
    with forwards(model, reading, pad, _sink(recorder, device_of(model))) as forward, recorder:
        advance: Callable[[], None] = bars.capturing(recorder) if bars else lambda: None
        for unit in recorder.units():
            full = ""
            try:
                for batch in recorder.begin(unit):
                    with recorder.filling(batch):
                        forward(batch)
                    advance()
            except torch.OutOfMemoryError as error:
                full = str(error)
            if full:  # not above: the error holds the tensors of the forward
                recorder.abandon()
                smaller_batches(recorder, full, bars)
            else:
                recorder.commit()


def try_largest(
    model: torch.nn.Module, reading: Reading, recorder: Recorder, pad: int, bars: CaptureProgress | None = None
) -> None:
    """Run the largest batch and keep nothing, so that a lack of memory shows, and is met, before anything is written.

    Raises
    ------
    CaptureError
        One sequence alone does not fit.
    """
    with forwards(model, reading, pad, lambda array, layer, values: None) as forward:
        while True:
            try:
                return forward(recorder.largest())
            except torch.OutOfMemoryError as error:
                full = str(error)
            smaller_batches(recorder, full, bars)


def smaller_batches(recorder: Recorder, found: str, bars: CaptureProgress | None = None) -> None:
    """Halve the budget of tokens after a batch did not fit into the device's memory.

    Raises
    ------
    CaptureError
        The largest batch is one sequence already.
    """
    sequences, longest = recorder.largest().shape
    if sequences == 1:
        raise CaptureError(
            "one sequence alone does not fit into the device's memory",
            where=str(recorder.store.path),
            expected=f"room for a forward of {longest} tokens",
            found=found.partition("\n")[0],
            remedy="lower max_length, in a new store, or spread the model over more devices",
        )
    recorder.batch_tokens = math.ceil(sequences / 2) * longest
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if bars:
        bars.say(f"out of memory: going on with batches of {recorder.batch_tokens:,} tokens")


@contextmanager
def forwards(model: torch.nn.Module, reading: Reading, pad: int, sink: Sink) -> Iterator[Callable[[Batch], None]]:
    """Give a function that runs the model over a batch, right-padded, and feeds what is read of it to *sink*.

    The forward stops after the last site; with an objective it runs to the end, and back.
    """
    device, objective = device_of(model), reading.objective
    now: list[Batch] = []

    def take(tap: hooks.Tap, values: torch.Tensor) -> None:
        transform = reading.transforms.get(tap.array)
        values = values.detach()
        sink(tap.array, tap.layer, values if transform is None else transform(values, now[0]))

    def forward(batch: Batch) -> None:
        now[:] = [batch]
        inputs = {
            "input_ids": torch.from_numpy(batch.input_ids(pad)).to(device),
            "attention_mask": torch.from_numpy(batch.attention_mask()).to(device),
        }
        if objective is None:
            taps.forward(**inputs)
            return
        value = taps.differentiate(lambda output: checked(objective(output, batch), batch), **inputs)
        spread = by_token(value, batch)
        if spread is not None:
            sink(OBJECTIVE, None, spread)

    flowing = nullcontext() if objective is None else activations_only(model)
    with flowing, hooks.Taps(model, reading.taps, take, stop=objective is None) as taps:
        yield forward


def device_of(model: torch.nn.Module) -> torch.device:
    """Return where the first of a model's weights is."""
    return next(model.parameters(), torch.empty(0)).device


def _sink(recorder: Recorder, device: torch.device) -> Sink:
    if device.type != "cuda":
        return recorder.record
    lane = CudaLane(device)
    dtypes = {name: getattr(torch, array.dtype) for name, array in recorder.store.arrays.items()}

    def take(array: str, layer: int | None, values: torch.Tensor) -> None:
        content, n_rows = lane.rows(recorder.current(), values, dtypes[array])
        recorder.append(array, layer, content, n_rows, lane.copy)

    return take
