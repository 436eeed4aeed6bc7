"""Cross-validate probes on every captured layer, with baselines on the same folds."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from numpy.typing import NDArray
from sklearn.base import BaseEstimator, is_classifier, is_regressor

from analysis.arguments import MOST_SEED
from analysis.dataset.aligned_store import AlignedStore
from analysis.dataset.probe_dataset import ProbeDataset, build_dataset
from analysis.dataset.readable import Readable
from analysis.dataset.store_argument import accept_store_path
from analysis.dataset.targets import DocumentTarget, TokenTarget
from analysis.probes.estimators import LinearProbe, Logistic, Ridge
from analysis.probes.estimators.design import Design
from analysis.probes.evaluation.cross_validation import CrossValidation
from analysis.probes.evaluation.layer_scores import join_repeats
from analysis.probes.options import SweepOptions
from analysis.probes.results import Sweep
from analysis.progress import bar
from flexcache.errors import AnalysisError
from flexcache.spec import listed

Target = str | TokenTarget | DocumentTarget
SHARE = 0.5
"""Share of the machine's memory that the samples of one layer may take before they are read in blocks at each pass."""


@accept_store_path
def sweep(
    store: Readable,
    target: Target,
    site: str,
    probe: BaseEstimator | None = None,
    *,
    options: SweepOptions | None = None,
    **named: Any,
) -> Sweep:
    """Cross-validate a probe on every captured layer of a site.

    ::

        sweep = probes.sweep(store, target="label", site="resid_post", probe=probes.Logistic(Cs=10), cv=5)
        sweep.best          # the best layer, its score and a 95 % interval
        sweep.table()

    Every layer, the probe and each baseline use the same folds. Folds are grouped, so that no group is both trained
    and tested on, and stratified by class. Everything that is learnt from data, including standardisation, is learnt
    inside the fold.

    Four kinds of interval are reported, all 95 %. ``ci_low, ci_high``, the one that is plotted, is over whole groups of
    the pooled out-of-fold predictions: the range of scores that the same probes would get on another sample of groups
    (`score.replicates`). ``band_low, band_high`` covers the scores of all layers at once (`score.band`).
    ``fold_low, fold_high`` is mean ± t over the folds (`score.fold_interval`), and ``repeat_low, repeat_high``, with
    *repeats* of 2 or more, the same over all repeats: the range of scores of probes that were trained on other samples.

    Layer and strength are chosen inside the folds (``select="inner"``): for each test fold, by cross-validation over
    the other folds alone. `Sweep.best` is scored on each test fold with the choice that was made without that fold, so
    it may be quoted. This costs cv·(cv−1)/2 further fits per layer, each used twice: a probe trained without folds *j*
    and *k* validates the choice for either. Linear probes of this package are fitted to all folds and strengths at
    once.

    The samples of one layer are in memory at a time (`ProbeDataset.bytes_per_layer`), plus one prediction for each
    sample and layer. If they need more than *memory*, linear probes read them in blocks, once per pass.

    Parameters
    ----------
    store
        A store as `flexcache.open` returns it, or its path.
    target, site
        See `analysis.probe_dataset.build_dataset`; token targets are made by `analysis.targets`.
    probe
        Any scikit-learn estimator. The default is `Logistic`, or `Ridge` for a regression, with powers of ten to choose
        from. Estimators of other packages receive raw activations in float64: put a `StandardScaler` before them in a
        pipeline. The probe is cloned for every fit and never changed.
    options, named
        A `SweepOptions`, and its fields as keywords, which take precedence: cv, groups, rows, layers, seed, task,
        baselines, metric, repeats, select, resamples, mdl, memory, progress.

    Raises
    ------
    AnalysisError
        The data cannot answer the question (see `build_dataset` and `folds.assign`), a keyword is unknown, the probe
        does not fit the target, or it did not converge, with layer and fold.
    """
    chosen = SweepOptions.merge(options, named, sweep)
    [found] = sweeps(store, [target], [site], None if probe is None else {"probe": probe}, options=chosen).values()
    return found


@accept_store_path
def sweeps(
    store: Readable,
    targets: Target | Sequence[Target],
    sites: str | Sequence[str],
    probes: Mapping[str, BaseEstimator] | None = None,
    *,
    options: SweepOptions | None = None,
    **named: Any,
) -> dict[tuple[str, str, str], Sweep]:
    """Cross-validate several probes for several targets and sites; each set of samples is read once.

    ::

        found = probes.sweeps(store, ["label", "topic"], ["resid_post"], {"ridge": probes.Ridge()})
        found["label", "resid_post", "ridge"].best

    A column of lists of words is a target for each word: `analysis.targets.labels`.

    Parameters
    ----------
    targets, sites
        One or several of each; see `sweep`.
    probes
        Probes by name; the default probe of `sweep` is named ``"probe"``.
    options, named
        As for `sweep`.

    Returns
    -------
    dict of Sweep
        Keys are (target, site, probe).

    Raises
    ------
    AnalysisError
        As for `sweep`.
    """
    chosen = SweepOptions.merge(options, named, sweeps)
    validations: dict[tuple[str, str, str], list[CrossValidation]] = {}
    for site in listed(sites, str, "sites"):
        for target in [targets] if isinstance(targets, str) or not isinstance(targets, Iterable) else targets:
            dataset = build_dataset(
                store, site, target, groups=chosen.groups, rows=chosen.rows, layers=chosen.layers, task=chosen.task
            )
            for name, probe in (probes or {"probe": _default_probe(dataset)}).items():
                check_probe(probe, dataset)
                validations[dataset.target, site, name] = [
                    CrossValidation(dataset, probe, repeat) for repeat in _repeats(chosen)
                ]
    shared: dict[Any, list[CrossValidation]] = {}
    for validation in chain.from_iterable(validations.values()):
        shared.setdefault(_sample_key(validation.dataset), []).append(validation)
    with bar(chosen.progress) as shown:
        for group in shared.values():
            dataset = group[0].dataset
            total = len(dataset.layers) * len(group)
            task = shown.add_task(f"probing {dataset.site}, layer by layer", total=total)
            for at, layer in enumerate(dataset.layers):
                for validation, samples in _layer_samples(group, layer, chosen.memory):
                    validation.fit_layer(at, layer, samples)
                    shown.advance(task)
    return {
        name: join_repeats([validation.summarize() for validation in repeats]) for name, repeats in validations.items()
    }


def sweep_pair(
    store: Readable,
    other: AlignedStore,
    target: Target,
    site: str,
    probe: BaseEstimator | None = None,
    *,
    options: SweepOptions,
) -> tuple[Sweep, Sweep, Sweep]:
    """Cross-validate a probe on two stores of the same rows, and the probes of the first on the second.

    ::

        first, second, across = sweep_pair(base, align_stores(base, tuned), "label", "resid_post", options=options)

    All three have the same samples, labels and folds, those of *store*, so that `compare` takes them. A sample is
    predicted, in either store, by a probe that was fitted without its fold; strengths are chosen in the store of the
    fit.

    Raises
    ------
    AnalysisError
        As for `sweep`; or the numbers of features differ.
    """
    where: dict[str, Any] = {name: getattr(options, name) for name in ("groups", "rows", "layers", "task")}
    made = [build_dataset(one, site, target, **where) for one in (store, other)]
    probe = probe or _default_probe(made[0])
    check_probe(probe, made[0])
    first, second, across = (CrossValidation(dataset, probe, options) for dataset in (*made, made[1]))
    with bar(options.progress) as shown:
        task = shown.add_task(f"probing {site} in both stores", total=len(made[0].layers))
        for at, layer in enumerate(made[0].layers):
            [(_, rows)], [(_, others)] = (list(_layer_samples([one], layer, options.memory)) for one in (first, second))
            first.fit_layer(at, layer, rows, (across, others))
            second.fit_layer(at, layer, others)
            shown.advance(task)
    return first.summarize(), second.summarize(), across.summarize()


def check_probe(probe: BaseEstimator, dataset: ProbeDataset) -> None:
    """Raise AnalysisError if *probe* is not a probe, or cannot be fitted to the target of *dataset*."""
    if isinstance(probe, type) or not (
        hasattr(probe, "fit") and hasattr(probe, "predict") and hasattr(probe, "get_params")
    ):
        raise AnalysisError(
            f"{probe!r} is not a probe",
            expected="a scikit-learn estimator: fit, predict, get_params",
            remedy="write probe=probes.Logistic(), with parentheses",
        )
    wrong = is_classifier(probe) if dataset.task == "regression" else is_regressor(probe)
    if wrong:
        raise AnalysisError(
            f"{type(probe).__name__} cannot be fitted to target {dataset.target!r}",
            expected="a probe for " + ("numbers" if dataset.task == "regression" else "classes"),
            found=f"a {dataset.task} target",
            remedy="use probes.Ridge(), or give task= explicitly",
        )
    if getattr(probe, "pooled", False) != (dataset.rows == "tokens"):
        raise AnalysisError(
            f"{type(probe).__name__} cannot be fitted to rows={dataset.rows!r}",
            expected='rows="tokens" for a probe that reads all tokens of a document, and for no other probe',
        )


def _repeats(options: SweepOptions) -> list[SweepOptions]:
    """Return the options of each cross-validation; those after the first only fit the probe, with other folds."""
    return [options] + [
        replace(options, seed=(options.seed + number) % (MOST_SEED + 1), baselines=(), mdl=False, resamples=2)
        for number in range(1, options.repeats)
    ]


def _default_probe(dataset: ProbeDataset) -> LinearProbe:
    return Logistic(Cs=5) if dataset.classes else Ridge(alphas=6)


def _sample_key(dataset: ProbeDataset) -> Any:
    """Return a key that is equal for datasets with the same samples."""
    numbers = dataset.source if dataset.row is None else dataset.row
    return dataset.site, dataset.layers, dataset.rows, numbers.tobytes()


def _layer_samples(
    group: Sequence[CrossValidation], layer: int | None, memory: int | None
) -> Iterator[tuple[CrossValidation, Design | NDArray[Any]]]:
    """Yield each validation with the samples of a layer: in memory, or read in blocks if they would not fit."""
    dataset = group[0].dataset
    budget = memory or int(SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    unable = next((validation for validation in group if not isinstance(validation.probe, LinearProbe)), None)
    if dataset.row is not None and dataset.bytes_per_layer(linear=unable is None) > budget:
        if unable is not None:
            raise AnalysisError(
                f"{type(unable.probe).__name__} needs all samples in memory",
                where=dataset.site,
                expected=f"at most {budget / 2**30:.1f} GiB",
                found=f"{dataset.n_samples:,} samples need {dataset.bytes_per_layer() / 2**30:.1f} GiB",
                remedy='use a linear probe, which reads blocks; set rows="last"; or raise memory',
            )
        streamed = Design(lambda part: dataset.read_samples(layer, part), (dataset.n_samples, dataset.features))
        yield from ((validation, streamed) for validation in group)
        return
    X = dataset.read_layer(layer, linear=unable is None)
    design = Design(X) if X.dtype != object else None
    for validation in group:
        yield validation, design if design is not None and isinstance(validation.probe, LinearProbe) else X
