"""Check arguments that several analyses share."""

from __future__ import annotations

from typing import Any

from flexcache.errors import AnalysisError
from flexcache.spec import is_whole

MOST_SEED = 2**32 - 1
"""Largest seed that scikit-learn accepts."""


def check_whole(name: str, value: Any, least: int, most: int | None = None, remedy: str | None = None) -> None:
    """Raise AnalysisError if an argument is not a whole number from *least* to *most*.

    >>> check_whole("cv", "5", 2)
    Traceback (most recent call last):
    flexcache.errors.AnalysisError: cv cannot be used
      expected: a whole number of at least 2
      found: '5'
    """
    if not is_whole(value) or value < least or (most is not None and value > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise AnalysisError(
            f"{name} cannot be used", expected=f"a whole number {bounds}", found=repr(value), remedy=remedy
        )
