"""The piece of an activation that one rank holds: its place in the whole, and its kind of tensor."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from flexcache.errors import LayoutError


@dataclass(frozen=True)
class Layout:
    """The place of a rank's piece in the whole activation.

    Attributes
    ----------
    shape
        The shape without tensor parallelism, of the rows of this data-parallel rank.
    sharded
        The dim of which each tensor-parallel rank holds a part; None if each holds all of it.
    rows
        The dim along which data-parallel copies and microbatches are joined; None if they share the tensor, as with
        position embeddings.
    gradient
        True for a gradient; that of a shared tensor is the sum of what each copy and microbatch adds to it.
    """

    shape: tuple[int, ...]
    sharded: int | None
    rows: int | None
    gradient: bool = False


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@dataclass(frozen=True)
class Local:
    """The plain tensor that a rank holds of an activation, and the way back to the tensor of the model.

    Attributes
    ----------
    tensor
        In the autograd graph of the activation.
    known
        True if the type of the activation states its layout; then *sharded* is its sharded dim and *shape* the whole's.
    """

    tensor: torch.Tensor
    restore: Callable[[torch.Tensor], torch.Tensor] = _same
    known: bool = False
    sharded: int | None = None
    shape: tuple[int, ...] = ()


def localize(tensor: torch.Tensor, where: str) -> Local:
    """Return the part of *tensor* on this rank: the local part of a DTensor, the result of an asynchronous collective.

    A DTensor of partial sums is reduced first, by all its ranks.

    Raises
    ------
    LayoutError
        A DTensor is sharded along several dims, or has a sum that only its own module can reduce.
    """
    if type(tensor) is torch.Tensor or "torch.distributed.tensor" not in sys.modules:
        return Local(tensor)
    from torch.distributed._functional_collectives import AsyncCollectiveTensor
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.placement_types import Partial

    if isinstance(tensor, AsyncCollectiveTensor):
        return Local(_Wait.apply(tensor))
    if not isinstance(tensor, DTensor):
        return Local(tensor)
    if any(type(placement).__name__ == "_MaskPartial" for placement in tensor.placements):
        raise LayoutError(
            "the sum of a parallel embedding is not reduced where the hook reads it",
            where=where,
            found=str(tuple(tensor.placements)),
            remedy="wrap the model after parallelize_module, so that the hook reads what the embedding returns",
        )
    if any(isinstance(placement, Partial) for placement in tensor.placements):
        done = [Replicate() if isinstance(placement, Partial) else placement for placement in tensor.placements]
        tensor = tensor.redistribute(placements=done)
    shards = [placement.dim for placement in tensor.placements if type(placement) is Shard]
    if len(shards) > 1 or len(shards) + sum(p.is_replicate() for p in tensor.placements) < len(tensor.placements):
        raise LayoutError(
            "an activation is sharded along more than one dim, or in strides",
            where=where,
            found=str(tuple(tensor.placements)),
            remedy="hook a module whose activation is sharded along one",
        )
    mesh, placements, shape, stride = tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride()

    def restore(local: torch.Tensor) -> torch.Tensor:
        return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)

    dim = shards[0] % tensor.ndim if shards else None
    return Local(tensor.to_local(), restore, True, dim, tuple(shape))


def find_sharded_dim(
    shape: tuple[int, ...], whole: tuple[int, ...] | None, where: str, tp: int, why: str = ""
) -> int | None:
    """Return the dim along which a piece of *shape* is a shard of *whole*, or None if it is all of it.

    Raises
    ------
    LayoutError
        No single dim explains the difference, or *whole* is not known, for the reason *why*.
    """
    if whole is None:
        raise LayoutError(
            "the layout of an activation is not known, since its whole shape is not",
            where=where,
            found=f"{shape} on this rank of {tp} tensor-parallel ones" + (f"; {why}" if why else ""),
            remedy="give the hook function an expected_shape, None for dims that are not sharded",
        )
    differ = [dim for dim, (a, b) in enumerate(zip(shape, whole)) if a != b]
    if len(shape) != len(whole) or len(differ) > 1 or any(shape[dim] > whole[dim] for dim in differ):
        raise LayoutError(
            "the layout of an activation cannot be explained",
            where=where,
            expected=f"{whole}, or a shard of it along one dim",
            found=f"{shape} on this rank of {tp} tensor-parallel ones",
            remedy="hook another module; inside experts the rows are not the tokens in order",
        )
    return differ[0] if differ else None


class _Wait(torch.autograd.Function):
    """Finish an asynchronous collective inside the graph: its own ``wait()`` returns a tensor outside it."""

    @staticmethod
    def forward(ctx: Any, tensor: Any) -> torch.Tensor:
        return tensor.wait().view_as(tensor.elem)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad
