"""Modules whose forward is replaced for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def replaced_forwards(modules: Sequence[nn.Module], make: Callable[[int, Callable[..., Any]], Any]) -> Iterator[None]:
    """Replace the forward of each module on the instance, by ``make(number, forward)``; it is always restored.

    The modules stay where they are, with their attributes and hooks.

    >>> import torch
    >>> layer = nn.Linear(2, 2)
    >>> with replaced_forwards([layer], lambda number, forward: lambda given: given):
    ...     layer(torch.ones(1, 2))
    tensor([[1., 1.]])
    >>> "forward" in vars(layer)
    False
    """
    own = [module.__dict__.get("forward") for module in modules]
    try:
        for number, module in enumerate(modules):
            module.forward = make(number, module.forward)
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            if forward is not None:
                module.forward = forward
            else:
                module.__dict__.pop("forward", None)
