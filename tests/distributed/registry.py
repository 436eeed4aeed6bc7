"""Checks that run on several ranks: each is a function, registered for the world sizes that it needs."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

Check = Callable[[], None]
_CHECKS: dict[tuple[int, bool], dict[str, Check]] = {}


class SkipError(Exception):
    """A check cannot run here; the text says why."""


def check(*worlds: int, slow: bool = False) -> Callable[[Check], Check]:
    def register(function: Check) -> Check:
        for world in worlds:
            name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
            _CHECKS.setdefault((world, slow), {})[name] = function
        return function

    return register


def checks(world: int, slow: bool = False) -> dict[str, Check]:
    """Return the checks of a world: those that a default run has, or those that it has not."""
    import tests.distributed.checks as folder

    for module in pkgutil.iter_modules(folder.__path__):
        importlib.import_module(f"{folder.__name__}.{module.name}")
    return _CHECKS.get((world, slow), {})
