"""flexcache preshuffle: the rows of a store in random order, in another store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from flexcache.store.read.store import Store
from flexcache.training.preshuffle import preshuffle


def run(
    source: Path,
    target: Path,
    *,
    sites: Sequence[str] | None = None,
    layers: str = "all",
    seed: int = 0,
    progress: bool = True,
) -> Store:
    """Shuffle a store and return the result; see `flexcache.training.preshuffle.preshuffle`."""
    with Progress(*Progress.get_default_columns(), console=Console(stderr=True), disable=not progress) as bars:
        task = bars.add_task("shuffling (rows)", total=None)

        def show(done: int, total: int) -> None:
            bars.update(task, completed=done, total=total)

        return preshuffle(source, target, sites=sites or None, layers=layers, seed=seed, progress=show)
