"""The largest effects of a sweep, as a table."""

from __future__ import annotations

import xarray as xr
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from analysis.replay.sweeps.effects import estimate_effects, largest_cells
from analysis.sweep_results import names_along
from analysis.terminal_table import TerminalTable


def table(results: xr.Dataset, rows: int = 20) -> Table:
    """Return the cells of the largest mean effects by the first metric, with all metrics and adjusted p-values."""
    effect, metrics = estimate_effects(results), names_along(results, "metric")
    first = metrics[0]
    controls = tested_baselines(results, first)
    shown = TerminalTable(title=f"largest by {first}, mean over documents", title_justify="left", box=None, repeated=4)
    shown.caption, shown.caption_justify = Text(caption(effect)), "left"
    for name in ("layer", "position", "edit", "strength", "documents", *metrics):
        shown.add_column(name, justify="left" if name in ("position", "edit") else "right")
    for name in controls:
        shown.add_column(f"p adjusted,\n{name.replace('_', ' ')}", justify="right")
    for cell in largest_cells(effect, first, rows):
        made = cell.sel(arm="edit")
        shown.add_row(
            str(int(cell["layer"])),
            escape(str(cell["position"].values)),
            escape(str(cell["edit"].values)),
            f"{float(cell['alpha']):g}",
            str(int(made["documents"].sel(metric=first))),
            *(f"{float(made['mean'].sel(metric=name)):.4g}" for name in metrics),
            *(f"{float(cell[f'p_adjusted_{name}'].sel(metric=first)):.3f}" for name in controls),
        )
    return shown


def tested_baselines(results: xr.Dataset, metric: str) -> list[str]:
    """Return the baselines that a metric is tested against: not ``identity``, if its values lie on one side of that."""
    one_sided = metric in results.attrs["one_sided"]
    return [name for name in names_along(results, "arm")[1:] if not (one_sided and name == "identity")]


def caption(effect: xr.Dataset) -> str:
    """Return sentences about the tests and the noise floor, and about cells that are left out."""
    floors = effect["noise_floor"].max("layer")
    shown = ", ".join(f"{name} {float(floors.sel(metric=name)):.2g}" for name in names_along(effect, "metric"))
    return (
        f"{effect.attrs['tests']} Noise floor, the largest value over documents of a replay that changes nothing less "
        f"that of the forward: {shown}. Cells whose change is within it are left out."
    )
