"""Rows from a CUDA device into pinned slabs, beside the computation.

Not run by the project's tests: no machine of its CI has a GPU.
"""

from __future__ import annotations

from typing import Any

import torch

from flexcache.recording.forward.batch import Batch
from flexcache.store.write.slabs import Slab


def pinned_slab(size: int) -> Slab:
    """Return a slab of page-locked memory, which a device can copy into on its own."""
    tensor = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    return Slab(tensor.numpy(), owner=tensor)


class CudaLane:
    """Takes kept rows off a device: a private copy on the compute stream, then to the host on a side stream."""

    def __init__(self, device: torch.device) -> None:
        self._side = torch.cuda.Stream(device)

    def rows(self, batch: Batch, values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, int]:
        """Return the batch's rows as bytes in a tensor of their own on the device, and how many rows they are."""
        if batch.mean:
            kept = torch.stack([values[i][places].float().mean(0) for i, places in enumerate(batch.places)])
        else:
            kept = torch.cat([values[i][places] for i, places in enumerate(batch.places)])
        content = kept.to(dtype).reshape(-1).view(torch.uint8)
        self._side.wait_stream(torch.cuda.current_stream(values.device))
        content.record_stream(self._side)
        return content, len(kept)

    def copy(self, slab: Slab, at: int, source: Any, start: int, count: int) -> None:
        """Start a copy into a pinned slab; the writer waits for it through the slab's fence."""
        with torch.cuda.stream(self._side):
            slab.owner[at : at + count].copy_(source[start : start + count], non_blocking=True)  # type: ignore[index]
            event = torch.cuda.Event()
            event.record(self._side)
        slab.fences.append(event)
