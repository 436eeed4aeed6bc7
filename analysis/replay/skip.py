"""Blocks that are not run: what they would have given comes from a store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from flexcache.errors import AnalysisError
from flexcache.hooks.blocks import find_blocks
from flexcache.hooks.names import inner

Container = Callable[[torch.Tensor], Any]
"""Puts a residual stream into what a block returns: itself, or a tuple that begins with it."""


@contextmanager
def skipping(model: nn.Module, count: int, residual: torch.Tensor, container: Container) -> Iterator[None]:
    """Let the first *count* blocks of a model return *residual*, of shape (sequences, longest, hidden), and not run.

    The forward of each block is replaced on the instance, and put back in any case. The list of blocks, their
    attributes and hooks stay, so whatever goes by a block's number (masks, positions, windows, learned positions) is
    the model's own.
    """
    blocks = [inner(block) for block in find_blocks(model)[1]][:count]
    own = [block.__dict__.get("forward") for block in blocks]

    def given(*args: Any, **kwargs: Any) -> Any:
        return container(residual)

    try:
        for block in blocks:
            block.forward = given
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is not None:
                block.forward = forward
            else:
                block.__dict__.pop("forward", None)


@contextmanager
def watching(model: nn.Module) -> Iterator[list[Container]]:
    """Learn, from the blocks that run meanwhile, what a block returns: the list gets a container of each."""
    found: list[Container] = []
    handles = [
        block.register_forward_hook(lambda _, args, output: found.append(container_of(output)))
        for block in find_blocks(model)[1]
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def container_of(output: Any) -> Container:
    """Return how a block packs its output; what it gives beside the residual stream is None when it is skipped.

    Most models read only the first of several. For those that read more, the identity check fails.

    Raises
    ------
    AnalysisError
        It gives no residual stream.
    """
    if isinstance(output, torch.Tensor):
        return as_tensor
    if isinstance(output, tuple) and output and isinstance(output[0], torch.Tensor):
        rest = (None,) * (len(output) - 1)
        return as_tuple if not rest else lambda residual: (residual, *rest)
    raise AnalysisError("a block gives no residual stream", expected="a tensor", found=type(output).__name__)


def as_tensor(residual: torch.Tensor) -> Any:
    """Return the residual as a block does that gives a tensor."""
    return residual


def as_tuple(residual: torch.Tensor) -> Any:
    """Return the residual as a block does that gives a tuple."""
    return (residual,)
