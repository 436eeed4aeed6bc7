"""Format a probe sweep as a table for the terminal."""

from __future__ import annotations

import xarray as xr
from rich.table import Table
from rich.text import Text

from analysis.probes.best_layer import best_layer
from analysis.probes.options import WITHOUT_MODEL
from analysis.sweep_results import names_along
from analysis.terminal_table import TerminalTable

NAMES = {
    "accuracy": "accuracy",
    "auroc": "AUROC",
    "f1": "F1",
    "balanced_accuracy": "balanced accuracy",
    "recall@1%": "recall at 1 % false positives",
    "log_loss": "log-loss",
    "brier": "Brier score",
    "ece": "calibration error",
    "ece_debiased": "calibration error without noise",
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
"""Number of metrics that get columns in a table."""


def table(results: xr.Dataset) -> Table:
    """Return a row for each layer and baseline: pooled score, interval over groups, mean ± half width over folds."""
    asked, best = results.attrs, best_layer(results)
    found = TerminalTable(
        title=Text(f"{asked['target']} read from {asked['site']} by {asked['probe']}"),
        caption=Text(caption(results)),
        caption_justify="left",
        title_justify="left",
    )
    found.add_column("layer", justify="right", no_wrap=True)
    for metric in names_along(results, "metric")[:SHOWN]:
        first = metric == best.metric
        head = Text(f"{NAMES[metric]}\n[95 % over groups]" if first else NAMES[metric])
        found.add_column(head, justify="right", no_wrap=True)
        if first:
            found.add_column(f"{over_folds(results)}\n95 %", justify="right", no_wrap=True, style="dim")
    extra = [arm for arm in ("shuffled", "control") if arm in names_along(results, "arm")]
    for name in extra:
        found.add_column(ARMS[name].replace(" ", "\n"), justify="right", no_wrap=True, style="dim")
    for layer in results["layer"].values.tolist():
        cells = _cells(results, "probe", layer)
        cells += [number(float(results["pooled"].sel(arm=arm, layer=layer)[0])) for arm in extra]
        is_best = layer == (-1 if best.layer is None else best.layer)
        found.add_row("–" if layer < 0 else str(layer), *cells, style="bold" if is_best else None)
    found.add_section()
    at = int(results["layer"].values[0])
    for arm in names_along(results, "arm"):
        if arm in WITHOUT_MODEL:
            found.add_row(SHORT[arm], *_cells(results, arm, at))
    return found


def arm_name(results: xr.Dataset, arm: str) -> str:
    """Return the displayed name of an arm."""
    return "mean of the target" if arm == "majority" and results.attrs["task"] == "regression" else ARMS[arm]


def number(value: float) -> str:
    """Return a score with three digits, such as .882; a dash for NaN."""
    if value != value:
        return "–"
    return f"{value:.3f}".replace("0.", ".", 1).replace("-", "−") if abs(value) < 0.9995 else f"{value:.2f}"


def interval(low: float, high: float) -> str:
    """Return an interval in brackets, or an empty text for NaN."""
    if low != low:
        return ""
    return f"[{number(low)}, {number(high)}]"


def caption(results: xr.Dataset) -> str:
    """Return a sentence about the best layer and how it was chosen."""
    best, asked = best_layer(results), results.attrs
    score = f"{NAMES[best.metric]} {number(best.score)} {interval(best.ci_low, best.ci_high)}"
    if asked["layer_chosen"] == "given":
        text = f"{score}."
    elif best.nested:
        picks = ", ".join(map(str, best.chosen))
        kept = strength_text(results)
        what = "layer and strength" if kept else "the layer"
        chosen_by = asked.get("selection_metric", best.metric)
        by = "" if chosen_by == best.metric else f" by {NAMES[chosen_by]}"
        text = f"Best layer {best.layer}{kept}. With {what} chosen inside the folds{by} ({picks}): {score}."
    else:
        text = f"Best layer {best.layer}: {score}, chosen on these very scores and therefore too high."
    return " ".join(filter(None, [text, *_repeated(results), null_text(results), *asked["notes"]]))


def null_text(results: xr.Dataset) -> str:
    """Return a sentence about the draws of the baselines at the best layer; an empty text if there was only one."""
    if "null_p" not in results:
        return ""
    layer = -1 if best_layer(results).layer is None else best_layer(results).layer
    data = results.sel(layer=layer).isel(metric=0)
    told = []
    for arm in names_along(results, "baseline"):
        at = data.sel(baseline=arm)
        mean, low, high, p, corrected = (
            float(value)
            for value in (
                at["null_score"].mean(),
                *(at[name] for name in ("null_low", "null_high", "null_p", "null_p_corrected")),
            )
        )
        told.append(f"{ARMS[arm]} {number(mean)} {interval(low, high)}, p {number(p)}, {number(corrected)} over layers")
    if "selectivity_sd" in data:
        told.append(f"selectivity {number(float(data['selectivity']))} ± {number(float(data['selectivity_sd']))} (sd)")
    return f"{results.attrs['nulls']} draws at this layer: {'; '.join(told)}."


def over_folds(results: xr.Dataset) -> str:
    """Return the heading of the means over folds."""
    repeats = results.attrs.get("repeats", 1)
    return "over folds" if repeats == 1 else f"over {repeats} × {results.attrs['cv']} folds"


def fold_mean(results: xr.Dataset, arm: str, layer: int, metric: str) -> str:
    """Return the mean over folds ± half the width of its interval, over all repeats where there are several."""
    at, name = results.sel(arm=arm, layer=layer, metric=metric), "fold_high"
    mean = float(at["mean"])
    if arm == "probe" and "repeat_mean" in results:
        mean, name = float(at["repeat_mean"]), "repeat_high"
    return f"{number(mean)} ± {number(float(at[name]) - mean)}"


def _repeated(results: xr.Dataset) -> list[str]:
    """Return a sentence about the repeats of the cross-validation, if there are several."""
    if "best_repeat_mean" not in results:
        return []
    mean, low, high = (float(results[f"best_repeat_{end}"][0]) for end in ("mean", "low", "high"))
    asked = results.attrs
    return [
        f"Over {asked['repeats']} cross-validations in {asked['cv']} folds: {number(mean)} {interval(low, high)}, "
        "which allows for other training samples as well (corrected resampled t, Nadeau & Bengio 2003)."
    ]


def strength_text(results: xr.Dataset) -> str:
    """Return the strength of the weights of the best layer as text, if several were tried."""
    if "final_strength" not in results:
        return ""
    layer = -1 if best_layer(results).layer is None else best_layer(results).layer
    return f" at strength {float(results['final_strength'].sel(layer=layer)):.3g}"


def _cells(results: xr.Dataset, arm: str, layer: int) -> list[str]:
    cells = []
    for metric in names_along(results, "metric")[:SHOWN]:
        values = results.sel(arm=arm, layer=layer, metric=metric)
        names = ("pooled", "ci_low", "ci_high")
        at = {name: float(values[name]) for name in names}
        if metric != best_layer(results).metric:
            cells.append(number(at["pooled"]))
        else:
            cells.append(f"{number(at['pooled'])} {interval(at['ci_low'], at['ci_high'])}")
            cells.append(fold_mean(results, arm, layer, metric))
    return cells
