"""One probe on every captured layer, beside baselines, on the same folds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import sklearn
from sklearn.base import BaseEstimator, is_classifier, is_regressor

from analysis.probes import baselines as base
from analysis.probes import crossfit, folds, score
from analysis.probes.estimators import Logistic
from analysis.probes.results import Sweep
from analysis.probes.scoreboard import Scoreboard
from analysis.progress import bar
from analysis.view import Readable, Rows, Task, View, join
from flexcache.errors import AnalysisError, nearest
from flexcache.site import Layers

Prediction = base.Prediction


def sweep(
    store: Readable,
    target: str,
    site: str,
    probe: BaseEstimator | None = None,
    *,
    cv: int = 5,
    groups: str | None = "document",
    rows: Rows | None = None,
    layers: Layers = "all",
    seed: int = 0,
    task: Task | None = None,
    baselines: Sequence[str] = base.NAMES,
    select: Literal["inner", "none"] = "inner",
    resamples: int = 1000,
    progress: bool = True,
) -> Sweep:
    """Cross-validate a probe on every captured layer of a site.

    Every layer, the probe and each baseline see the same folds: grouped, so that no group is both trained and
    tested on, and stratified by class. Whatever is learnt from data, standardisation included, is learnt
    inside the fold.

    Two kinds of interval are reported, both 95 %. ``fold_low, fold_high`` is mean ± t over the folds (see
    `score.fold_interval`). ``ci_low, ci_high``, the one that is plotted, is a bootstrap over whole groups of
    the pooled out-of-fold predictions: what another draw of *documents* would give the same probes.

    The layer is chosen inside the folds (``select="inner"``): for each test fold, by cross-validation over
    the other folds alone. `Sweep.best` is scored on the test fold by the layer chosen without it, so it may
    be quoted. This costs cv·(cv−1)/2 further fits a layer, each used twice: a probe trained without folds
    *j* and *k* validates the choice for either.

    One layer's rows are in memory at a time (`View.bytes_per_layer`), plus one prediction per sample and
    layer.

    Parameters
    ----------
    store
        What `flexcache.open` returned.
    target, site, groups, rows, layers, task
        See `analysis.view.join`.
    probe
        Any scikit-learn estimator, by default `Logistic`. Yours is given raw activations in float64: put a
        `StandardScaler` before it in a pipeline. It is cloned for every fit, never changed.
    cv
        Number of folds.
    seed
        Of folds, shuffles and bootstrap.
    baselines
        ``"majority"``: the commonest training class (or mean). ``"shuffled"``: the same probe, fitted and
        scored on labels moved to other documents, one shuffle, on every layer. ``"tfidf"``: words and pairs
        of words, where texts are stored.
    select
        ``"none"`` leaves out the inner choice; `Sweep.best` then says that it was chosen on its own scores.
    resamples
        Bootstrap resamples.
    progress
        Show a bar while standard error is a terminal.

    Raises
    ------
    AnalysisError
        A question that the data cannot answer (see `join` and `folds.assign`), a probe that does not fit the
        target, or one that did not converge, with its layer and fold.
    """
    probe = Logistic() if probe is None else probe
    for name in baselines:
        if name not in base.NAMES:
            raise AnalysisError(f"there is no baseline {name!r}", remedy=nearest(name, base.NAMES))
    if select not in ("inner", "none"):
        raise AnalysisError(f"select cannot be {select!r}", remedy=nearest(str(select), ("inner", "none")))
    view = join(store, site, target, groups=groups, rows=rows, layers=layers, task=task)
    _check_probe(probe, view)
    fold = folds.assign(view, cv, seed)
    notes = _notes(view)
    metrics: tuple[score.Metric, ...] = ("r2",) if view.task == "regression" else ("accuracy",)
    if len(view.classes) == 2 and any(hasattr(probe, name) for name in ("decision_function", "predict_proba")):
        metrics += ("auroc",)
    inner = select == "inner" and len(view.layers) > 1
    if inner and not (cv > 2 if view.task == "regression" else folds.trainable(view.y, fold, cv, without=2)):
        inner = False
        notes.append("The layer was not chosen inside the folds: too few folds, or a class in fewer than three.")

    fixed = {"majority": base.majority(view, fold, cv)} if "majority" in baselines else {}
    if "tfidf" in baselines:
        if view.texts is None:
            notes.append("No TF-IDF baseline: the store kept no texts.")
        else:
            try:
                fixed["tfidf"] = base.tfidf(view, fold, cv)
            except AnalysisError as error:  # a baseline that fails should not cost the answer
                notes.append(f"No TF-IDF baseline: {error.message}.")
    moved = base.shuffle(view, fold, cv, seed) if "shuffled" in baselines else None
    arms = ["probe", *(name for name in baselines if name in fixed or name == "shuffled")]

    board = Scoreboard(view, fold, cv, arms, metrics, resamples, seed)
    for arm, prediction in fixed.items():
        board.add(arm, slice(None), view.y, prediction)
    kept: list[Prediction] = []
    choice = np.full((len(view.layers), cv), np.nan)
    with BLAS.limit(limits=1, user_api="blas"):  # many small fits: threads would wait for each other
        for at, layer in enumerate(_shown(view.layers, site, progress)):
            X = view.read(layer)
            kept.append(crossfit.outer(probe, view, X, view.y, fold, cv, layer))
            board.add("probe", at, view.y, kept[-1])
            if moved is not None:
                board.add("shuffled", at, moved, crossfit.outer(probe, view, X, moved, fold, cv, layer))
            if inner:
                choice[at] = crossfit.inner(probe, view, X, fold, cv, metrics[0], layer)

    data = board.dataset()
    chosen = choice.argmax(0) if inner else np.full(cv, int(data["pooled"].values[0, :, 0].argmax()))
    predicted, decision = (
        np.stack([kept[at][part] for at in chosen])[fold, np.arange(view.n_samples)] for part in (0, 1)
    )
    data = data.merge(board.nested((predicted, decision), chosen))
    data.attrs = _attrs(view, probe, cv, seed, resamples, inner, notes)
    return Sweep(data)


def _check_probe(probe: BaseEstimator, view: View) -> None:
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


def _notes(view: View) -> list[str]:
    notes = []
    if view.groups is None and view.rows == "all":
        notes.append(
            "Rows of one document are in training and test folds alike: the scores may measure how well a "
            "document is recognised, not the target."
        )
    if view.texts is not None:
        owner: dict[str, int] = {}
        first = np.unique(view.document, return_index=True)[1]
        shared = sum(owner.setdefault(text, int(g)) != g for text, g in zip(view.texts, view.group[first]))
        if shared:
            notes.append(f"{shared} documents have the very text of one in another group, perhaps across folds.")
    return notes


def _attrs(
    view: View, probe: BaseEstimator, cv: int, seed: int, resamples: int, inner: bool, notes: list[str]
) -> dict[str, Any]:
    with sklearn.config_context(print_changed_only=False):
        shown = " ".join(repr(probe).split())
    return {
        "format": "flexcache probe sweep 1",
        "site": view.site,
        "target": view.target,
        "task": view.task,
        "classes": list(view.classes),
        "class_samples": np.bincount(view.y).tolist() if view.classes else [],
        "rows": view.rows,
        "groups": view.groups,
        "documents": view.n_documents,
        "samples": view.n_samples,
        "groups_found": view.n_groups,
        "dropped": dict(view.dropped),
        "probe": shown,
        "cv": cv,
        "splitter": type(folds.splitter(view, cv, seed)).__name__,
        "seed": seed,
        "resamples": resamples,
        "layer_chosen": "inside the folds" if inner else "on these scores" if len(view.layers) > 1 else "given",
        "bytes_per_layer": view.bytes_per_layer(),
        "notes": notes,
        "versions": {"scikit-learn": sklearn.__version__, "numpy": np.__version__},
    }


def _shown(layers: tuple[int | None, ...], site: str, progress: bool) -> Iterable[int | None]:
    with bar(progress) as shown:
        yield from shown.track(layers, description=f"probing {site}, layer by layer")
