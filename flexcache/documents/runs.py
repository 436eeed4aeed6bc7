"""Runs of consecutive documents spread over a corpus: a sample that does not need the whole corpus to be read."""

from __future__ import annotations

import numpy as np

RUNS = 64


def spread_runs(count: int, size: int, seed: int = 0) -> list[range]:
    """Return up to 64 runs of equal length, about *size* documents together, one at random in each part of *count*.

    >>> spread_runs(10, 20)
    [range(0, 10)]
    >>> [len(run) for run in spread_runs(10**9, 128)] == [2] * 64
    True
    """
    if count <= size:
        return [range(count)]
    runs = min(RUNS, size)
    length = size // runs
    edges = np.linspace(0, count, runs + 1).astype(np.int64)
    starts = np.random.default_rng(seed).integers(edges[:-1], edges[1:] - length + 1)
    return [range(start, start + length) for start in starts.tolist()]
