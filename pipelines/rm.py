"""flexcache rm: sites and layers out of a store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape

from flexcache.store.format.text import layer_text, size
from flexcache.store.manage.remove import Removal
from pipelines.bars import bytes_bar


def run(
    path: Path, sites: Sequence[str], console: Console, *, layers: str = "all", yes: bool = False, progress: bool = True
) -> int:
    """Remove, once it is confirmed; return the bytes freed."""
    removal = Removal(path, sites, layers)
    found: dict[str, list[int]] = {}
    for name, layer in removal.gone:
        found.setdefault(name, []).extend([] if layer is None else [layer])
    if removal.unfinished:
        console.print("an earlier removal was stopped; this finishes it, and nothing else", highlight=False)
    for name, numbers in found.items():
        which = f", layers {layer_text(tuple(numbers))}" if numbers else ""
        console.print(f"{escape(name)}{which}", highlight=False)
    if not yes and not typer.confirm(f"remove this from {path}, {size(removal.bytes())}, for good?"):
        console.print("nothing was removed")
        return 0
    with bytes_bar("removing", progress) as bar:
        freed = removal.run(bar)
    console.print(f"{size(freed)} freed", highlight=False)
    return freed
