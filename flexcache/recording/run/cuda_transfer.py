"""Copy rows from a CUDA device into pinned slabs while it computes.

The project's tests do not run this: its CI has no GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from flexcache.hooks.read.measure import input_device
from flexcache.recording.forward.batch import Batch
from flexcache.recording.run.row_transfer import Rows, RowTransfer
from flexcache.store.write.slabs import Slab


def transfer_for(model: torch.nn.Module) -> RowTransfer:
    """Return the transfer of rows from the device of a model."""
    device = input_device(model)
    return CudaTransfer(device) if device.type == "cuda" else RowTransfer()


class CudaTransfer(RowTransfer):
    """Copies kept rows on the compute stream, so that a model may reuse its tensors, then to the host on another."""

    def __init__(self, device: torch.device) -> None:
        self._side = torch.cuda.Stream(device)

    def allocate(self, size: int) -> Slab:
        """Return a slab of page-locked memory, which a device can write to without the processor."""
        tensor = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        return Slab(tensor.numpy(), owner=tensor)

    def rows_of(self, batch: Batch, values: torch.Tensor, dtype: np.dtype, outliers: int = 0) -> list[Rows]:
        """Return the rows as one tensor of bytes on the device; int8 is scaled on the host, with a second piece."""
        if dtype == np.int8:
            return super().rows_of(batch, values, dtype, outliers)
        pieces = [values[line][kept] for line, kept in enumerate(batch.kept_positions)]
        rows = torch.stack([piece.float().mean(0) for piece in pieces]) if batch.mean else torch.cat(pieces)
        content = rows.to(getattr(torch, dtype.name)).reshape(-1).view(torch.uint8)
        self._side.wait_stream(torch.cuda.current_stream(values.device))
        content.record_stream(self._side)
        return [(content, [(0, len(content))])]

    def copy(self, slab: Slab, at: int, source: Any, start: int, count: int) -> None:
        """Start a copy into a pinned slab; the writer waits for it through the slab's fence."""
        if isinstance(source, np.ndarray):
            super().copy(slab, at, source, start, count)
            return
        with torch.cuda.stream(self._side):
            slab.owner[at : at + count].copy_(source[start : start + count], non_blocking=True)  # type: ignore[index]
            event = torch.cuda.Event()
            event.record(self._side)
        slab.fences.append(event)
