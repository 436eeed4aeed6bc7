"""Check keyword arguments that a function passes on to an options object."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flexcache.errors import ConfigError, FlexCacheError, nearest


def check_keywords(
    function: str, given: Mapping[str, Any], known: Iterable[str], error: type[FlexCacheError] = ConfigError
) -> None:
    """Raise *error* if a keyword is not one of *known*, with the nearest name.

    >>> check_keywords("stream", {"thread": 4}, ("threads", "pool_bytes"))
    Traceback (most recent call last):
    flexcache.errors.ConfigError: stream has no argument 'thread'
      what to do: did you mean threads? There are: threads, pool_bytes
    """
    names = tuple(known)
    for name in given:
        if name not in names:
            raise error(f"{function} has no argument {name!r}", remedy=nearest(name, names))
