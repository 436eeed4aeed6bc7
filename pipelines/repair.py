"""flexcache repair: damaged units are taken back, and computed again where a configuration is given."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from flexcache.store.manage.repair import Repair, repair
from pipelines.config import CaptureConfig


def run(path: Path, config: CaptureConfig | None, console: Console, progress: bool = True) -> Repair:
    """Take damaged units back, and capture them again."""
    columns = (TextColumn("verifying"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bars:
        task = bars.add_task("", total=None)
        done = repair(path, lambda files, size: bars.update(task, completed=size))
    for finding in done.found.findings:
        console.print(f"[red]✗[/] {escape(finding.file)} {escape(finding.problem)}", highlight=False)
    for finding in done.beyond:
        console.print(
            f"{escape(finding.file)} is part of the plan: restore it from a copy of the store", highlight=False
        )
    if done.units:
        listed = ", ".join(map(str, done.units[:20])) + (" …" if len(done.units) > 20 else "")
        console.print(f"taken back, to be computed again: unit {listed}", highlight=False)
    elif done.found.sound:
        console.print("nothing is damaged", highlight=False)
    if done.units and config is None:
        console.print("run the same capture as before: it computes these units alone", highlight=False)
    if done.units and config is not None and not done.beyond:
        from pipelines import capture

        capture.run(config, progress=progress)
    return done
