"""flexcache import: files of activations into a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flexcache.exchange.importing import import_folder
from flexcache.store.read.store import Store


def run(folder: Path, target: Path, kind: str, *, progress: bool = True, **options: Any) -> Store:
    """Import a folder and return the store; see `flexcache.exchange.importing.import_folder`."""
    columns = (TextColumn("importing (rows)"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bars:
        task = bars.add_task("", total=None)
        return import_folder(
            folder,
            target,
            kind,
            progress=lambda done, total: bars.update(task, completed=done, total=total),
            **options,
        )
