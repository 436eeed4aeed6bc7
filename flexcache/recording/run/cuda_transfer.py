"""Copy rows from CUDA devices into pinned slabs while they compute.

The project's tests run the choice of rows on a CPU; `benchmarks/gpu.py` runs the rest where there is a GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from flexcache.hooks.read.measure import input_device
from flexcache.recording.forward.batch import Batch
from flexcache.recording.run.row_transfer import Rows, RowTransfer
from flexcache.store.write.row_encoding import encode_rows
from flexcache.store.write.slabs import Slab

Index = tuple[torch.Tensor, torch.Tensor]
"""Lines and positions of the kept tokens of a batch."""


def transfer_for(model: torch.nn.Module) -> RowTransfer:
    """Return the transfer of rows from the device of a model."""
    return CudaTransfer() if input_device(model).type == "cuda" else RowTransfer()


class CudaTransfer(RowTransfer):
    """Copies kept rows on the compute stream, so that a model may reuse its tensors, then to the host on another.

    A model may lie on several devices: each has a stream of its own, since a copy runs on a stream of its source.
    """

    def __init__(self) -> None:
        self._sides: dict[torch.device, torch.cuda.Stream] = {}
        self._batch: Batch | None = None
        self._indices: dict[torch.device, Index] = {}

    def allocate(self, size: int) -> Slab:
        """Return a slab of page-locked memory, which a device can write to without the processor."""
        tensor = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        return Slab(tensor.numpy(), owner=tensor)

    def rows_of(self, batch: Batch, values: Any, dtype: np.dtype, outliers: int = 0) -> list[Rows]:
        """Return the rows as one tensor of bytes on the device; int8 is scaled on the host, with a second piece."""
        if not getattr(values, "is_cuda", False):  # of a transform, or of a part of the model that is on the CPU
            return super().rows_of(batch, values, dtype, outliers)
        rows = select_rows(batch, values, self._index(batch, values.device))
        if dtype == np.int8:
            return [*encode_rows(rows.float(), dtype, outliers)]
        content = rows.to(getattr(torch, dtype.name)).reshape(-1).view(torch.uint8)
        side = self._side(values.device)
        side.wait_stream(torch.cuda.current_stream(values.device))
        content.record_stream(side)
        return [(content, [(0, len(content))])]

    def copy(self, slab: Slab, at: int, source: Any, start: int, count: int) -> None:
        """Start a copy into a pinned slab; the writer waits for it through the slab's fence."""
        if isinstance(source, np.ndarray):
            super().copy(slab, at, source, start, count)
            return
        side = self._side(source.device)
        with torch.cuda.stream(side):
            slab.owner[at : at + count].copy_(source[start : start + count], non_blocking=True)  # type: ignore[index]
            slab.fences.append(side.record_event(torch.cuda.Event(blocking=True)))  # the writer sleeps until then

    def _side(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._sides:
            self._sides[device] = torch.cuda.Stream(device)
        return self._sides[device]

    def _index(self, batch: Batch, device: torch.device) -> Index:
        """Return the index of a batch on a device, from pinned memory: else each hook would wait for the forward."""
        if batch is not self._batch:
            self._batch, self._indices = batch, {}
        if device not in self._indices:
            lines, positions = (part.pin_memory().to(device, non_blocking=True) for part in kept_index(batch))
            self._indices[device] = lines, positions
        return self._indices[device]


def kept_index(batch: Batch) -> Index:
    """Return the lines and positions of the kept tokens of a batch, in the order of its rows: int64, on the CPU."""
    kept = [np.arange(one.start, one.stop) if isinstance(one, slice) else one for one in batch.kept_positions]
    lines = np.repeat(np.arange(len(kept)), [len(one) for one in kept])
    return torch.from_numpy(lines), torch.from_numpy(np.concatenate(kept).astype(np.int64))


def select_rows(batch: Batch, values: torch.Tensor, index: Index) -> torch.Tensor:
    """Return the rows of padded activations, shape (rows, …), on their device; means over sequences in float32."""
    rows = values[index]
    if not batch.mean:
        return rows
    pieces = rows.float().split([sequence.n_kept for sequence in batch.sequences])
    return torch.stack([piece.mean(0) for piece in pieces])
