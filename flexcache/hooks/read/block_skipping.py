"""Skip blocks of a model: a residual stream that is given takes the place of their outputs."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from flexcache.errors import AnalysisError
from flexcache.hooks.read.replaced_forward import replaced_forwards

Container = Callable[[torch.Tensor], Any]
"""Packs a residual stream as a block's output: the tensor itself, or a tuple that begins with it."""


@contextmanager
def skip_blocks(
    blocks: Sequence[nn.Module], starts: Sequence[int], residual: torch.Tensor, container: Container
) -> Iterator[None]:
    """Start each line of a forward at its own block, with *residual* in place of the output of the blocks before.

    A block that no line has reached does not run; a later block runs on the lines that have reached it, and the other
    lines pass unchanged. The forward of each such block is replaced on the instance, and always restored. The list of
    blocks, their attributes and hooks stay, so that everything that depends on a block's number (masks, positions,
    windows, learned positions) is the model's own.

    Parameters
    ----------
    blocks
        All blocks of the model, unwrapped.
    starts
        How many blocks each line skips, ascending, one number for each line.
    residual
        What each line begins with, shape (lines, longest, hidden).
    """

    def make(number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        return _first_lines_only(bisect_right(starts, number), forward, residual, container)

    with replaced_forwards(blocks[: starts[-1]], make):
        yield


def _first_lines_only(
    count: int, forward: Callable[..., Any], residual: torch.Tensor, container: Container
) -> Callable[..., Any]:
    """Return a block's forward that runs on the first *count* lines and passes the others unchanged."""

    def replaced(*args: Any, **kwargs: Any) -> Any:
        if not count:
            return container(residual)
        output = forward(*_narrow(args, len(residual), count), **_narrow(kwargs, len(residual), count))
        ran = output if isinstance(output, torch.Tensor) else output[0]
        return container(torch.cat([ran, residual[count:]]))

    return replaced


def _narrow(value: Any, lines: int, count: int) -> Any:
    """Return the part of a block's arguments that belongs to the first *count* of *lines*.

    A tensor whose first dim is *lines*, or a multiple of it as in ALiBi's (lines · heads, …), has a part for each line.
    """
    if isinstance(value, torch.Tensor):
        each, rest = divmod(value.shape[0], lines) if value.ndim > 1 else (0, 0)
        return value[: count * each] if each and not rest else value
    if isinstance(value, dict):
        return {name: _narrow(item, lines, count) for name, item in value.items()}
    return type(value)(_narrow(item, lines, count) for item in value) if type(value) in (tuple, list) else value


def unambiguous_lines(lines: int, longest: int) -> int:
    """Return the least number of lines, at least *lines*, that does not divide the length of the longest sequence."""
    return next(count for count in range(lines, lines + longest + 2) if longest % count)


@contextmanager
def observe_containers(blocks: Sequence[nn.Module]) -> Iterator[list[Container]]:
    """Add the container of each of some blocks that runs in this context to the list that is yielded."""
    found: list[Container] = []
    handles = [
        block.register_forward_hook(lambda _, args, output: found.append(container_of(output))) for block in blocks
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def container_of(output: Any) -> Container:
    """Return how a block packs its output. A skipped block returns None for all but the residual stream.

    Most models read only the first of several outputs. For a model that reads more, the identity check fails.

    Raises
    ------
    AnalysisError
        The output holds no residual stream.
    """
    if isinstance(output, torch.Tensor):
        return tensor_output
    if isinstance(output, tuple) and output and isinstance(output[0], torch.Tensor):
        rest = (None,) * (len(output) - 1)
        return tuple_output if not rest else lambda residual: (residual, *rest)
    raise AnalysisError("a block returns no residual stream", expected="a tensor", found=type(output).__name__)


def tensor_output(residual: torch.Tensor) -> Any:
    """Return the residual stream as a block that returns a tensor."""
    return residual


def tuple_output(residual: torch.Tensor) -> Any:
    """Return the residual stream as a block that returns a tuple."""
    return (residual,)
