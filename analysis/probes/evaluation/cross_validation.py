"""Cross-validate one probe for one target, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import sklearn
import xarray as xr
from numpy.typing import NDArray
from sklearn.base import BaseEstimator

from analysis.dataset.probe_dataset import ProbeDataset
from analysis.probes.estimators import LinearProbe, Logistic, Ridge
from analysis.probes.estimators.design import Design, Floats
from analysis.probes.estimators.linear import LogOdds
from analysis.probes.evaluation import baselines as base
from analysis.probes.evaluation import codelength, crossfit, folds, score
from analysis.probes.evaluation.crossfit import FittedProbes
from analysis.probes.evaluation.layer_scores import LayerScores
from analysis.probes.evaluation.notes import dataset_notes, size_notes
from analysis.probes.evaluation.nulls import NullScores, selectivity
from analysis.probes.evaluation.score import Prediction
from analysis.probes.held_out_predictions import HeldOutPredictions
from analysis.probes.options import SweepOptions
from analysis.probes.results import FORMAT, Sweep
from flexcache.errors import AnalysisError
from flexcache.store.format.model_record import SAMPLE
from flexcache.store.format.provenance import Provenance, recorded_model


class CrossValidation:
    """Cross-validation of one probe: `fit_layer` takes the layers one by one, `summarize` returns the sweep.

    Parameters
    ----------
    dataset
        Samples, target and groups.
    probe
        A scikit-learn estimator, cloned for every fit.
    options
        Folds, baselines and intervals.
    """

    def __init__(self, dataset: ProbeDataset, probe: BaseEstimator, options: SweepOptions) -> None:
        self.dataset, self.probe, self.options = dataset, probe, options
        cv, seed, baselines = options.cv, options.seed, options.baselines
        self.fold = folds.assign(dataset, cv, seed)
        self.notes = dataset_notes(dataset)
        self.strengths = probe.strengths if isinstance(probe, LinearProbe) else np.zeros(1)
        several = len(dataset.layers) * len(self.strengths) > 1
        self.nested = options.select == "inner" and several
        if self.nested and not (
            cv > 2 if dataset.task == "regression" else folds.trainable(dataset.y, self.fold, cv, without=2)
        ):
            self.nested = False
            self.notes.append(
                "The layer was not chosen inside the folds: too few folds, or a class in fewer than three."
            )
        self.targets: dict[str, list[NDArray[Any]]] = {}
        fixed = self._predict_without_model(baselines)
        self._draw_layer_targets(baselines)
        ranked = any(hasattr(probe, name) for name in ("decision_function", "predict_proba"))
        self.metrics = score.metrics(dataset.task, len(dataset.classes), ranked, hasattr(probe, "predict_proba"))
        self.chosen_by = score.selection_metric(self.metrics)
        if options.metric is not None:
            self.chosen_by = find_metric(options.metric, self.metrics, dataset, probe)
            self.metrics = (self.chosen_by, *(metric for metric in self.metrics if metric != self.chosen_by))
        arms = ["probe", *(name for name in baselines if name in fixed or name in self.targets)]
        self.scores = LayerScores(dataset, self.fold, arms, self.metrics, options)
        self.nulls = NullScores(
            tuple(self.targets), self.metrics, self.fold, dataset.group, len(dataset.layers), options.nulls
        )
        for arm, prediction in fixed.items():
            self.scores.add_scores(arm, slice(None), dataset.y, prediction)
        self.notes += size_notes(dataset, self.metrics)
        count = len(dataset.layers)
        self._predictions: list[Prediction] = []
        self._choice = np.full((count, cv), np.nan)
        self._used = np.zeros((count, cv), np.int64)
        self._final = np.zeros(count, np.int64)
        self._weights: list[tuple[Floats, Floats]] = []
        self._sets = [crossfit.without_each(self.fold, cv), *([crossfit.without_pairs(self.fold, cv)] * self.nested)]
        self._prefixes = None
        if options.mdl and isinstance(probe, LogOdds) and dataset.classes:
            self._prefixes = codelength.prefixes(dataset, seed)
            self._bits = np.full(count, np.nan)

    def fit_layer(
        self,
        at: int,
        layer: int | None,
        rows: Design | NDArray[Any],
        applied: tuple[CrossValidation, Design | NDArray[Any]] | None = None,
    ) -> None:
        """Fit and score the layer at index *at*; *rows* are its samples.

        The same probes can be *applied* to other activations of the samples, for another cross-validation to score.
        """
        dataset, cv, where = self.dataset, self.options.cv, f"layer {layer}"
        linear = isinstance(self.probe, LinearProbe)
        sets = np.concatenate([*self._sets, *([np.ones((1, dataset.n_samples), bool)] * linear)])
        fitted = FittedProbes(self.probe, dataset, rows, dataset.y, sets, where)
        tried = [crossfit.outer(fitted, self.fold, cv, np.full(cv, s)) for s in range(len(self.strengths))]
        overall = [self._selection_score(prediction) for prediction in tried]
        self._final[at] = int(np.argmax(np.nan_to_num(overall, nan=-np.inf)))
        self._used[at] = self._final[at]
        if self.nested:
            inside = np.nan_to_num(crossfit.inner(fitted, cv, dataset.y, self.fold, cv, self.chosen_by), nan=-np.inf)
            self._used[at], self._choice[at] = inside.argmax(0), inside.max(0)
        self._score_probe(at, fitted)
        if applied is not None:
            other, others = applied
            other._used[at], other._choice[at], other._final[at] = self._used[at], self._choice[at], self._final[at]
            other._score_probe(at, fitted.apply_to(others))
        strength = fitted.strengths[[self._final[at]]] if linear else None
        for arm, draws in self.targets.items():
            for draw, y in enumerate(draws):
                if arm == "random":
                    projected = _project_randomly(rows, base.draw_seed(self.options.seed + at, draw))
                    plain = _plain_probe(dataset)
                    baseline = FittedProbes(plain, dataset, projected, y, self._sets[0], f"{where}, {arm}")
                else:
                    baseline = FittedProbes(self.probe, dataset, rows, y, self._sets[0], f"{where}, {arm}", strength)
                prediction = crossfit.outer(baseline, self.fold, cv, np.zeros(cv, np.int64))
                if self.options.nulls > 1:
                    self.nulls.add_scores(arm, at, draw, y, prediction)
                if draw == 0:
                    self.scores.add_scores(arm, at, y, prediction)
        if self._prefixes is not None:
            try:
                coder = FittedProbes(self.probe, dataset, rows, dataset.y, self._prefixes.sets, f"{where}, codelength")
                self._bits[at] = self._prefixes.bits(coder)
            except AnalysisError as error:  # the codelength is optional, the score is not
                self.notes.append(f"No codelength of layer {layer}: {error.message}.")

    def _score_probe(self, at: int, fitted: FittedProbes) -> None:
        """Score the predictions of each fold at the strength that was chosen without it, and keep the weights."""
        self._predictions.append(crossfit.outer(fitted, self.fold, self.options.cv, self._used[at]))
        self.scores.add_scores("probe", at, self.dataset.y, self._predictions[-1])
        if fitted.solved is not None:
            self._weights.append(
                (fitted.solved.coef[-1, self._final[at]], fitted.solved.intercept[-1, self._final[at]])
            )

    def summarize(self) -> Sweep:
        """Return the sweep of all fitted layers."""
        dataset, cv, data = self.dataset, self.options.cv, self.scores.to_dataset()
        overall = score.sign(self.chosen_by) * data["pooled"].sel(arm="probe", metric=self.chosen_by).values
        chosen = self._choice.argmax(0) if self.nested else np.full(cv, int(np.nanargmax(overall)))
        tests = [np.flatnonzero(self.fold == number) for number in range(cv)]
        prediction = crossfit.gather_predictions(
            ((test, self._predictions[at].select_samples(test)) for at, test in zip(chosen, tests, strict=True)),
            dataset.n_samples,
        )
        data = data.merge(self.scores.nested_scores(prediction, chosen))
        if len(self.strengths) > 1:
            data["strength"] = (("layer", "fold"), self.strengths[self._used])
            data["final_strength"] = ("layer", self.strengths[self._final])
        if self.options.nulls > 1 and self.targets:
            data = self.nulls.to_dataset(data)
        if "control" in self.targets:
            data = selectivity(data)
        if self._prefixes is not None:
            data["codelength"] = ("layer", self._bits)
            data["compression"] = ("layer", self._prefixes.uniform / self._bits)
        if dataset.classes:
            data = data.merge(self._confusion(prediction))
        data.attrs = self._attrs()
        coef, intercept = zip(*self._weights) if self._weights else ((), ())
        held_out = HeldOutPredictions.of_layers(dataset, self.fold, self._predictions)
        return Sweep(data, np.stack(coef) if coef else None, np.stack(intercept) if intercept else None, held_out)

    def _selection_score(self, prediction: Prediction) -> float:
        value = score.pooled(self.chosen_by, self.dataset.y, prediction, self.fold, self.dataset.group)
        return score.sign(self.chosen_by) * value

    def _predict_without_model(self, baselines: Sequence[str]) -> dict[str, Prediction]:
        made: dict[str, Callable[[ProbeDataset, NDArray[np.int64], int], Prediction]] = {
            "majority": base.majority,
            "tfidf": base.tfidf,
            "tokens": base.tokens,
            "length": base.length,
        }
        found = {}
        for name in baselines:
            if name in made and not (name == "tfidf" and self.dataset.texts is None):
                try:
                    found[name] = made[name](self.dataset, self.fold, self.options.cv)
                except AnalysisError as error:  # a failing baseline does not end the sweep
                    self.notes.append(f"No baseline of {name}: {error.message}.")
            elif name == "tfidf":
                self.notes.append("No TF-IDF baseline: the store kept no texts.")
        return found

    def _draw_layer_targets(self, baselines: Sequence[str]) -> None:
        dataset, options = self.dataset, self.options
        seeds = [base.draw_seed(options.seed, draw) for draw in range(options.nulls)]
        if "shuffled" in baselines:
            self.targets["shuffled"] = [base.shuffle(dataset, self.fold, options.cv, seed) for seed in seeds]
        if "random" in baselines and dataset.rows != "tokens":
            self.targets["random"] = [dataset.y] * len(seeds)
        if "control" in baselines and dataset.classes:
            try:
                self.targets["control"] = [base.control(dataset, self.fold, options.cv, seed) for seed in seeds]
            except AnalysisError as error:
                self.notes.append(f"No control task: {error.message}.")

    def _confusion(self, prediction: Prediction) -> xr.Dataset:
        """Return the confusion matrix of the nested predictions, and their accuracy in bins of confidence."""
        dataset, count = self.dataset, len(self.dataset.classes)
        table = np.zeros((count, count), np.int64)
        np.add.at(table, (dataset.y, prediction.predicted.astype(np.int64)), 1)
        names = [str(name) for name in dataset.classes]
        found = xr.Dataset(
            {"confusion": (("truth", "said"), table)},
            {"truth": np.array(names, object), "said": np.array(names, object)},
        )
        if prediction.probability is not None:
            sure = prediction.probability.max(1)
            place = np.minimum((sure * score.BINS).astype(np.int64), score.BINS - 1)
            size = np.bincount(place, minlength=score.BINS)
            with np.errstate(invalid="ignore"):
                found["confidence"] = ("bin", np.bincount(place, sure, score.BINS) / size)
                right = (prediction.probability.argmax(1) == dataset.y).astype(float)
                found["accuracy_in_bin"] = ("bin", np.bincount(place, right, score.BINS) / size)
            found["samples_in_bin"] = ("bin", size)
        return found

    def _attrs(self) -> dict[str, Any]:
        dataset = self.dataset
        with sklearn.config_context(print_changed_only=False):
            shown = " ".join(repr(self.probe).split())
        record = recorded_model(dataset.store)
        return {
            "format": FORMAT,
            "site": dataset.site,
            "target": dataset.target,
            "task": dataset.task,
            "task_reason": dataset.task_reason,
            "classes": list(dataset.classes),
            "class_samples": np.bincount(dataset.y).tolist() if dataset.classes else [],
            "rows": dataset.rows,
            "groups": dataset.groups,
            "documents": dataset.n_documents,
            "samples": dataset.n_samples,
            "groups_found": dataset.n_groups,
            "dropped": dict(dataset.dropped),
            **({"labels": dict(dataset.labels)} if dataset.labels else {}),
            "probe": shown,
            "cv": self.options.cv,
            "splitter": type(folds.splitter(dataset, self.options.cv, self.options.seed)).__name__,
            "seed": self.options.seed,
            "resamples": self.options.resamples,
            "nulls": self.options.nulls,
            "repeats": self.options.repeats,
            "metric": self.options.metric,
            "selection_metric": self.chosen_by,
            "layer_chosen": self._how_chosen(),
            "bytes_per_layer": dataset.bytes_per_layer(),
            "model": getattr(dataset.store, "provenance", Provenance()).model_name,
            "weights": str(record.get(SAMPLE) or ""),
            "model_record": record,
            "notes": self.notes,
            "versions": {"scikit-learn": sklearn.__version__, "numpy": np.__version__},
        }

    def _how_chosen(self) -> str:
        if self.nested:
            return "inside the folds"
        return "on these scores" if len(self.dataset.layers) * len(self.strengths) > 1 else "given"


def find_metric(
    name: str, metrics: Sequence[score.Metric], dataset: ProbeDataset, probe: BaseEstimator
) -> score.Metric:
    """Return the metric called *name*, or raise AnalysisError if it is not measured for this target and probe."""
    found = next((metric for metric in metrics if metric == name), None)
    if found is None:
        raise AnalysisError(
            f"{name!r} is not measured",
            where=f"target {dataset.target!r}, {type(probe).__name__}",
            expected=f"one of {', '.join(metric for metric in metrics if not metric.startswith('ece'))}",
            remedy="use another metric, or a probe with probabilities: probes.Logistic or probes.LDA",
        )
    return found


def _project_randomly(rows: Design | NDArray[Any], seed: int | list[int]) -> Design:
    """Return the samples projected onto one random direction, each feature scaled by its standard deviation."""
    design = rows if isinstance(rows, Design) else Design(rows)
    drawn = np.random.default_rng(seed).standard_normal((design.shape[1], 1))
    return Design(design.product(drawn))


def _plain_probe(dataset: ProbeDataset) -> LinearProbe:
    return Logistic(1.0) if dataset.classes else Ridge(1.0)
