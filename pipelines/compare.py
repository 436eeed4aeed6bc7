"""flexcache compare: compare two stores of the same tokens, print tables, and write results and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from rich.console import Console
from rich.text import Text

import flexcache
from analysis.comparison import StoreComparison, compare_stores
from analysis.dataset import targets
from analysis.probes.table import NAMES, interval, number
from analysis.rescue import write_or_rescue
from analysis.terminal_table import TerminalTable
from flexcache.errors import ConfigError, nearest
from flexcache.paths import output_folder, shown
from pipelines.probe import PROBES

PICTURE = "compare.png"
SHOWN = 4
"""Differences of the models that are printed."""
WIDEST = 80
"""Characters of a difference that are printed; the saved results have all of it."""


def run(
    store_path: Any,
    other_path: Any,
    *,
    sites: Sequence[str] | None = None,
    target: str | None = None,
    probe: str | None = None,
    output: str | Path | None = None,
    console: Console | None = None,
    **options: Any,
) -> StoreComparison:
    """Compare two stores, print a table for each site, and write ``compare.zarr`` and ``compare.png``.

    Parameters
    ----------
    target
        A label, as `analysis.targets.read` reads it.
    probe
        Name of a probe of `pipelines.probe.PROBES`.
    output
        Folder of the results; ``compare`` in the working folder by default.
    options
        Further options of `analysis.comparison.compare_stores`; groups may also be ``"none"``.

    Other parameters, and errors, are those of `analysis.comparison.compare_stores`.
    """
    console, folder = console or Console(), output_folder("compare" if output is None else output)
    if probe is not None and probe not in PROBES:
        raise ConfigError(f"there is no probe {probe!r}", remedy=nearest(probe, tuple(PROBES)))
    if options.get("groups") == "none":
        options["groups"] = None
    store, other = flexcache.open(store_path), flexcache.open(other_path)
    asked = [None] if target is None else targets.read(store, target)
    if len(asked) > 1:
        raise ConfigError(
            "a comparison takes one target", found=f"{target}: {len(asked)} targets", remedy="name a column of values"
        )
    found = compare_stores(
        store, other, sites, target=asked[0], probe=None if probe is None else PROBES[probe], **options
    )
    print_tables(found, console)

    def write(place: Path) -> tuple[Path, Path]:
        path = found.save(place)
        found.plot(place / PICTURE)
        return path, place / PICTURE

    for name, path in zip(("results", "picture"), write_or_rescue(write, folder), strict=True):
        console.print(f"{name}  {shown(path)}", markup=False, highlight=False, soft_wrap=True)
    return found


def print_tables(found: StoreComparison, console: Console) -> None:
    """Print a table for each site, what was skipped, and how the models of the stores differ."""
    first, second = found.provenance["stores"]
    for site, data in found.results.items():
        console.print(distances(site, data, found.provenance))
        if "score" in data:
            console.print(scores(data, found.provenance))
    lines = [f"Not compared: {name}, {why}." for name, why in found.skipped.items()]
    models = [text if len(text) <= WIDEST else f"{text[:WIDEST]}…" for text in found.provenance["models"]]
    more = f"; and {len(models) - SHOWN} more" if len(models) > SHOWN else ""
    if models:
        lines.append(f"Models of {first} (before) and {second} (now): {'; '.join(models[:SHOWN])}{more}.")
    for line in lines:
        console.print(line, markup=False, highlight=False)


def distances(site: str, data: xr.Dataset, provenance: dict[str, Any]) -> TerminalTable:
    """Return a table with the distances of each layer."""
    first, second = provenance["stores"]
    told = [f"CKA on {int(data['cka_rows'].max()):,} rows."]
    columns: dict[str, Any] = {"CKA": [_cosine(value) for value in data["cka"].values]}
    if "error" in data:
        told = [
            "error: ‖a − b‖ ÷ ‖a‖ of all rows together; of single rows: median, 99 % and largest.",
            _counts(data, provenance),
            *told,
        ]
        names = {"error": "error", "error_median": "median", "error_high": "99 %", "error_largest": "largest"}
        errors = {shown: [_error(value) for value in data[name].values] for name, shown in names.items()}
        cosines = {"cosine": "cosine\nmean", "cosine_low": "\n1 %"}
        columns = errors | {text: [_cosine(v) for v in data[name].values] for name, text in cosines.items()} | columns
    table = TerminalTable(
        title=Text(f"{site}: {first} (a) and {second} (b)"),
        caption=Text(" ".join(told)),
        title_justify="left",
        caption_justify="left",
        box=None,
    )
    for name in ("layer", *columns):
        table.add_column(name, justify="right")
    for at, layer in enumerate(data["layer"].values):
        table.add_row("–" if layer < 0 else str(layer), *(cells[at] for cells in columns.values()))
    return table


def scores(data: xr.Dataset, provenance: dict[str, Any]) -> TerminalTable:
    """Return a table with the scores of the probes of each layer."""
    first, second = provenance["stores"]
    about = data.attrs
    table = TerminalTable(
        title=Text(f"{NAMES[about['metric']]} for {provenance['target']}, {about['cv']} folds"),
        caption=Text(
            f"a: {first}, b: {second}; a on b: probes of a, scored on b. In brackets 95 % over "
            f"{about['groups_found']:,} groups: of the score, then of its paired difference from a on a. "
            f"{' '.join(about['notes'])}".rstrip()
        ),
        title_justify="left",
        caption_justify="left",
        box=None,
    )
    for name in ("layer", "a on a", "b on b, difference", "a on b, difference"):
        table.add_column(name, justify="right")
    for at, layer in enumerate(data["layer"].values):
        here = data.isel(layer=at)
        cells = [f"{_score(here['score'][0])} {interval(*(float(here[f'score_{end}'][0]) for end in ('low', 'high')))}"]
        for trial in (1, 2):
            ends = (number(round(float(here[f"difference_{end}"][trial]), 3) + 0.0) for end in ("low", "high"))
            cells.append(f"{_score(here['score'][trial])} [{', '.join(ends)}]")
        table.add_row("–" if layer < 0 else str(layer), *cells)
    return table


def _counts(data: xr.Dataset, provenance: dict[str, Any]) -> str:
    """Return a sentence about the rows that were compared."""
    rows, zero = int(data["n"].max()), int(data["zero"].max())
    text = f"{rows:,} rows"
    if rows < provenance["rows"]:
        text += f" of {provenance['rows']:,}, those that both stores have committed"
    if zero:
        text += f"; up to {zero:,} of them are 0 in a store, and have neither error nor cosine"
    return f"{text}."


def _score(value: xr.DataArray) -> str:
    return number(float(value))


def _error(value: float) -> str:
    return "–" if np.isnan(value) else "0" if value == 0 else f"{value:.3g}" if value >= 1e-4 else f"{value:.1e}"


def _cosine(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.5f}"
