"""Hooks that are always removed, and the exception that ends a forward early."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch.utils.hooks import RemovableHandle


@contextmanager
def hook_scope(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Register hooks on entry and remove them on exit.

    *handles* is usually a generator that registers one hook at each step: if one of them fails to register, those
    before it are removed.

    >>> import torch
    >>> layer = torch.nn.Linear(2, 2)
    >>> with hook_scope(layer.register_forward_hook(hook) for hook in [print]):
    ...     len(layer._forward_hooks)
    1
    >>> len(layer._forward_hooks)
    0
    """
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


class EarlyStop(BaseException):
    """End a forward early; not an Exception, so that no code of the model catches it.

    Attributes
    ----------
    owner
        The object whose hook raised it.
    """

    def __init__(self, owner: object) -> None:
        super().__init__()
        self.owner = owner


@contextmanager
def stopped_by(owner: object) -> Iterator[None]:
    """Run a forward that hooks of *owner* may end early with `EarlyStop`."""
    try:
        yield
    except EarlyStop as stop:
        if stop.owner is not owner:
            raise
