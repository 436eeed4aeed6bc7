"""Checks that run under torchrun: each is a function, registered for the world sizes that it needs."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

Check = Callable[[], None]
_CHECKS: dict[int, dict[str, Check]] = {2: {}, 3: {}, 4: {}}


def check(*worlds: int) -> Callable[[Check], Check]:
    def register(function: Check) -> Check:
        for world in worlds:
            _CHECKS[world][f"{function.__module__.rpartition('.')[2]}.{function.__name__}"] = function
        return function

    return register


def checks(world: int) -> dict[str, Check]:
    import tests.distributed.checks as folder

    for module in pkgutil.iter_modules(folder.__path__):
        importlib.import_module(f"{folder.__name__}.{module.name}")
    return _CHECKS[world]


def names(world: int) -> list[str]:
    """Return the names of a world's checks, read from the files, so that pytest need not import torch for them."""
    return sorted(checks(world))
