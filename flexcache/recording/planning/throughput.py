"""Measure the throughput and the memory of a capture in a short trial."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from flexcache import hooks
from flexcache.array_spec import DTYPES
from flexcache.errors import CaptureError
from flexcache.hooks.locate.evaluation_mode import evaluation_mode
from flexcache.recording.checks.attention_isolation import check_isolation
from flexcache.recording.forward.batch import Batch, Padding
from flexcache.recording.forward.batch_reader import BatchReader
from flexcache.recording.forward.capture_targets import CaptureTargets
from flexcache.recording.run.batch_forward import Sink, open_forward
from flexcache.recording.run.cuda_transfer import transfer_for
from flexcache.recording.run.model_parallel_group import ModelParallelGroup
from flexcache.store.format.int8 import outlier_count
from flexcache.store.read.store import Store
from flexcache.store.write.range_error import locating_values
from flexcache.store.write.slabs import LARGEST_SLAB

BATCHES_AT_LEAST = 4


@dataclass(frozen=True)
class Trial:
    """The time and memory of a few batches.

    Attributes
    ----------
    tokens : int
        Tokens of the batches that were run, padding included.
    error : float
        Two standard errors of the rate, relative to it.
    host_bytes, device_bytes : int
        Peak memory of this process, and of the device; the latter is 0 on a CPU.
    """

    batches: int
    tokens: int
    seconds: float
    error: float
    host_bytes: int
    device_bytes: int

    @property
    def rate(self) -> float:
        """Tokens a second, padding included."""
        return self.tokens / self.seconds


def try_batches(
    model: torch.nn.Module,
    targets: CaptureTargets,
    plan: Path,
    pad: Padding,
    *,
    seconds: float = 10.0,
    seed: int = 0,
    progress: Callable[[float], None] = lambda spent: None,
) -> Trial:
    """Run batches of a planned store for some *seconds*, read their rows from the hooks, and keep none.

    The largest batch is run first, as a warm-up; then all batches of the *plan*, a store without activations, in random
    order, repeatedly. Writing is not part of the trial. *progress* is called with the seconds spent so far.

    Raises
    ------
    CaptureError
        A batch does not fit into the memory of the device.
    RangeError
        A value does not fit the storage dtype.
    """
    store = Store(plan)
    reader = BatchReader(plan)
    measured: list[tuple[int, float]] = []
    with evaluation_mode(model), closing(ModelParallelGroup(model)) as group, ExitStack() as stack:
        example = None if isinstance(pad, int) else pad.example(model)
        hooks.check_sites(model, targets.points, example=example, reader=group.read_example, alone=group.alone)
        if store.spec.isolated:
            check_isolation(model, targets, pad, group)
        forward = stack.enter_context(open_forward(model, targets, pad, _discarding_sink(store, model), group))
        largest = reader.read_largest()
        spent = 0.0
        for batch in _endless(reader, store.n_units, largest, seed):
            began = time.perf_counter()
            try:
                forward(batch)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
            except torch.OutOfMemoryError as error:
                raise CaptureError(
                    "a batch does not fit into the device's memory",
                    expected=f"room for a forward of {batch.shape[0]} × {batch.shape[1]} tokens",
                    found=str(error).partition("\n")[0],
                    remedy="lower batch_tokens",
                ) from None
            took = time.perf_counter() - began
            if batch is not largest:
                measured.append((batch.shape[0] * batch.shape[1], took))
                spent += took
                progress(spent)
            if spent >= seconds and len(measured) >= BATCHES_AT_LEAST:
                break
    tokens = sum(count for count, _ in measured)
    return Trial(
        batches=len(measured),
        tokens=tokens,
        seconds=spent,
        error=_error(measured),
        host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
        device_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
    )


def _endless(reader: BatchReader, units: int, largest: Batch, seed: int) -> Iterator[Batch]:
    """Yield the largest batch, then all batches in random order, repeatedly."""
    yield largest
    batches = [batch for unit in range(units) for batch in reader.read_unit(unit)]
    generator = np.random.default_rng(seed)
    while True:
        yield from (batches[place] for place in generator.permutation(len(batches)))


def _error(measured: list[tuple[int, float]]) -> float:
    """Return two standard errors of Σ tokens ÷ Σ seconds, relative, by linearization of the ratio."""
    tokens, seconds = (np.array(values, float) for values in zip(*measured, strict=True))
    rest = tokens - seconds * tokens.sum() / seconds.sum()
    return 2 * statistics.stdev(rest.tolist()) * float(np.sqrt(len(rest)) / tokens.sum())


def _discarding_sink(store: Store, model: torch.nn.Module) -> Sink:
    """Return a sink that copies rows as a recorder does, always into the same slab."""
    transfer = transfer_for(model)
    slab = transfer.allocate(LARGEST_SLAB)

    def copy_rows(batch: Batch, array: str, layer: int | None, values: torch.Tensor) -> None:
        if array not in store.arrays:  # an objective whose values are not stored
            return
        with locating_values(store, array, layer, batch.rows.start):
            dtype, outliers = DTYPES[store.arrays[array].dtype], outlier_count(array, store.arrays)
            pieces = transfer.rows_of(batch, values, dtype, outliers)
        for content, spans in pieces:
            for start, count in spans:
                for at in range(start, start + count, LARGEST_SLAB):
                    transfer.copy(slab, 0, content, at, min(LARGEST_SLAB, start + count - at))
        slab.fences.clear()  # nothing waits for bytes that nobody reads

    return copy_rows
