"""A sweep as a table for the terminal."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from analysis.probes.baselines import WITHOUT_MODEL
from analysis.probes.results import Sweep

NAMES = {
    "accuracy": "accuracy",
    "auroc": "AUROC",
    "f1": "F1",
    "recall@1%": "recall at 1 % false positives",
    "log_loss": "log-loss",
    "brier": "Brier score",
    "ece": "calibration error",
    "r2": "R²",
    "pearson": "correlation",
}
ARMS = {
    "probe": "probe",
    "majority": "majority class",
    "tfidf": "TF-IDF of the text",
    "tokens": "bag of tokens",
    "length": "number of tokens",
    "shuffled": "shuffled labels",
    "random": "random direction",
    "control": "control task",
}
SHORT = {"majority": "majority", "tfidf": "TF-IDF", "tokens": "tokens", "length": "length"}
SHOWN = 2
"""Metrics of which a table has columns."""


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
    for metric in sweep.metrics[:SHOWN]:
        first = metric == best.metric
        head = Text(f"{NAMES[metric]}\n[bootstrap 95 %]" if first else NAMES[metric])
        found.add_column(head, justify="right", no_wrap=True)
        if first:
            found.add_column("over folds\n95 %", justify="right", no_wrap=True, style="dim")
    beside = [arm for arm in ("shuffled", "control") if arm in sweep.arms]
    for name in beside:
        found.add_column(ARMS[name].replace(" ", "\n"), justify="right", no_wrap=True, style="dim")
    for layer in data["layer"].values.tolist():
        cells = _cells(sweep, "probe", layer)
        cells += [number(float(data["pooled"].sel(arm=arm, layer=layer)[0])) for arm in beside]
        is_best = layer == (-1 if best.layer is None else best.layer)
        found.add_row("–" if layer < 0 else str(layer), *cells, style="bold" if is_best else None)
    found.add_section()
    at = int(data["layer"].values[0])
    for arm in sweep.arms:
        if arm in WITHOUT_MODEL:
            found.add_row(SHORT[arm], *_cells(sweep, arm, at))
    return found


def arm_name(sweep: Sweep, arm: str) -> str:
    """Return what an arm is called."""
    return "mean of the target" if arm == "majority" and sweep.results.attrs["task"] == "regression" else ARMS[arm]


def number(value: float) -> str:
    """Return three digits as they are quoted: .882; a dash for what was not measured."""
    if value != value:
        return "–"
    return f"{value:.3f}".replace("0.", ".", 1).replace("-", "−") if abs(value) < 0.9995 else f"{value:.2f}"


def interval(low: float, high: float) -> str:
    """Return an interval in brackets; nothing where there is none."""
    if low != low:
        return ""
    return f"[{number(low)}, {number(high)}]"


def caption(sweep: Sweep) -> str:
    """Return the best layer in words, and how it was chosen."""
    best, asked = sweep.best, sweep.results.attrs
    score = f"{NAMES[best.metric]} {number(best.score)} {interval(best.ci_low, best.ci_high)}"
    if asked["layer_chosen"] == "given":
        text = f"{score}."
    elif best.nested:
        picks = ", ".join(map(str, best.chosen))
        kept = asked_strength(sweep)
        what = "layer and strength" if kept else "the layer"
        text = f"Best layer {best.layer}{kept}. With {what} chosen inside the folds ({picks}): {score}."
    else:
        text = f"Best layer {best.layer}: {score}, chosen on these very scores and so too high."
    return " ".join([text, *asked["notes"]])


def asked_strength(sweep: Sweep) -> str:
    """Return the strength of the best layer's weights in words, where several were tried."""
    if "final_strength" not in sweep.results:
        return ""
    layer = -1 if sweep.best.layer is None else sweep.best.layer
    return f" at strength {float(sweep.results['final_strength'].sel(layer=layer)):.3g}"


def _cells(sweep: Sweep, arm: str, layer: int) -> list[str]:
    cells = []
    for metric in sweep.metrics[:SHOWN]:
        values = sweep.results.sel(arm=arm, layer=layer, metric=metric)
        names = ("pooled", "ci_low", "ci_high", "mean", "fold_high")
        at = {name: float(values[name]) for name in names}
        if metric != sweep.best.metric:
            cells.append(number(at["pooled"]))
        else:
            cells.append(f"{number(at['pooled'])} {interval(at['ci_low'], at['ci_high'])}")
            cells.append(f"{number(at['mean'])} ± {number(at['fold_high'] - at['mean'])}")
    return cells
