"""Paired comparison of probes on the same samples and folds: of layers, sites, kinds of probe and stores."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Protocol

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy.stats import t as student

from analysis.probes.evaluation import score
from analysis.probes.evaluation.intervals import leave_groups_out
from analysis.probes.held_out_predictions import HeldOutPredictions
from analysis.sweep_results import check_metric
from flexcache.errors import AnalysisError

Floats = NDArray[np.float64]


class ComparedSweep(Protocol):
    """The part of a sweep that a comparison needs."""

    @property
    def results(self) -> xr.Dataset:
        """Scores by layer."""
        ...

    @property
    def predictions(self) -> HeldOutPredictions | None:
        """Out-of-fold predictions."""
        ...


def compare(
    probes: Mapping[str, ComparedSweep | tuple[ComparedSweep, int]], *, metric: str | None = None
) -> xr.Dataset:
    """Compare every probe with every other, on the samples and folds that they share.

    ::

        probes.compare({"residual": sweep, "mlp": other})             # the best layer of each
        probes.compare({"early": (sweep, 3), "late": (sweep, 9)})     # given layers

    Both probes of a pair predict the same held-out samples. Two questions have an answer each:

    - Would these probes differ on other groups? ``ci_low, ci_high, p``: Student's t with the jackknife over whole
      groups (Efron & Stein 1981), groups − 1 degrees of freedom. p is at least 2^(1 − groups), the least that flipping
      the signs of groups could give.
    - Would probes differ that are fitted to other groups? ``fold_low, fold_high, fold_p``: Student's t over the folds
      with the variance for overlapping training sets (Nadeau & Bengio 2003). It is the wider one, and the one for
      statements about layers, sites and stores rather than about these very weights.

    ``p_corrected, fold_p_corrected`` are corrected for all pairs of this call (Holm 1979).

    Parameters
    ----------
    probes
        By name, a sweep or a sweep and a layer of it. Of a sweep alone, each fold is predicted by the layer that was
        chosen without it, as in `Sweep.best`.
    metric
        The first one of the first sweep by default.

    Returns
    -------
    Dataset with dim (pair,)
        ``difference``, first less second, with intervals and p-values as above; ``first_score, second_score``;
        coordinates ``first, second``. NaN where the metric is not defined.

    Raises
    ------
    AnalysisError
        There are fewer than two probes; their samples, targets, folds or groups differ; a sweep lacks the layer, the
        metric or its predictions.
    """
    if len(probes) < 2:
        raise AnalysisError("a comparison needs two probes", expected="at least two", found=str(len(probes)))
    chosen = {name: (asked if isinstance(asked, tuple) else (asked, None)) for name, asked in probes.items()}
    sweeps = [sweep for sweep, _ in chosen.values()]
    metric = check_metric(sweeps[0].results, metric)
    first = _held_out(next(iter(chosen)), sweeps[0])
    order = np.argsort(first.key, kind="stable")
    y, fold, group = first.y[order], first.fold[order], np.unique(first.group[order], return_inverse=True)[1]
    scores, by_fold, without, notes = [], [], [], []
    for name, (sweep, layer) in chosen.items():
        check_metric(sweep.results, metric)
        told = _held_out(name, sweep)
        if told is not first:
            _check_alike(name, (sweeps[0], first), (sweep, told))
        at = _index(name, sweep, layer)
        if layer is None and sweep.results.attrs["layer_chosen"] == "on these scores":
            notes.append(f"The layer of {name} was chosen on these very scores, which are therefore too high.")
        prediction = told.predict(at).select_samples(np.argsort(told.key, kind="stable"))
        top, bottom = score.parts(metric, y, prediction, fold, int(fold.max()) + 1, group)  # type: ignore[arg-type]
        by_fold.append(score.ratio(top, bottom))
        scores.append(score.pooled(metric, y, prediction, fold, group))  # type: ignore[arg-type]
        without.append(leave_groups_out(metric, y, prediction, fold, group, seed=0)[0])  # type: ignore[arg-type]
    pairs = list(combinations(range(len(chosen)), 2))
    one, two = np.array(pairs).T
    value = np.array(scores)[one] - np.array(scores)[two]
    low, high, p = _group_test(value, np.array(without)[one] - np.array(without)[two], int(group.max()) + 1)
    fold_low, fold_high, fold_p = _fold_test(np.array(by_fold)[one] - np.array(by_fold)[two])
    names = list(chosen)
    found = {
        "difference": value,
        "ci_low": low,
        "ci_high": high,
        "p": p,
        "p_corrected": _holm(p),
        "fold_low": fold_low,
        "fold_high": fold_high,
        "fold_p": fold_p,
        "fold_p_corrected": _holm(fold_p),
        "first_score": np.array(scores)[one],
        "second_score": np.array(scores)[two],
    }
    return xr.Dataset(
        {name: ("pair", values) for name, values in found.items()},
        {"first": ("pair", [names[i] for i in one]), "second": ("pair", [names[i] for i in two])},
        {
            "metric": metric,
            "target": sweeps[0].results.attrs["target"],
            "samples": len(y),
            "groups": int(group.max()) + 1,
            "folds": int(fold.max()) + 1,
            "correction": f"Holm, {len(pairs)} comparison{'s' * (len(pairs) > 1)}",
            "notes": notes,
        },
    )


def _held_out(name: str, sweep: ComparedSweep) -> HeldOutPredictions:
    if sweep.predictions is None:
        raise AnalysisError(
            f"the sweep of {name} holds no predictions",
            found="a sweep that was saved by an earlier version",
            remedy="run the sweep again",
        )
    return sweep.predictions


def _index(name: str, sweep: ComparedSweep, layer: int | None) -> int | NDArray[np.int64]:
    """Return the index of a layer; of the layer that was chosen for each fold for None."""
    layers = sweep.results["layer"].values.tolist()
    if layer is None:
        return np.array([layers.index(at) for at in sweep.results["chosen_layer"].values.tolist()])
    if layer not in layers:
        raise AnalysisError(
            f"layer {layer} was not probed", where=name, expected=f"one of {', '.join(map(str, layers))}"
        )
    return layers.index(layer)


def _check_alike(
    name: str, one: tuple[ComparedSweep, HeldOutPredictions], two: tuple[ComparedSweep, HeldOutPredictions]
) -> None:
    """Raise AnalysisError if two sweeps cannot be compared sample by sample."""
    (first, a), (second, b) = one, two
    here, there = (np.argsort(told.key, kind="stable") for told in (a, b))
    if not np.array_equal(a.key[here], b.key[there]):
        shared = len(np.intersect1d(a.key, b.key))
        what = f"{len(a.key):,} and {len(b.key):,} samples, {shared:,} documents in common"
        advice = "probe the same documents with the same target and rows"
    elif not np.array_equal(a.y[here], b.y[there]) or first.results.attrs["classes"] != second.results.attrs["classes"]:
        what = f"target {first.results.attrs['target']!r} and target {second.results.attrs['target']!r}"
        advice = "probe the same target"
    elif _count_groups(a.group[here], b.group[there]) > min(_count_groups(a.group), _count_groups(b.group)):
        what, advice = "other groups", "give both sweeps the same groups"
    elif not np.array_equal(a.fold[here], b.fold[there]):
        what = f"{int((a.fold[here] != b.fold[there]).sum()):,} samples in other folds"
        advice = "give both sweeps the same cv, seed and groups, and capture the documents in the same order"
    else:
        return
    raise AnalysisError(
        f"the sweep of {name} cannot be paired with the first one",
        expected="the same samples, target, groups and folds",
        found=what,
        remedy=advice,
    )


def _count_groups(*groups: NDArray[np.int64]) -> int:
    return np.unique(np.stack(groups), axis=1).shape[1]


def _group_test(value: Floats, without: Floats, groups: int) -> tuple[Floats, Floats, Floats]:
    """Return the interval and the two-sided p of each difference, from the differences without each group."""
    count = without.shape[1]
    error = without.std(1) * np.sqrt(count - 1)
    half = student.ppf(0.975, count - 1) * error
    least = np.where(np.isnan(value + error), np.nan, 2.0 ** (1 - groups))
    return value - half, value + half, np.maximum(_two_sided(value, error, count - 1), least)


def _fold_test(by_fold: Floats) -> tuple[Floats, Floats, Floats]:
    """Return the interval and the two-sided p of each difference, (pairs,), from those of the folds, (pairs, folds)."""
    low, high = score.fold_interval(by_fold)
    freedom = by_fold.shape[1] - 1
    return low, high, _two_sided((low + high) / 2, (high - low) / 2 / student.ppf(0.975, freedom), freedom)


def _two_sided(value: Floats, error: Floats, freedom: int) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(value == 0, 1.0, 2 * student.sf(np.abs(value) / error, freedom))


def _holm(p: Floats) -> Floats:
    """Return p-values after Holm's correction; NaN stays NaN and does not count."""
    found = np.full(len(p), np.nan)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known])]
    found[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1.0)
    return found
