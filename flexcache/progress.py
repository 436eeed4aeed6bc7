"""Callbacks that receive the progress of long operations."""

from __future__ import annotations

from collections.abc import Callable

ProgressCallback = Callable[[int, int], None]
"""Called with two counters, such as the bytes so far and in all; each function says which."""


def ignore_progress(first: int, second: int) -> None:
    """Ignore the progress: the default callback."""
