"""Progress bars of commands that move bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from flexcache.errors import ConfigError
from flexcache.site import Layers


@contextmanager
def bytes_bar(title: str, show: bool) -> Iterator[Callable[[int, int], None]]:
    """Show bytes done, rate and time left on the error stream; yields what is called with bytes done and in all."""
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not show) as bars:
        task = bars.add_task("", total=None)
        yield lambda done, total: bars.update(task, completed=done, total=max(1, total))


def read_layers(text: str) -> Layers:
    """Read layers as the command line takes them: what `resolve_layers` reads, and numbers with commas between.

    >>> read_layers("0,8,-1"), read_layers("8:24"), read_layers("3")
    ([0, 8, -1], '8:24', '3')

    Raises
    ------
    ConfigError
        Something between the commas is not a number.
    """
    if "," not in text:
        return text
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"layers {text!r} cannot be read", expected="all, a number, 0,8,16, or 8:24") from None
