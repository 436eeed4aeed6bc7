"""A sweep as a table for the terminal."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from analysis.probes.results import Sweep

NAMES = {"accuracy": "accuracy", "auroc": "AUROC", "r2": "R²"}
ARMS = {
    "probe": "probe",
    "majority": "majority class",
    "shuffled": "shuffled labels",
    "tfidf": "TF-IDF of the text",
}
BASELINES = {"majority": "majority", "tfidf": "TF-IDF"}


def table(sweep: Sweep) -> Table:
    """Return a line a layer and a line a baseline: pooled score, bootstrap, mean ± over folds."""
    data, asked, best = sweep.results, sweep.results.attrs, sweep.best
    found = Table(
        title=Text(f"{asked['target']} read from {asked['site']} by {asked['probe']}"),
        caption=Text(caption(sweep)),
        caption_justify="left",
        title_justify="left",
    )
    found.add_column("layer", justify="right", no_wrap=True)
    for metric in sweep.metrics:
        found.add_column(Text(f"{NAMES[metric]}\n[bootstrap 95 %]"), justify="right", no_wrap=True)
        if metric == best.metric:
            found.add_column("over folds\n95 %", justify="right", no_wrap=True, style="dim")
    if "shuffled" in sweep.arms:
        found.add_column("shuffled\nlabels", justify="right", no_wrap=True, style="dim")
    for layer in data["layer"].values.tolist():
        cells = _cells(sweep, "probe", layer)
        if "shuffled" in sweep.arms:
            cells.append(number(float(data["pooled"].sel(arm="shuffled", layer=layer)[0])))
        is_best = layer == (-1 if best.layer is None else best.layer)
        found.add_row("–" if layer < 0 else str(layer), *cells, style="bold" if is_best else None)
    found.add_section()
    first = int(data["layer"].values[0])
    for arm in sweep.arms:
        if arm not in ("probe", "shuffled"):
            found.add_row(
                "mean" if arm == "majority" and asked["task"] == "regression" else BASELINES[arm],
                *_cells(sweep, arm, first),
            )
    return found


def number(value: float) -> str:
    """Return three digits as they are quoted: .882."""
    return f"{value:.3f}".replace("0.", ".", 1).replace("-", "−") if abs(value) < 0.9995 else f"{value:.2f}"


def interval(low: float, high: float) -> str:
    """Return an interval in brackets."""
    return f"[{number(low)}, {number(high)}]"


def caption(sweep: Sweep) -> str:
    """Return the best layer in words, and how it was chosen."""
    best, asked = sweep.best, sweep.results.attrs
    score = f"{NAMES[best.metric]} {number(best.score)} {interval(best.ci_low, best.ci_high)}"
    if asked["layer_chosen"] == "given":
        text = f"{score}."
    elif best.nested:
        picks = ", ".join(map(str, best.chosen))
        text = f"Best layer {best.layer}. With the layer chosen inside the folds ({picks}): {score}."
    else:
        text = f"Best layer {best.layer}: {score}, chosen on these very scores and so too high."
    return " ".join([text, *asked["notes"]])


def _cells(sweep: Sweep, arm: str, layer: int) -> list[str]:
    cells = []
    for metric in sweep.metrics:
        values = sweep.results.sel(arm=arm, layer=layer, metric=metric)
        names = ("pooled", "ci_low", "ci_high", "mean", "fold_high")
        at = {name: float(values[name]) for name in names}
        cells.append(f"{number(at['pooled'])} {interval(at['ci_low'], at['ci_high'])}")
        if metric == sweep.best.metric:
            cells.append(f"{number(at['mean'])} ± {number(at['fold_high'] - at['mean'])}")
    return cells
