"""Runs a model over the batches of claimed units, and records what its taps read."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from flexcache import hooks
from flexcache.errors import CaptureError
from flexcache.recorder.batch import Batch
from flexcache.recorder.cuda import CudaLane
from flexcache.recorder.progress import CaptureProgress
from flexcache.recorder.recorder import Recorder


def run(
    model: torch.nn.Module,
    taps: tuple[hooks.Tap, ...],
    recorder: Recorder,
    pad: int,
    bars: CaptureProgress | None = None,
) -> None:
    """Fill a recorder's pending units: every batch is run as far as the taps need, and its kept rows are recorded.

    Where a batch does not fit into the memory of the device, its unit is begun again with smaller batches, and so
    are those that follow; the ledger records the budget of each.

    Raises
    ------
    CaptureError
        One sequence alone does not fit, or the disk refuses.
    """
    device = device_of(model)
    with hooks.Taps(model, taps, _sink(recorder, device)) as live, recorder:
        advance: Callable[[], None] = bars.capturing(recorder) if bars else lambda: None
        for unit in recorder.units():
            full = ""
            try:
                for batch in recorder.begin(unit):
                    with recorder.filling(batch):
                        forward(live, batch, pad, device)
                    advance()
            except torch.OutOfMemoryError as error:
                full = str(error)
            if full:  # not above: the error holds the tensors of the forward
                recorder.abandon()
                smaller_batches(recorder, full, bars)
            else:
                recorder.commit()


def try_largest(
    model: torch.nn.Module,
    taps: tuple[hooks.Tap, ...],
    recorder: Recorder,
    pad: int,
    bars: CaptureProgress | None = None,
) -> None:
    """Run the largest batch and keep nothing, so that a lack of memory shows, and is met, before anything is written.

    Raises
    ------
    CaptureError
        One sequence alone does not fit.
    """
    device = device_of(model)
    with hooks.Taps(model, taps, lambda tap, values: None) as trial:
        while True:
            try:
                return forward(trial, recorder.largest(), pad, device)
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


def forward(taps: hooks.Taps, batch: Batch, pad: int, device: torch.device) -> None:
    """Run the model over one batch, right-padded, as far as its taps need."""
    taps.forward(
        input_ids=torch.from_numpy(batch.input_ids(pad)).to(device),
        attention_mask=torch.from_numpy(batch.attention_mask()).to(device),
    )


def device_of(model: torch.nn.Module) -> torch.device:
    """Return where the first of a model's weights is."""
    return next(model.parameters(), torch.empty(0)).device


def _sink(recorder: Recorder, device: torch.device) -> Callable[[hooks.Tap, torch.Tensor], None]:
    if device.type != "cuda":
        return lambda tap, values: recorder.record(tap.array, tap.layer, values)
    lane = CudaLane(device)
    dtypes = {name: getattr(torch, array.dtype) for name, array in recorder.store.arrays.items()}

    def take(tap: hooks.Tap, values: torch.Tensor) -> None:
        content, n_rows = lane.rows(recorder.current(), values, dtypes[tap.array])
        recorder.append(tap.array, tap.layer, content, n_rows, lane.copy)

    return take
