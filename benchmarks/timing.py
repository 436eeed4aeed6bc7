"""Interleaved timing: every variant once a round, in turning order, so that a drifting machine moves all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

console = Console()
shown: list[Shown] = []
"""What this process has shown, for the scoreboard."""


class Shown(NamedTuple):
    """A table of what was measured: rows of what, measured, target."""

    title: str
    rows: list[tuple[str, str, str]]


def interleave(
    variants: Mapping[str, Callable[[], float | None]], rounds: int, warm: bool = True
) -> dict[str, list[float]]:
    """Return the seconds of each variant in each round: what the variant returns, or else how long its call took."""
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-int(warm), rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            began = time.perf_counter()
            took = variants[name]() or time.perf_counter() - began
            if number >= 0:
                seconds[name].append(took)
            console.print(f"  round {number}: {name} {took:.3f} s", style="dim", highlight=False)
    return seconds


def ratio(above: list[float], below: list[float]) -> float:
    """Return the median of the ratios round by round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def show(title: str, rows: list[tuple[str, str, str]]) -> None:
    """Print what was measured beside its target, and note it in `shown`."""
    shown.append(Shown(title, rows))
    table = Table("what", "measured", "target", title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
