"""Check keyword arguments that a function passes on to an options object."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from inspect import Parameter, signature
from typing import Any

from flexcache.errors import ConfigError, FlexCacheError, nearest


def check_keywords(
    function: Callable[..., Any],
    given: Mapping[str, Any],
    options: Iterable[str],
    error: type[FlexCacheError] = ConfigError,
) -> None:
    """Raise *error* if a keyword of *function* is not one of *options*; name the nearest argument.

    >>> def stream(store, batch_size=8, **reading):
    ...     check_keywords(stream, reading, ("threads", "pool_bytes"))
    >>> stream(None, batchsize=4)
    Traceback (most recent call last):
    flexcache.errors.ConfigError: stream has no argument 'batchsize'
      what to do: did you mean batch_size? There are: store, batch_size, threads, pool_bytes
    """
    known = tuple(options)
    own = (name for name, one in signature(function).parameters.items() if one.kind is not Parameter.VAR_KEYWORD)
    for name in given:
        if name not in known:
            names = tuple(dict.fromkeys((*own, *known)))
            raise error(f"{function.__name__} has no argument {name!r}", remedy=nearest(name, names))
