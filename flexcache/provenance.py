"""Fingerprints of a user's functions, for the provenance of what they compute."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from importlib import import_module
from typing import Any, TypeVar

import numpy as np
import xxhash

from flexcache.errors import ConfigError, nearest

T = TypeVar("T")
_RECORDED = "_recorded_as"
FINGERPRINT = ("function", "source_xxh3_128", "state_xxh3_128")


def callable_fingerprint(function: Callable[..., Any]) -> dict[str, Any]:
    """Return a function's qualified name and digests of its source and its state.

    The state is the weights of a torch module, the arguments of a `functools.partial`, the fields of an object, or the
    variables that a nested function closes over. Equal fingerprints imply equal behaviour, except for other code that
    the functions call.

    >>> sorted(callable_fingerprint(len))
    ['function', 'source_xxh3_128', 'state_xxh3_128']
    """
    inner = function
    while isinstance(inner, partial):
        inner = inner.func
    code = inner if inspect.isroutine(inner) else type(inner)
    name, source = _recorded(code)
    if source is None:
        with suppress(OSError, TypeError):  # built in, or typed into a console
            source = xxhash.xxh3_128_hexdigest(inspect.getsource(code).encode())
    hasher = xxhash.xxh3_128()
    _update(hasher, _held(function), 0)
    return {
        "function": name,
        "source_xxh3_128": source,
        "state_xxh3_128": hasher.hexdigest(),
    }


def select_fingerprint(record: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the fingerprint in a function's record, without what the record holds in addition; None for no record.

    >>> select_fingerprint({"function": "f", "source_xxh3_128": "a", "state_xxh3_128": "b", "tokens": [7, 9]})
    {'function': 'f', 'source_xxh3_128': 'a', 'state_xxh3_128': 'b'}
    """
    return None if record is None else {name: record[name] for name in FINGERPRINT if name in record}


def recorded_as(name: str, source_xxh3_128: str) -> Callable[[T], T]:
    """Decorate a function or class of this project with the name and source digest that stores have recorded.

    It may then be moved and reworded without becoming another function to the stores that used it. Change the digest
    when it computes something else.

    >>> @recorded_as("package.twice", "0123")
    ... def twice(x):
    ...     return 2 * x
    >>> callable_fingerprint(twice)["function"]
    'package.twice'
    """

    def decorate(code: T) -> T:
        setattr(code, _RECORDED, (name, source_xxh3_128))
        return code

    return decorate


def import_object(path: str, where: str) -> Any:
    """Return the object that ``package.module:attribute`` names.

    >>> import_object("os.path:join", where="objective").__name__
    'join'

    Raises
    ------
    ConfigError
        The module cannot be imported, or has no such attribute.
    """
    module, colon, attribute = path.partition(":")
    if not (module and colon and attribute):
        raise ConfigError(f"{path!r} names no function", where=where, expected="package.module:attribute")
    try:
        found = import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"module {module} cannot be imported",
            where=where,
            found=str(error),
            remedy="run from the folder that contains it, or add that folder to PYTHONPATH",
        ) from error
    try:
        for name in attribute.split("."):
            found = getattr(found, name)
    except AttributeError:
        names = [name for name in vars(import_module(module)) if not name.startswith("_")]
        raise ConfigError(
            f"module {module} has no {attribute}", where=where, remedy=nearest(attribute, tuple(names))
        ) from None
    return found


def _recorded(code: Any) -> tuple[str, str | None]:
    """Return the qualified name of a function or class, and the source digest of `recorded_as`."""
    recorded: tuple[str, str | None] = getattr(code, "__dict__", {}).get(
        _RECORDED, (f"{code.__module__}.{code.__qualname__}", None)
    )
    return recorded


def _held(function: Any) -> Any:
    if isinstance(function, partial):
        return [_held(function.func), function.args, function.keywords]
    if hasattr(function, "state_dict"):
        return dict(function.state_dict())
    if inspect.ismethod(function):
        return _held(function.__self__)
    if inspect.isfunction(function):
        try:
            closed = [cell.cell_contents for cell in function.__closure__ or ()]
        except ValueError:  # an empty cell
            closed = []
        return [function.__defaults__, function.__kwdefaults__, closed]
    return getattr(function, "__dict__", None)


def _update(hasher: Any, value: Any, depth: int) -> None:
    """Feed a value to a hasher by its content, independent of its address in memory."""
    if depth > 8:
        return
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            hasher.update(f"{key}:".encode())
            _update(hasher, value[key], depth + 1)
    elif isinstance(value, list | tuple):
        hasher.update(f"[{len(value)}]".encode())
        for item in value:
            _update(hasher, item, depth + 1)
    elif value is None or isinstance(value, str | bytes | bool | int | float):
        hasher.update(repr(value).encode())
    elif hasattr(value, "detach") and hasattr(value, "numpy"):
        tensor = value.detach().cpu()
        hasher.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        hasher.update((tensor.float() if tensor.is_floating_point() else tensor).contiguous().numpy())
    elif isinstance(value, np.ndarray) and value.dtype != object:
        hasher.update(f"{value.shape} {value.dtype}".encode())
        hasher.update(np.ascontiguousarray(value))
    elif callable(value) or hasattr(value, "__dict__"):
        hasher.update(f"{_recorded(type(value))[0]} {getattr(value, '__qualname__', '')}".encode())
        _update(hasher, _held(value), depth + 1)
    else:
        hasher.update(type(value).__qualname__.encode())
