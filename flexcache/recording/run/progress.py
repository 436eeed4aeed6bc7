"""Progress for people who wait: rate, time left, and how long writing held up the forward."""

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

from flexcache.recording.run.recorder import Recorder
from flexcache.recording.run.run_stats import RunStats
from flexcache.store.format.text import size


class CaptureProgress:
    """A bar on the terminal's error stream; silent where *show* is false."""

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
        """Start the bar of the tokenizer; the result is called with documents and tokens done."""
        return _Planning(self._bars, total)

    def generating(self, total: int | None) -> _Planning:
        """Start the bar of completions; the result is called with documents and new tokens done."""
        return _Planning(self._bars, total, "generating (documents)")

    def capturing(self, recorder: Recorder) -> _Capturing:
        """Start the bar of the capture; the result is called after every batch."""
        return _Capturing(self._bars, recorder)

    def trying(self, seconds: float) -> Callable[[float], None]:
        """Return what shows how long a model has been tried, of some seconds."""
        task = self._bars.add_task("trying the model (seconds)", total=round(seconds), rate="")
        return lambda spent: self._bars.update(task, completed=min(round(spent), round(seconds)))

    def committing(self) -> Callable[[int, int], None]:
        """Return what shows how many files of an extension are in place, called with done and total."""
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
        """End the bar; it disappears where the plan was there, or another process made it."""
        self._bars.update(self._task, visible=made)
        self._bars.stop_task(self._task)

    def wait(self) -> None:
        """Say that another process plans."""
        self._bars.update(self._task, rate="another process makes the plan; waiting for it")


class _Capturing:
    """Rows of the whole store, whoever computes them; the rates are this process's own."""

    def __init__(self, bars: Progress, recorder: Recorder) -> None:
        self._bars, self._recorder = bars, recorder
        self._began = time.perf_counter()
        self._task = bars.add_task(
            "capturing (rows)", total=recorder.store.n_rows, completed=recorder.done, rate="", start=True
        )
        recorder.on_wait = self._wait

    def __call__(self) -> None:
        stats = self._recorder.stats
        seconds = max(1e-6, time.perf_counter() - self._began)
        written = self._recorder.written
        rate = f"{stats.tokens / seconds:,.0f} tokens/s, {size(written / seconds)}/s"
        self._show(f"{rate}, stalled {self._recorder.waited / seconds:.0%}")

    def _wait(self, units: int) -> None:
        self._show(f"waiting for {units} unit{'s' if units > 1 else ''} of other processes")

    def _show(self, rate: str) -> None:
        self._bars.update(self._task, completed=self._recorder.done, rate=rate)


def time_table(stats: RunStats, seconds: float) -> Table:
    """Return where the time of a capture went."""
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
    table.add_row("writer thread, beside the forward", f"{stats.writing:.1f} s", "")
    return table
