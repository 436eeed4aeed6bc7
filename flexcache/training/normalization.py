"""Normalise the values of a stream by a mean and a scale that are estimated from some of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from flexcache.training.order import Order, Pool
from flexcache.training.pools import ArraySource, PoolReader

Normalize = Literal["none", "center", "unit_norm", "standard"]
SAMPLE = 64
"""Number of runs that a normalisation is estimated from."""


def estimate_normalization(
    order: Order, sources: Sequence[ArraySource], threads: int, kind: Normalize
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return mean and scale of each source, (features,) float32 each, from some runs that do not depend on the seed."""
    drawn = np.random.default_rng(0).permutation(len(order.runs))[:SAMPLE]
    reader = PoolReader(order.rows, sources, True, threads, [])
    try:
        _, _, arrays = next(reader.read_pools([Pool(order.runs[drawn], [])]))
    finally:
        reader.close()
    means, scales = [], []
    for array, source in zip(arrays, sources, strict=True):
        values = as_tensor(array, source).double()
        mean = torch.zeros(values.shape[1]) if kind == "unit_norm" else values.mean(0)
        away = values - mean
        if kind == "standard":
            deviation = away.square().mean(0).sqrt()
            scale = torch.where(deviation > 0, 1 / deviation, 1.0)
        elif kind == "unit_norm":
            scale = (values.shape[1] / away.square().sum(1).mean()).sqrt().expand(values.shape[1])
        else:
            scale = torch.ones(values.shape[1])
        means.append(mean.float())
        scales.append(scale.float())
    return means, scales


def as_tensor(bits: NDArray, source: ArraySource) -> torch.Tensor:
    """Return stored bits as a tensor of the stored dtype, without a copy."""
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    signed = bits.view(np.int16 if bits.dtype.itemsize == 2 else np.int32)
    return torch.from_numpy(signed).view(dtype["float32" if source.scaled else source.store.arrays[source.site].dtype])
