"""flexcache bench-codec: measure the size, speed and error of dtypes and codecs on the activations of a store."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from analysis.rescue import write_or_rescue
from analysis.statistics.codecs import CodecResult, Loss, compare, estimate_losses
from analysis.terminal_table import TerminalTable
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
) -> list[CodecResult]:
    """Compare codecs, print two tables, and write all figures as JSON to *output* if it is given.

    Of a store that is int8 already, print and write the error that its scales show.
    """
    place = None if output is None else output_file(output)
    store = Store(path)
    estimated = estimate_losses(store, sites or None, layers)
    results = [] if estimated else compare(store, sites or None, layers, progress=progress)
    if results:
        console.print(costs(results))
    coarse = next((result.losses for result in results if result.codec == "int8"), estimated)
    console.print(losses(coarse, "int8 as stored, estimated from its scales" if estimated else "int8 by layer"))
    if place is not None:
        found = [result.to_json() for result in results] or [asdict(loss) for loss in estimated]
        text = json.dumps(found, indent=1)
        write_or_rescue(lambda folder: (folder / place.name).write_text(text), place.parent)
        console.print(f"→ {shown(place)}", highlight=False, markup=False)
    return results


def costs(results: Sequence[CodecResult]) -> Table:
    """Return a table of size, times and error of each codec; size and times are relative to the first codec.

    The column ``others`` is the error without the largest values of each row.
    """
    table = TerminalTable("stored as", box=None)
    for name in ("bytes", "write", "read", "error", "others", "worst layer", "its error"):
        table.add_column(name, justify="right")
    for result in results:
        worst = result.worst
        place = worst.site if worst.layer is None else f"{worst.site}[{worst.layer}]"
        table.add_row(
            result.codec,
            f"{result.size:.3f}",
            f"{result.write:.2f}",
            f"{result.read:.2f}",
            _error(result.mean),
            _error(result.others),
            place if worst.mean else "–",
            _error(worst.mean),
        )
    return table


def losses(found: Sequence[Loss], what: str) -> Table:
    """Return a table of the error of int8 by layer, with the largest values of each row and without them."""
    title = f"{what}: ‖x − x̂‖ ÷ ‖x‖ of a row; others: without its largest values, one in 128; spread: largest ÷ median"
    table = TerminalTable("site", title=title, title_justify="left", box=None)
    for name in ("layer", "mean", "others", "largest", "least cosine", "spread"):
        table.add_column(name, justify="right")
    for loss in found:
        layer = "–" if loss.layer is None else str(loss.layer)
        table.add_row(
            loss.site,
            layer,
            _error(loss.mean),
            _error(loss.others),
            _error(loss.largest),
            f"{loss.cosine:.5f}",
            f"{loss.spread:,.0f}",
        )
    return table


def _error(value: float) -> str:
    return "0" if value == 0 else "overflows" if value == float("inf") else f"{value:.2%}"
