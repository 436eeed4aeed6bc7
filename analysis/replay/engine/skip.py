"""Blocks that are not run: what they would have given comes from a store."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from flexcache.errors import AnalysisError
from flexcache.hooks.locate.blocks import find_blocks
from flexcache.hooks.locate.names import inner

Container = Callable[[torch.Tensor], Any]
"""Puts a residual stream into what a block returns: itself, or a tuple that begins with it."""


@contextmanager
def skipping(model: nn.Module, starts: Sequence[int], residual: torch.Tensor, container: Container) -> Iterator[None]:
    """Let each line of a forward begin at a block of its own, with *residual* in place of what the blocks before give.

    A block that no line has reached does not run; later ones run on the lines that have, and the others wait.
    The forward of each such block is replaced on the instance, and put back in any case. The list of blocks, their
    attributes and hooks stay, so whatever goes by a block's number (masks, positions, windows, learned positions) is
    the model's own.

    Parameters
    ----------
    starts
        How many blocks each line skips, ascending, one for each line.
    residual
        What each line begins with, shape (lines, longest, hidden).
    """
    blocks = [inner(block) for block in find_blocks(model)[1]][: starts[-1]]
    own = [block.__dict__.get("forward") for block in blocks]
    try:
        for number, block in enumerate(blocks):
            block.forward = _of_the_first(bisect_right(starts, number), block.forward, residual, container)
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is not None:
                block.forward = forward
            else:
                block.__dict__.pop("forward", None)


def _of_the_first(
    count: int, forward: Callable[..., Any], residual: torch.Tensor, container: Container
) -> Callable[..., Any]:
    """Return a block's forward for the first *count* lines, which gives the others as they wait."""

    def given(*args: Any, **kwargs: Any) -> Any:
        if not count:
            return container(residual)
        output = forward(*_narrow(args, len(residual), count), **_narrow(kwargs, len(residual), count))
        ran = output if isinstance(output, torch.Tensor) else output[0]
        return container(torch.cat([ran, residual[count:]]))

    return given


def _narrow(value: Any, lines: int, count: int) -> Any:
    """Return the part of a block's arguments that belongs to the first *count* of *lines*.

    A tensor whose first dim is *lines*, or a multiple as in ALiBi's (lines · heads, …), has a part for each line.
    """
    if isinstance(value, torch.Tensor):
        each, rest = divmod(value.shape[0], lines) if value.ndim > 1 else (0, 0)
        return value[: count * each] if each and not rest else value
    if isinstance(value, dict):
        return {name: _narrow(item, lines, count) for name, item in value.items()}
    return type(value)(_narrow(item, lines, count) for item in value) if type(value) in (tuple, list) else value


def unambiguous(lines: int, longest: int) -> int:
    """Return the least number of lines, *lines* or more, by which the longest sequence cannot be divided."""
    return next(count for count in range(lines, lines + longest + 2) if longest % count)


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
