"""Measures of a device: seconds, bandwidths, peak memory, and how much copying overlaps with computing."""

from __future__ import annotations

import mmap
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

Interval = tuple[float, float]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """Return the median seconds of a call, after one that is not counted if there are several rounds."""
    seconds, warm = [], rounds > 1
    for number in range(1 - warm, rounds + 1):
        synchronize(device)
        began = time.perf_counter()
        run()
        synchronize(device)
        if number:
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def device_to_host(device: torch.device, size: int) -> float:
    """Return the bytes a second of copies into page-locked memory."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    return size / timed(lambda: target.copy_(source, non_blocking=True), device, 5)


def write_speed(folder: Path, size: int) -> float:
    """Return the bytes a second of writing a file past the page cache, if the folder allows it, and flushing it."""
    slab = mmap.mmap(-1, 4 << 20)
    slab.write(os.urandom(len(slab)))
    path = folder / "raw"

    def write() -> None:
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
        except OSError:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        for _ in range(size // len(slab)):
            os.write(handle, slab)
        os.fsync(handle)
        os.close(handle)
        path.unlink()

    return size / timed(write, torch.device("cpu"), 2)


def forward_memory(run: Callable[[], Any], device: torch.device) -> int:
    """Return the peak bytes that a call takes on a device; 0 on a CPU."""
    if device.type != "cuda":
        run()
        return 0
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def overlap(run: Callable[[], Any], device: torch.device) -> float | None:
    """Return the share of the time of copies to the host in which kernels ran; None on a CPU."""
    if device.type != "cuda":
        run()
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        synchronize(device)
    copies, kernels = [], []
    for event in profile.events() or ():
        if str(event.device_type).endswith("CUDA"):
            span = (float(event.time_range.start), float(event.time_range.end))
            if "Memcpy DtoH" in event.name:
                copies.append(span)
            elif not event.name.startswith(("Mem", "gpu_")):
                kernels.append(span)
    return shared_time(copies, kernels)


def shared_time(parts: Sequence[Interval], others: Sequence[Interval]) -> float | None:
    """Return the share of the time of *parts* in which one of *others* runs; None if they take no time.

    >>> shared_time([(0, 4), (6, 8)], [(1, 3), (2, 7)])
    0.6666666666666666
    """
    merged: list[list[float]] = []
    for start, end in sorted(others):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    total, shared, first = sum(end - start for start, end in parts), 0.0, 0
    for start, end in sorted(parts):
        while first < len(merged) and merged[first][1] <= start:
            first += 1
        at = first
        while at < len(merged) and merged[at][0] < end:
            shared += min(end, merged[at][1]) - max(start, merged[at][0])
            at += 1
    return shared / total if total else None
