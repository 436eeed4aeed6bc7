"""The largest effects of a sweep, as a table."""

from __future__ import annotations

import numpy as np
import xarray as xr
from rich.markup import escape
from rich.table import Table

from analysis.replay.sweeps.effects import estimate_effects
from analysis.sweep_results import names_along


def table(results: xr.Dataset, rows: int = 20) -> Table:
    """Return the cells of the largest mean effects by the first metric, with all metrics and p against each control."""
    effect, metrics = estimate_effects(results), names_along(results, "metric")
    first, made = metrics[0], effect.sel(arm="edit")
    shown = Table(title=f"largest by {first}, mean over documents", title_justify="left", box=None)
    for name in ("layer", "position", "edit", "alpha", "documents", *metrics):
        shown.add_column(name, justify="left" if name == "edit" else "right")
    controls = [name for name in names_along(results, "arm")[1:] if name != "identity"]
    for name in controls:
        shown.add_column(f"p, {name.replace('_', ' ')}", justify="right")
    score = made["mean"].sel(metric=first).transpose("layer", "position", "edit", "alpha")
    order = np.argsort(-np.nan_to_num(np.abs(score.values), nan=-1.0), axis=None, kind="stable")[:rows]
    for place in zip(*np.unravel_index(order, score.shape)):
        at = dict(zip(score.dims, map(int, place)))
        cell = made.isel(at)
        if not np.isfinite(float(cell["mean"].sel(metric=first))):
            continue
        shown.add_row(
            str(int(cell["layer"])),
            escape(str(cell["position"].values)),
            escape(str(cell["edit"].values)),
            f"{float(cell['alpha']):g}",
            str(int(cell["documents"].sel(metric=first))),
            *(f"{float(cell['mean'].sel(metric=name)):.4g}" for name in metrics),
            *(f"{float(cell[f'p_{name}'].sel(metric=first)):.3f}" for name in controls),
        )
    return shown
