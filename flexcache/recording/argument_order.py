"""Accept documents and the path of the store in either order."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from flexcache.errors import ConfigError
from flexcache.store.storage.location import is_location, parse_location

P = ParamSpec("P")
R = TypeVar("R")


def either_order(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function of (model, tokenizer, documents, path) also accept (model, tokenizer, path, documents).

    The argument that is a store is the path; arguments given by name keep their names.
    """

    @wraps(function)
    def called(*args: Any, **named: Any) -> R:
        first, given = args[:2], list(args[2:])
        if len(given) > 2:
            raise TypeError(f"{function.__name__}() takes at most 4 arguments by position, and {len(args)} were given")
        if given and "documents" in named:
            given = [named.pop("documents"), *given]
        elif given and "path" in named:
            given = [*given, named.pop("path")]
        documents, path = _in_order(*given) if given else (named.pop("documents", None), named.pop("path", None))
        return function(*first, documents=documents, path=path, **named)

    return called


def _in_order(first: Any, second: Any = None) -> tuple[Any, Any]:
    """Return documents and path from two arguments in any order.

    Raises
    ------
    ConfigError
        Both are stores.
    """
    stores = [_is_store(first), _is_store(second)]
    if all(stores) and first is not second:
        raise ConfigError(
            "two stores are given, but only one can be extended",
            expected="documents and the path of a store",
            found=f"{first} and {second}",
            remedy="name them, as in documents=…, path=…",
        )
    if any(stores):
        return (second, first) if stores[0] else (first, second)
    paths = [_may_be_path(first), _may_be_path(second)]
    return (second, first) if paths[0] and not paths[1] else (first, second)


def _may_be_path(given: Any) -> bool:
    return is_location(given) or hasattr(given, "arrays")


def _is_store(given: Any) -> bool:
    if not _may_be_path(given):
        return False
    try:
        return (parse_location(given) / "zarr.json").exists()
    except (ConfigError, OSError):
        return False
