"""Probes on every captured layer, beside baselines, on the same folds."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from numpy.typing import NDArray
from sklearn.base import BaseEstimator, is_classifier, is_regressor

from analysis.arguments import check_whole
from analysis.dataset.opens_store import opens_store
from analysis.dataset.targets import DocumentTarget, TokenTarget
from analysis.dataset.view import Readable, Rows, Task, View, join
from analysis.probes import baselines as base
from analysis.probes.estimators import LinearProbe, Logistic, Ridge
from analysis.probes.estimators.design import Design
from analysis.probes.results import Sweep
from analysis.probes.trial import Trial
from analysis.progress import bar
from flexcache.errors import AnalysisError, nearest
from flexcache.site import Layers
from flexcache.spec import listed

Target = str | TokenTarget | DocumentTarget
SHARE = 0.5
"""Of the machine's memory: how much one layer's samples may take before they are read in blocks at each pass."""


@opens_store
def sweep(
    store: Readable,
    target: Target,
    site: str,
    probe: BaseEstimator | None = None,
    *,
    cv: int = 5,
    groups: str | None = "document",
    rows: Rows | None = None,
    layers: Layers = "all",
    seed: int = 0,
    task: Task | None = None,
    baselines: str | Sequence[str] = base.NAMES,
    select: Literal["inner", "none"] = "inner",
    resamples: int = 1000,
    mdl: bool = True,
    memory: int | None = None,
    progress: bool = True,
) -> Sweep:
    """Cross-validate a probe on every captured layer of a site.

    Every layer, the probe and each baseline see the same folds: grouped, so that no group is both trained and
    tested on, and stratified by class. Whatever is learnt from data, standardisation included, is learnt
    inside the fold.

    Three kinds of interval are reported, all 95 %. ``fold_low, fold_high`` is mean ± t over the folds (see
    `score.fold_interval`). ``ci_low, ci_high``, the one that is plotted, is a bootstrap over whole groups of
    the pooled out-of-fold predictions: what another draw of *documents* would give the same probes. ``band_low,
    band_high`` holds the scores of all layers at once (`score.band`).

    Layer and strength are chosen inside the folds (``select="inner"``): for each test fold, by cross-validation over
    the other folds alone. `Sweep.best` is scored on the test fold by what was chosen without it, so it may
    be quoted. This costs cv·(cv−1)/2 further fits a layer, each used twice: a probe trained without folds
    *j* and *k* validates the choice for either. Linear probes of this package are fitted to all folds and
    strengths side by side.

    One layer's samples are in memory at a time (`View.bytes_per_layer`), plus one prediction per sample and
    layer. Where that is more than *memory*, linear probes read them in blocks, as often as they need.

    Parameters
    ----------
    store
        What `flexcache.open` returned.
    target, site, groups, rows, layers, task
        See `analysis.view.join`; a target of tokens is made by `analysis.targets`.
    probe
        Any scikit-learn estimator, by default `Logistic`, or `Ridge` for numbers, with powers of ten to choose from.
        Yours is given raw activations in float64: put a `StandardScaler` before it in a pipeline. It is cloned for
        every fit, never changed.
    cv
        Number of folds.
    seed
        Of folds, shuffles and bootstrap.
    baselines
        ``"majority"``: the commonest training class (or mean). ``"tfidf"``: words and pairs of words, where texts are
        stored. ``"tokens"``: the bag of token ids. ``"length"``: the number of tokens. And on every layer:
        ``"shuffled"``: the same probe, fitted and scored on labels moved to other documents, one shuffle;
        ``"random"``: a probe of one random direction; ``"control"``: the same probe, on labels drawn for each kind of
        token, whence ``selectivity`` (Hewitt & Liang 2019).
    select
        ``"none"`` leaves out the inner choice; `Sweep.best` then says that it was chosen on its own scores.
    resamples
        Bootstrap resamples.
    mdl
        Whether probes that give probabilities are measured by online coding as well: ``codelength`` in bits and
        ``compression``, how many times shorter than an even code (Voita & Titov 2020).
    memory
        Bytes for the samples of one layer; by default half of the machine's.
    progress
        Show a bar while standard error is a terminal.

    Raises
    ------
    AnalysisError
        A question that the data cannot answer (see `join` and `folds.assign`), a probe that does not fit the
        target, or one that did not converge, with its layer and fold.
    """
    found = sweeps(
        store,
        [target],
        [site],
        None if probe is None else {"probe": probe},
        cv=cv,
        groups=groups,
        rows=rows,
        layers=layers,
        seed=seed,
        task=task,
        baselines=baselines,
        select=select,
        resamples=resamples,
        mdl=mdl,
        memory=memory,
        progress=progress,
    )
    return next(iter(found.values()))


@opens_store
def sweeps(
    store: Readable,
    targets: Target | Sequence[Target],
    sites: str | Sequence[str],
    probes: Mapping[str, BaseEstimator] | None = None,
    *,
    cv: int = 5,
    groups: str | None = "document",
    rows: Rows | None = None,
    layers: Layers = "all",
    seed: int = 0,
    task: Task | None = None,
    baselines: str | Sequence[str] = base.NAMES,
    select: Literal["inner", "none"] = "inner",
    resamples: int = 1000,
    mdl: bool = True,
    memory: int | None = None,
    progress: bool = True,
) -> dict[tuple[str, str, str], Sweep]:
    """Cross-validate several probes for several targets and sites; what needs the same samples shares their reading.

    Several labels a document, a column of lists of words, are a target for each word: `analysis.targets.labels`.

    Parameters
    ----------
    probes
        By name.

    Others are those of `sweep`.

    Returns
    -------
    dict of Sweep
        By (target, site, probe).
    """
    if baselines is None:
        raise AnalysisError(
            "baselines cannot be None", expected=f"some of {', '.join(base.NAMES)}", remedy="baselines=()"
        )
    baselines = listed(baselines, str, "baselines")
    check_whole("resamples", resamples, 1)
    if memory is not None:
        check_whole("memory, in bytes,", memory, 1, remedy="for 1 GiB, write memory=2**30")
    for name in baselines:
        if name not in base.NAMES:
            raise AnalysisError(f"there is no baseline {name!r}", remedy=nearest(name, base.NAMES))
    if select not in ("inner", "none"):
        raise AnalysisError(f"select cannot be {select!r}", remedy=nearest(str(select), ("inner", "none")))
    trials: dict[tuple[str, str, str], Trial] = {}
    for site in listed(sites, str, "sites"):
        for target in [targets] if isinstance(targets, str) or not isinstance(targets, Iterable) else targets:
            view = join(store, site, target, groups=groups, rows=rows, layers=layers, task=task)
            for name, probe in (probes or {"probe": _usual(view)}).items():
                check_probe(probe, view)
                trials[view.target, site, name] = Trial(
                    view,
                    probe,
                    cv=cv,
                    seed=seed,
                    baselines=baselines,
                    select=select,
                    resamples=resamples,
                    mdl=mdl,
                )
    shared: dict[Any, list[Trial]] = {}
    for trial in trials.values():
        shared.setdefault(_samples(trial.view), []).append(trial)
    with bar(progress) as shown:
        for group in shared.values():
            view = group[0].view
            task_of = shown.add_task(f"probing {view.site}, layer by layer", total=len(view.layers) * len(group))
            for at, layer in enumerate(view.layers):
                for trial, given in _given(group, layer, memory):
                    trial.read(at, layer, given)
                    shown.advance(task_of)
    return {name: trial.sweep() for name, trial in trials.items()}


def check_probe(probe: BaseEstimator, view: View) -> None:
    """Refuse what is no probe, or not one for the view's target.

    Raises
    ------
    AnalysisError
    """
    if isinstance(probe, type) or not (
        hasattr(probe, "fit") and hasattr(probe, "predict") and hasattr(probe, "get_params")
    ):
        raise AnalysisError(
            f"{probe!r} is not a probe",
            expected="a scikit-learn estimator: fit, predict, get_params",
            remedy="write probe=probes.Logistic(), with its brackets",
        )
    wrong = is_classifier(probe) if view.task == "regression" else is_regressor(probe)
    if wrong:
        raise AnalysisError(
            f"{type(probe).__name__} cannot be fitted to target {view.target!r}",
            expected="a probe for " + ("numbers" if view.task == "regression" else "classes"),
            found=f"a {view.task} target",
            remedy="use probes.Ridge(), or say task= in so many words",
        )
    if getattr(probe, "pooled", False) != (view.rows == "tokens"):
        raise AnalysisError(
            f"{type(probe).__name__} cannot be fitted to rows={view.rows!r}",
            expected='rows="tokens" for a probe that reads a document\'s tokens together, and for no other',
        )


def _usual(view: View) -> LinearProbe:
    return Logistic(Cs=5) if view.classes else Ridge(alphas=6)


def _samples(view: View) -> Any:
    """Return what tells samples apart from those of another view."""
    numbers = view.source if view.row is None else view.row
    return view.site, view.layers, view.rows, numbers.tobytes()


def _given(
    group: Sequence[Trial], layer: int | None, memory: int | None
) -> Iterator[tuple[Trial, Design | NDArray[Any]]]:
    """Yield each trial with the samples of a layer: in memory, or, where they would not fit, to be read in blocks."""
    view = group[0].view
    budget = memory or int(SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if view.row is not None and view.bytes_per_layer() > budget:
        stubborn = next((trial for trial in group if not isinstance(trial.probe, LinearProbe)), None)
        if stubborn is not None:
            raise AnalysisError(
                f"{type(stubborn.probe).__name__} needs all samples in memory",
                where=view.site,
                expected=f"at most {budget / 2**30:.1f} GiB",
                found=f"{view.n_samples:,} samples need {view.bytes_per_layer() / 2**30:.1f} GiB",
                remedy='use a linear probe, which reads blocks; write rows="last"; or give more memory',
            )
        streamed = Design(lambda part: view.read_some(layer, part), (view.n_samples, view.features))
        yield from ((trial, streamed) for trial in group)
        return
    X = view.read(layer)
    design = Design(X) if X.dtype != object else None
    for trial in group:
        yield trial, design if design is not None and isinstance(trial.probe, LinearProbe) else X
