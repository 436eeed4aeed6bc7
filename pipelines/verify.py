"""flexcache verify: every file of a store against its checksum."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from flexcache.store.display import array_bytes, size
from flexcache.store.store import Store
from flexcache.store.verify import Verification, verify


def run(path: Path, console: Console, progress: bool = True) -> Verification:
    """Check a store and print what is wrong with it."""
    store = Store(path)
    share = len(store.committed_units) / max(1, store.n_units)
    columns = (TextColumn("verifying"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bars:
        task = bars.add_task("", total=int(array_bytes(store) * share) or None)
        result = verify(path, lambda files, done: bars.update(task, completed=done))
    for finding in result.findings:
        unit = "" if finding.unit is None else f" (unit {finding.unit})"
        console.print(f"[red]✗[/] {escape(finding.file)}{unit} {escape(finding.problem)}", highlight=False)
    state = "complete" if result.committed == result.units else f"{result.committed} of {result.units} units committed"
    console.print(
        f"{result.files:,} files, {size(result.bytes)}: "
        + ("[green]every checksum agrees[/]" if result.sound else f"[red]{len(result.findings)} wrong[/]")
        + f"; the store is {state}",
        highlight=False,
    )
    damaged = sorted({finding.unit for finding in result.findings if finding.unit is not None})
    if damaged:
        listed = " ".join(f"ledger/0/{unit}.json" for unit in damaged[:20])
        console.print(
            f"to recompute the damaged units, delete {listed}{' …' if len(damaged) > 20 else ''} and run the same"
            " capture again",
            highlight=False,
        )
    return result
