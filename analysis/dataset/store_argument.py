"""Open stores that are given by their paths."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from flexcache.store.read.store import Store
from flexcache.store.storage.location import is_location

P = ParamSpec("P")
R = TypeVar("R")


def accept_store_path(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function so that *store* and *other* may be the path or URL of a store.

    >>> @accept_store_path
    ... def count(store: Store) -> int:
    ...     return store.n_rows
    >>> count("nowhere.zarr")
    Traceback (most recent call last):
    flexcache.errors.StoreError: ...
    """
    signature = inspect.signature(function)

    @wraps(function)
    def called(*args: P.args, **named: P.kwargs) -> R:
        bound: Any = signature.bind(*args, **named)
        for name in ("store", "other"):
            if is_location(bound.arguments.get(name)):
                bound.arguments[name] = Store(bound.arguments[name])
        return function(*bound.args, **bound.kwargs)

    return called
