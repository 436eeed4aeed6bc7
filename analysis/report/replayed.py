"""Write the page of a replay sweep: figures, table and reliability."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from markupsafe import Markup
from matplotlib.figure import Figure

from analysis.dataset.store_argument import accept_store_path
from analysis.readout.contributions import heat_map
from analysis.replay.gradients.plot import scatter
from analysis.replay.sweeps.chart_figure import draw_panels
from analysis.replay.sweeps.charts import make_charts
from analysis.replay.sweeps.effects import largest_cells
from analysis.replay.sweeps.results import Sweep
from analysis.report import facts
from analysis.report.drawing import themed
from analysis.report.template import source, write_page
from flexcache.store.read.store import Store

TEMPLATE = "replay.html.j2"
LINES = 60
"""Number of cells in the table; all cells are in results.zarr."""


@accept_store_path
def write(
    store: Store,
    sweep: Sweep,
    path: str | Path,
    *,
    exact: xr.Dataset | None = None,
    direct: xr.Dataset | None = None,
    command: str | None = None,
    groups: str = "document",
) -> Path:
    """Write one self-contained HTML file about a replay sweep: no script, no network.

    ::

        replayed.write(store, replay.load("results"), "replay.html")

    Parameters
    ----------
    exact
        Result of `analysis.replay.verify`, for a figure of attributed against exact effects.
    direct
        Result of `analysis.logit_attribution.compute`, for a figure of heads and MLPs.
    groups
        Column of the documents whose equal values are drawn together, for intervals and tests.

    Returns
    -------
    Path
        The file. All texts from data are escaped.
    """
    style = _style(source("page.html.j2"))
    data, asked = sweep.results, sweep.results.attrs["question"]
    effect = sweep.effect(store, groups)
    return write_page(
        TEMPLATE,
        path,
        style=Markup(style),
        title=f"edits of {asked['site']}",
        model=re.sub(r"^/.*/(?=[^/])", "", str(data.attrs["model"])),
        store=store.path.name,
        documents=data.sizes["document"],
        notes=data.attrs["notes"],
        splits=data.attrs["splits"],
        error=f"{float(data['identity_error'].max()):.3g}",
        exact_everywhere=bool((data["identity_error"] == 0).all()),
        skipped=[int(data["skipped"].min()), int(data["skipped"].max())],
        depth=data.attrs["depth"],
        charts=[chart for name in sweep.metrics for chart in _charts(effect, name)],
        exact=None if exact is None else Markup(_svg(scatter(exact), "attribution")),
        direct=None if direct is None else Markup(_svg(heat_map(direct), "direct")),
        rho=None if exact is None else f"{exact.attrs['rank_correlation']:.2f}",
        method=None if exact is None else exact.attrs["method"],
        metrics=list(sweep.metrics),
        controls=sweep.arms[1:],
        tests=effect.attrs["tests"],
        floor=[(name, f"{float(effect['noise_floor'].sel(metric=name).max()):.2g}") for name in sweep.metrics],
        lines=_lines(sweep, effect),
        captured=facts.captured(store),
        groups=groups,
        command=command,
        question=json.dumps(_short(asked), indent=2, default=str),
    )


def _style(page: str) -> str:
    """Return the style of the probe report, so that both pages look the same."""
    return page[page.index("<style>") + len("<style>") : page.index("</style>")]


def _svg(figure: Figure, name: str) -> str:
    return themed(figure, re.sub(r"\W", "-", name), name, {})


def _charts(effect: xr.Dataset, metric: str) -> list[dict[str, Any]]:
    """Return title, caption, legend, and panels as SVG of each chart of a metric; on a narrow screen, panels wrap."""
    return [
        {
            "title": chart.title,
            "caption": chart.caption,
            "panels": [
                Markup(_svg(figure, f"{metric}-{number}-{panel}")) for panel, figure in enumerate(draw_panels(chart))
            ],
            "legend": [(label, colour, " ".join(map(str, dashes))) for label, colour, dashes in chart.legend],
        }
        for number, chart in enumerate(make_charts(effect, metric))
    ]


def _lines(sweep: Sweep, effect: xr.Dataset) -> list[dict[str, Any]]:
    found = []
    for cell in largest_cells(effect, sweep.metrics[0], LINES):
        cells = []
        for metric in sweep.metrics:
            at = cell.sel(metric=metric)
            mean, low, high = (float(at[name].sel(arm="edit")) for name in ("mean", "ci_low", "ci_high"))
            others = [
                (f"{float(at['mean'].sel(arm=arm)):.4g}", *(_p(at[f"{what}_{arm}"]) for what in ("p", "p_adjusted")))
                for arm in sweep.arms[1:]
            ]
            cells.append((f"{mean:.4g}", f"[{low:.4g}, {high:.4g}]", others))
        found.append(
            {
                "layer": int(cell["layer"]),
                "position": str(cell["position"].values),
                "edit": str(cell["edit"].values),
                "alpha": f"{float(cell['alpha']):g}",
                "documents": int(cell["documents"].sel(arm="edit", metric=sweep.metrics[0])),
                "cells": cells,
            }
        )
    return found


def _p(value: xr.DataArray) -> str:
    return f"{float(value):.3f}" if np.isfinite(value) else ""


def _short(value: Any) -> Any:
    """Return the settings without the bytes of their arrays."""
    if isinstance(value, dict):
        return {k: f"{len(v)} bytes" if k == "base64" else _short(v) for k, v in value.items()}
    return [_short(part) for part in value] if isinstance(value, list) else value
