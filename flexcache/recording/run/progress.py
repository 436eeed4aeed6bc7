"""Progress bars: rate, time left, and how long writing stalled the forward."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table

from flexcache.progress import ProgressCallback
from flexcache.recording.run.recorder import Recorder
from flexcache.recording.run.run_stats import RunStats
from flexcache.store.format.text import size


class CaptureProgress:
    """Progress bars on the error stream of the terminal; silent if *show* is false."""

    def __init__(self, show: bool) -> None:
        self.console = Console(stderr=True, quiet=not show)
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=11)),
            TextColumn("{task.fields[rate]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
            console=self.console,
            disable=not show,
        )
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def planning(self, total: int | None) -> _Planning:
        """Start the bar of planning; the result is called with documents and tokens done."""
        return _Planning(self._bars, total)

    def generating(self, total: int | None) -> _Planning:
        """Start the bar of generation; the result is called with documents and new tokens done."""
        return _Planning(self._bars, total, "generating (documents)")

    def capturing(self, recorder: Recorder) -> _Capturing:
        """Start the bar of a capture."""
        return _Capturing(self._bars, recorder)

    def trying(self, seconds: float) -> Callable[[float], None]:
        """Start the bar of a trial of some seconds; the result is called with the seconds spent."""
        task = self._bars.add_task("trying the model (seconds)", total=round(seconds), rate="")
        return lambda spent: self._bars.update(task, completed=min(round(spent), round(seconds)))

    def committing(self) -> ProgressCallback:
        """Start the bar of the files of an extension; the result is called with files in place and in all."""
        task = self._bars.add_task("putting in place (files)", total=None, rate="")
        return lambda done, total: self._bars.update(task, completed=done, total=total)

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self.console.print(escape(text), highlight=False)


class _Planning:
    def __init__(self, bars: Progress, total: int | None, what: str = "planning (documents)") -> None:
        self._bars = bars
        self._began = time.perf_counter()
        self._task = bars.add_task(what, total=total, rate="")

    def __call__(self, documents: int, tokens: int) -> None:
        seconds = max(1e-6, time.perf_counter() - self._began)
        self._bars.update(self._task, completed=documents, rate=f"{tokens / seconds:,.0f} tokens/s")

    def done(self, made: bool) -> None:
        """End the bar; hide it if this process made no plan."""
        self._bars.update(self._task, visible=made)
        self._bars.stop_task(self._task)

    def wait(self) -> None:
        """Show that another process makes the plan."""
        self._bars.update(self._task, rate="another process makes the plan; waiting for it")


class _Capturing:
    """Shows the rows of the whole store that are done, and the rates of this process."""

    def __init__(self, bars: Progress, recorder: Recorder) -> None:
        self._bars, self._recorder = bars, recorder
        self._began = time.perf_counter()
        self._task = bars.add_task(
            "capturing (rows)", total=recorder.store.n_rows, completed=recorder.rows_done, rate="", start=True
        )

    def advance(self) -> None:
        """Show the rows that are done, and the rates so far."""
        stats = self._recorder.stats
        seconds = max(1e-6, time.perf_counter() - self._began)
        written = self._recorder.bytes_put
        rate = f"{stats.tokens / seconds:,.0f} tokens/s, {size(written / seconds)}/s"
        self._show(f"{rate}, stalled {self._recorder.seconds_stalled / seconds:.0%}")

    def wait(self, units: int) -> None:
        """Show that other processes have all units that are left."""
        others = f"waiting for {units} unit{'s' if units > 1 else ''} of other processes"
        self._show(others if units else "waiting for documents to be planned")

    def _show(self, rate: str) -> None:
        total = self._recorder.store.n_rows  # of what is planned
        self._bars.update(self._task, completed=self._recorder.rows_done, total=total, rate=rate)


def time_table(stats: RunStats, seconds: float) -> Table:
    """Return a table of where the time of a capture went, of *seconds* in all."""
    table = Table(title="where the time went", title_justify="left", show_header=False, box=None)
    computing = stats.forward - stats.copying - stats.waiting
    shares = {
        "forward": computing,
        "copying rows in hooks": stats.copying,
        "waiting for the disk": stats.waiting,
        "claiming units": stats.claiming,
        "committing units": stats.committing,
        "planning, waiting for others, the rest": seconds - stats.forward - stats.claiming - stats.committing,
    }
    for name, spent in shares.items():
        table.add_row(name, f"{spent:.1f} s", f"{spent / max(1e-9, seconds):.0%}")
    table.add_row("writer thread, in parallel", f"{stats.writing:.1f} s", "")
    return table
