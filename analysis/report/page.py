"""Fill the page of a probe sweep: facts, curves and table."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from markupsafe import Markup

from analysis.dataset.store_argument import accept_store_path
from analysis.probes import Sweep
from analysis.probes.options import WITHOUT_MODEL
from analysis.probes.table import NAMES, SHOWN, arm_name, caption, fold_mean, interval, number, over_folds
from analysis.report import chart, facts
from analysis.report.template import write_page
from flexcache.store.read.store import Store

TEMPLATE = "page.html.j2"


@accept_store_path
def write(
    store: Store,
    sweep: Sweep,
    path: str | Path,
    *,
    title: str | None = None,
    command: str | None = None,
) -> Path:
    """Write one self-contained HTML file about a probe sweep: no script, no network, light and dark colours.

    ::

        report.write(store, probes.sweep(store, "label", "resid_post"), "report.html")

    Parameters
    ----------
    store
        The store that was probed, or its path.
    sweep
        Result of `analysis.probes.sweep` for it.
    path
        Path of the file; folders are made.
    title
        Heading; target and site by default.
    command
        Command line that made the report, shown under "Repeat this sweep" with the Python code.

    Returns
    -------
    Path
        The file. All texts from data are escaped.
    """
    what = sweep.results.attrs
    best = sweep.best
    return write_page(
        TEMPLATE,
        path,
        title=title or f"{what['target']} in {what['site']}",
        model=re.sub(r"^/.*/(?=[^/])", "", store.provenance.model_name),
        store=store.path.name,
        what=what,
        best=best,
        best_name=NAMES[best.metric],
        best_score=number(best.score),
        best_interval=interval(best.ci_low, best.ci_high),
        summary=caption(sweep.results).removesuffix(" ".join(what["notes"])).strip(),
        baselines=_baselines(sweep),
        charts=[(NAMES[metric], Markup(chart.svg(sweep, metric))) for metric in sweep.metrics[:SHOWN]],
        others=_others(sweep),
        pictures=[(text, Markup(drawn)) for text, drawn in chart.result_figures(sweep)],
        over_folds=over_folds(sweep.results),
        metrics=[NAMES[metric] for metric in sweep.metrics[:SHOWN]],
        lines=_lines(sweep),
        shuffled="shuffled" in sweep.arms,
        tfidf="tfidf" in sweep.arms,
        captured=facts.captured(store),
        asked=facts.asked(sweep),
        folds=[int(count) for count in sweep.results["fold_samples"].values],
        snippet=facts.snippet(sweep, str(store.path)),
        command=command,
        provenance=json.dumps(
            {"store": store.provenance.to_json(), "capture": store.spec.to_json(), "probe": what}, indent=2, default=str
        ),
    )


def _baselines(sweep: Sweep) -> list[dict[str, Any]]:
    """Return name, score and interval of each baseline; baselines fitted to layers are at the best layer."""
    best, found = sweep.best, []
    for arm in sweep.arms[1:]:
        at = sweep.results.sel(arm=arm, metric=best.metric, layer=-1 if best.layer is None else best.layer)
        ends = interval(float(at["ci_low"]), float(at["ci_high"]))
        found.append(
            {
                "arm": arm,
                "name": arm_name(sweep.results, arm),
                "score": number(float(at["pooled"])),
                "interval": ends,
                "fixed": arm in WITHOUT_MODEL,
            }
        )
    return found


def _lines(sweep: Sweep) -> list[dict[str, Any]]:
    """Return the rows of the table: the layers, then the baselines without layers."""
    best, layers = sweep.best, [int(layer) for layer in sweep.results["layer"].values]
    top = -1 if best.layer is None else best.layer
    found = [
        {
            "name": "–" if layer < 0 else str(layer),
            "best": layer == top,
            "cells": _cells(sweep, "probe", layer),
            "shuffled": number(float(sweep.results["pooled"].sel(arm="shuffled", layer=layer)[0]))
            if "shuffled" in sweep.arms
            else "",
        }
        for layer in layers
    ]
    for arm in sweep.arms:
        if arm in WITHOUT_MODEL:
            cells = _cells(sweep, arm, layers[0])
            found.append({"name": arm_name(sweep.results, arm), "best": False, "cells": cells, "shuffled": ""})
    return found


def _cells(sweep: Sweep, arm: str, layer: int) -> list[tuple[str, str, str]]:
    cells = []
    for metric in sweep.metrics[:SHOWN]:
        at = sweep.results.sel(arm=arm, layer=layer, metric=metric)
        cells.append(
            (
                number(float(at["pooled"])),
                interval(float(at["ci_low"]), float(at["ci_high"])),
                fold_mean(sweep.results, arm, layer, metric),
            )
        )
    return cells


def _others(sweep: Sweep) -> list[tuple[str, str, str]]:
    """Return every metric of the nested predictions, and further measures at the best layer."""
    data, best = sweep.results, sweep.best
    found = [
        (
            NAMES[metric],
            number(float(data["best_pooled"].sel(metric=metric))),
            interval(float(data["best_ci_low"].sel(metric=metric)), float(data["best_ci_high"].sel(metric=metric))),
        )
        for metric in sweep.metrics
    ]
    layer = -1 if best.layer is None else best.layer
    if "selectivity" in data:
        at = data.sel(layer=layer)
        ends = [float(at[name]) for name in ("selectivity_low", "selectivity_high") if name in data]
        spread = f"{interval(*ends)}, middle 95 % of {data.attrs['nulls']} draws" if ends else "one draw"
        found.append(("selectivity, at the best layer", number(float(at["selectivity"])), spread))
    if "compression" in data:
        bits = float(data["codelength"].sel(layer=layer))
        ratio = float(data["compression"].sel(layer=layer))
        found.append(
            ("online codelength, at the best layer", f"{bits:,.0f} bits", f"{ratio:.2f} times shorter than even")
        )
    if "final_strength" in data:
        strength = float(data["final_strength"].sel(layer=layer))
        found.append(("strength of the weights that are kept", f"{strength:.3g}", "chosen by all folds"))
    return found
