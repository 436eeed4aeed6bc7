"""flexcache bench-codec: what a dtype or codec would save, cost and lose on the activations of a store."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from analysis.rescue import rescued
from analysis.statistics.codecs import Trial, compare
from flexcache.paths import output_file, shown
from flexcache.store.read.store import Store


def run(
    path: Path,
    console: Console,
    *,
    sites: Sequence[str] | None = None,
    layers: str = "all",
    output: Path | None = None,
    progress: bool = True,
) -> list[Trial]:
    """Compare, print two tables, and write everything as JSON where *output* says so."""
    place = None if output is None else output_file(output)
    trials = compare(Store(path), sites or None, layers, progress=progress)
    console.print(costs(trials))
    console.print(losses(next(trial for trial in trials if trial.codec == "int8")))
    if place is not None:
        text = json.dumps([trial.to_json() for trial in trials], indent=1)
        rescued(lambda folder: (folder / place.name).write_text(text), place.parent)
        console.print(f"→ {shown(place)}", highlight=False, markup=False)
    return trials


def costs(trials: Sequence[Trial]) -> Table:
    """Return size, times and error of each codec; everything but the error is ÷ that of the first."""
    table = Table("stored as", "bytes", "write", "read", "error", "worst layer", "its error", box=None)
    for trial in trials:
        worst = trial.worst
        place = worst.site if worst.layer is None else f"{worst.site}[{worst.layer}]"
        table.add_row(
            trial.codec,
            f"{trial.size:.3f}",
            f"{trial.write:.2f}",
            f"{trial.read:.2f}",
            _error(trial.mean),
            place if worst.mean else "–",
            _error(worst.mean),
        )
    return table


def losses(trial: Trial) -> Table:
    """Return what int8 loses by layer."""
    title = "int8 by layer: ‖x − x̂‖ ÷ ‖x‖ of a row, and the largest ÷ the median magnitude in it"
    table = Table("site", "layer", "mean", "largest", "least cosine", "spread", title=title, box=None)
    table.title_justify = "left"
    for loss in trial.losses:
        layer = "–" if loss.layer is None else str(loss.layer)
        table.add_row(
            loss.site, layer, _error(loss.mean), _error(loss.largest), f"{loss.cosine:.5f}", f"{loss.spread:,.0f}"
        )
    return table


def _error(value: float) -> str:
    return "0" if value == 0 else "overflows" if value == float("inf") else f"{value:.2%}"
