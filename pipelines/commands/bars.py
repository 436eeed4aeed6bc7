"""Progress bars of the commands, on the error stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from flexcache.progress import ProgressCallback


@contextmanager
def bytes_bar(title: str, show: bool) -> Iterator[ProgressCallback]:
    """Show a bar with rate and time left; yield the callback for the bytes done and in all."""
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not show) as bars:
        task = bars.add_task("", total=None)
        yield lambda done, total: bars.update(task, completed=done, total=max(1, total))


@contextmanager
def files_bar(title: str, show: bool, total: int | None = None) -> Iterator[ProgressCallback]:
    """Show a bar of bytes out of *total*; yield the callback for the files and bytes done."""
    with bytes_bar(title, show) as advance:
        yield lambda files, done: advance(done, total or done)


@contextmanager
def rows_bar(title: str, show: bool) -> Iterator[ProgressCallback]:
    """Show a bar with time left; yield the callback for the rows done and in all."""
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not show) as bars:
        task = bars.add_task("", total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
