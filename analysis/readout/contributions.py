"""Figure and table of direct logit attributions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from rich.table import Table

from analysis.plot_style import INK, PAPER, SOFT, save_figure
from analysis.terminal_table import TerminalTable

AFTER_HEADS = {"attention": "attention", "attention bias": "bias", "mlp": "MLP"}


def heat_map(found: xr.Dataset, path: str | Path | None = None) -> Figure:
    """Draw mean contributions over rows: layer × head, attention bias and MLP; other terms are in the title.

    ::

        contributions.heat_map(logit_attribution.compute(store, model, (good, bad)), "heads.png")

    Parameters
    ----------
    path
        File to write: PNG, SVG or PDF.
    """
    mean = found["contribution"].mean("row").values
    kinds, layers, heads = (found[name].values for name in ("kind", "layer", "head"))
    numbers = sorted(set(heads[heads >= 0].tolist()))
    names = [*numbers, *(kind for kind in AFTER_HEADS if (kinds == kind).any())]
    lines = sorted(set(layers[layers >= 0].tolist()))
    values = np.full((len(lines), len(names)), np.nan)
    for value, kind, layer, head in zip(mean, kinds, layers, heads, strict=True):
        if layer >= 0:
            values[lines.index(layer), names.index(head if kind == "head" else kind)] = value
    figure = Figure(figsize=(2.2 + 0.34 * max(len(names), 6), 1.6 + 0.3 * max(len(lines), 6)), layout="constrained")
    figure.set_facecolor(PAPER)
    axes = figure.subplots()
    away = float(np.nanmax(np.abs(values))) or 1.0
    image = axes.imshow(values, cmap="RdBu_r", vmin=-away, vmax=away, aspect="auto", origin="lower")
    step = max(1, len(lines) // 12)
    axes.set_yticks(range(0, len(lines), step), [str(layer) for layer in lines[::step]])
    labels = [AFTER_HEADS.get(str(name), str(name)) for name in names]
    shown = [n for n in range(len(names)) if n >= len(numbers) or n % max(1, len(numbers) // 16) == 0]
    axes.set_xticks(shown, [labels[n] for n in shown], rotation=90 if len(names) > 12 else 0)
    axes.set_xlabel("head" if numbers else "", color=INK)
    axes.set_ylabel("layer", color=INK)
    axes.tick_params(length=0, labelcolor=SOFT)
    axes.spines[:].set_visible(False)
    others = [
        f"{found['component'].values[n]} {mean[n]:+.3g}" for n in np.flatnonzero((layers < 0) & (np.abs(mean) > 0))
    ]
    title = f"direct contributions to {'a logit' if (found['other'] < 0).all() else 'a logit difference'}"
    axes.set_title(f"{title}\n{', '.join(others)}", loc="left", color=INK, fontsize=10, wrap=True)
    figure.colorbar(image, ax=axes, shrink=0.8).ax.tick_params(color=SOFT, labelcolor=SOFT)
    return save_figure(figure, path)


def table(found: xr.Dataset, rows: int = 20) -> Table:
    """Return the components of the largest mean contributions, with their standard deviations over rows."""
    values = found["contribution"].transpose("row", "component").values
    mean, spread = values.mean(0), values.std(0)
    total = float(found["logit"].mean())
    shown = TerminalTable(title=f"logit {total:.4g}, mean over {len(values)} rows", title_justify="left", box=None)
    shown.add_column("component")
    for name in ("mean", "sd over rows", "share"):
        shown.add_column(name, justify="right")
    for n in np.argsort(-np.abs(mean), kind="stable")[:rows]:
        share = f"{mean[n] / total:.1%}" if total else ""
        shown.add_row(str(found["component"].values[n]), f"{mean[n]:+.4g}", f"{spread[n]:.4g}", share)
    return shown
