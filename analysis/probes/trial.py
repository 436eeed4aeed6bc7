"""One probe for one target: what is asked of each layer as it is read, and the sweep that comes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import sklearn
import xarray as xr
from numpy.typing import NDArray
from sklearn.base import BaseEstimator

from analysis.dataset.view import View
from analysis.probes import baselines as base
from analysis.probes import codelength, crossfit, folds, score
from analysis.probes.crossfit import Fitted
from analysis.probes.estimators import LinearProbe, Logistic, Ridge
from analysis.probes.estimators.design import Design, Floats
from analysis.probes.estimators.linear import LogOdds
from analysis.probes.results import FORMAT, Sweep
from analysis.probes.score import Prediction
from analysis.probes.scoreboard import Scoreboard
from flexcache.errors import AnalysisError
from flexcache.identity.record import SAMPLE
from flexcache.store.read.recorded_model import recorded_model

FEW = 10
"""Groups of a class below which its scores are said to be of little weight."""


class Trial:
    """A probe, a view, and what was found so far; `read` takes the layers one by one, `sweep` sums up.

    Parameters are those of `analysis.probes.sweep`.
    """

    def __init__(
        self,
        view: View,
        probe: BaseEstimator,
        *,
        cv: int,
        seed: int,
        baselines: Sequence[str],
        select: Literal["inner", "none"],
        resamples: int,
        mdl: bool,
    ) -> None:
        self.view, self.probe, self.cv, self.seed, self.resamples = view, probe, cv, seed, resamples
        self.fold = folds.assign(view, cv, seed)
        self.notes = notes(view)
        self.strengths = probe.strengths if isinstance(probe, LinearProbe) else np.zeros(1)
        several = len(view.layers) * len(self.strengths) > 1
        self.nested = select == "inner" and several
        if self.nested and not (
            cv > 2 if view.task == "regression" else folds.trainable(view.y, self.fold, cv, without=2)
        ):
            self.nested = False
            self.notes.append(
                "The layer was not chosen inside the folds: too few folds, or a class in fewer than three."
            )
        self.targets: dict[str, NDArray[Any]] = {}
        fixed = self._without_model(baselines)
        self._of_layers(baselines)
        ranked = any(hasattr(probe, name) for name in ("decision_function", "predict_proba"))
        self.metrics = score.metrics(view.task, len(view.classes), ranked, hasattr(probe, "predict_proba"))
        arms = ["probe", *(name for name in baselines if name in fixed or name in self.targets)]
        self.board = Scoreboard(view, self.fold, cv, arms, self.metrics, resamples, seed)
        for arm, said in fixed.items():
            self.board.add(arm, slice(None), view.y, said)
        count = len(view.layers)
        self._kept: list[Prediction] = []
        self._choice = np.full((count, cv), np.nan)
        self._used = np.zeros((count, cv), np.int64)
        self._final = np.zeros(count, np.int64)
        self._weights: list[tuple[Floats, Floats]] = []
        self._sets = [crossfit.without_each(self.fold, cv), *([crossfit.without_pairs(self.fold, cv)] * self.nested)]
        self._prefixes = None
        if mdl and isinstance(probe, LogOdds) and view.classes:
            self._prefixes = codelength.prefixes(view, seed)
            self._bits = np.full(count, np.nan)

    def read(self, at: int, layer: int | None, rows: Design | NDArray[Any]) -> None:
        """Fit the layer at place *at*, whose samples are *rows*."""
        view, where = self.view, f"layer {layer}"
        linear = isinstance(self.probe, LinearProbe)
        sets = np.concatenate([*self._sets, *([np.ones((1, view.n_samples), bool)] * linear)])
        fitted = Fitted(self.probe, view, rows, view.y, sets, where)
        tried = [crossfit.outer(fitted, self.fold, self.cv, np.full(self.cv, s)) for s in range(len(self.strengths))]
        overall = [self._first(said) for said in tried]
        self._final[at] = int(np.argmax(overall))
        self._used[at] = self._final[at]
        if self.nested:
            inside = crossfit.inner(fitted, self.cv, view.y, self.fold, self.cv, self.metrics[0])
            self._used[at], self._choice[at] = inside.argmax(0), inside.max(0)
        self._kept.append(crossfit.outer(fitted, self.fold, self.cv, self._used[at]))
        self.board.add("probe", at, view.y, self._kept[-1])
        if fitted.solved is not None:
            self._weights.append(
                (fitted.solved.coef[-1, self._final[at]], fitted.solved.intercept[-1, self._final[at]])
            )
        strength = fitted.strengths[[self._final[at]]] if linear else None
        for arm, y in self.targets.items():
            if arm == "random":
                known = Fitted(_plain(view), view, _line(rows, self.seed + at), y, self._sets[0], f"{where}, {arm}")
            else:
                known = Fitted(self.probe, view, rows, y, self._sets[0], f"{where}, {arm}", strength)
            self.board.add(arm, at, y, crossfit.outer(known, self.fold, self.cv, np.zeros(self.cv, np.int64)))
        if self._prefixes is not None:
            try:
                told = Fitted(self.probe, view, rows, view.y, self._prefixes.sets, f"{where}, codelength", strength)
                self._bits[at] = self._prefixes.bits(told)
            except AnalysisError as error:  # what is beside the score should not cost it
                self.notes.append(f"No codelength of layer {layer}: {error.message}.")

    def sweep(self) -> Sweep:
        """Return what all layers gave."""
        view, data = self.view, self.board.dataset()
        first = data["pooled"].values[0, :, 0]
        chosen = self._choice.argmax(0) if self.nested else np.full(self.cv, int(np.nanargmax(first)))
        tests = [np.flatnonzero(self.fold == number) for number in range(self.cv)]
        said = crossfit.gathered(
            ((test, self._kept[at].take(test)) for at, test in zip(chosen, tests, strict=True)), view.n_samples
        )
        data = data.merge(self.board.nested(said, chosen))
        if len(self.strengths) > 1:
            data["strength"] = (("layer", "fold"), self.strengths[self._used])
            data["final_strength"] = ("layer", self.strengths[self._final])
        if "control" in self.targets:
            arms = (data["pooled"].isel(metric=0).sel(arm=arm).values for arm in ("probe", "control"))
            data["selectivity"] = ("layer", np.subtract(*arms))
        if self._prefixes is not None:
            data["codelength"] = ("layer", self._bits)
            data["compression"] = ("layer", self._prefixes.uniform / self._bits)
        if view.classes:
            data = data.merge(self._confusion(said))
        data.attrs = self._attrs()
        coef, intercept = zip(*self._weights) if self._weights else ((), ())
        return Sweep(data, np.stack(coef) if coef else None, np.stack(intercept) if intercept else None)

    def _first(self, said: Prediction) -> float:
        top, bottom = score.parts(self.metrics[0], self.view.y, said, self.fold, self.cv)
        return float(score.ratio(top.sum(), bottom.sum()))

    def _without_model(self, baselines: Sequence[str]) -> dict[str, Prediction]:
        made: dict[str, Callable[[View, NDArray[np.int64], int], Prediction]] = {
            "majority": base.majority,
            "tfidf": base.tfidf,
            "tokens": base.tokens,
            "length": base.length,
        }
        found = {}
        for name in baselines:
            if name in made and not (name == "tfidf" and self.view.texts is None):
                try:
                    found[name] = made[name](self.view, self.fold, self.cv)
                except AnalysisError as error:  # a baseline that fails should not cost the answer
                    self.notes.append(f"No baseline of {name}: {error.message}.")
            elif name == "tfidf":
                self.notes.append("No TF-IDF baseline: the store kept no texts.")
        return found

    def _of_layers(self, baselines: Sequence[str]) -> None:
        view = self.view
        if "shuffled" in baselines:
            self.targets["shuffled"] = base.shuffle(view, self.fold, self.cv, self.seed)
        if "random" in baselines and view.rows != "tokens":
            self.targets["random"] = view.y
        if "control" in baselines and view.classes:
            try:
                self.targets["control"] = base.control(view, self.fold, self.cv, self.seed)
            except AnalysisError as error:
                self.notes.append(f"No control task: {error.message}.")

    def _confusion(self, said: Prediction) -> xr.Dataset:
        """Return the counts of the nested predictions, and how often the likeliest class is right, by confidence."""
        view, count = self.view, len(self.view.classes)
        table = np.zeros((count, count), np.int64)
        np.add.at(table, (view.y, said.predicted.astype(np.int64)), 1)
        names = [str(name) for name in view.classes]
        found = xr.Dataset(
            {"confusion": (("truth", "said"), table)},
            {"truth": np.array(names, object), "said": np.array(names, object)},
        )
        if said.probability is not None:
            sure = said.probability.max(1)
            place = np.minimum((sure * score.BINS).astype(np.int64), score.BINS - 1)
            size = np.bincount(place, minlength=score.BINS)
            with np.errstate(invalid="ignore"):
                found["confidence"] = ("bin", np.bincount(place, sure, score.BINS) / size)
                right = (said.probability.argmax(1) == view.y).astype(float)
                found["accuracy_in_bin"] = ("bin", np.bincount(place, right, score.BINS) / size)
            found["samples_in_bin"] = ("bin", size)
        return found

    def _attrs(self) -> dict[str, Any]:
        view = self.view
        with sklearn.config_context(print_changed_only=False):
            shown = " ".join(repr(self.probe).split())
        provenance: Any = getattr(view.store, "provenance", {})
        record = recorded_model(view.store)
        return {
            "format": FORMAT,
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
            "cv": self.cv,
            "splitter": type(folds.splitter(view, self.cv, self.seed)).__name__,
            "seed": self.seed,
            "resamples": self.resamples,
            "layer_chosen": self._how_chosen(),
            "bytes_per_layer": view.bytes_per_layer(),
            "model": str(provenance.get("model", {}).get("name", "")),
            "weights": str(record.get(SAMPLE) or ""),
            "model_record": record,
            "notes": self.notes,
            "versions": {"scikit-learn": sklearn.__version__, "numpy": np.__version__},
        }

    def _how_chosen(self) -> str:
        if self.nested:
            return "inside the folds"
        return "on these scores" if len(self.view.layers) * len(self.strengths) > 1 else "given"


def notes(view: View) -> list[str]:
    """Return what should be known before the scores are believed."""
    found = []
    if view.groups is None and view.n_documents < view.n_samples:
        found.append(
            "Rows of one document are in training and test folds alike: the scores may measure how well a "
            "document is recognised, not the target."
        )
    if view.n_samples <= view.features:
        found.append(
            f"{view.n_samples} samples of {view.features} features: any labels can be fitted, so the strength of the "
            "penalty decides."
        )
    if view.classes:
        pairs = np.unique(np.stack([view.y, view.group]), axis=1)
        small = [str(view.classes[c]) for c, size in enumerate(np.bincount(pairs[0])) if size < FEW]
        if small:
            found.append(f"Classes in fewer than {FEW} groups: {', '.join(small[:5])}.")
    if view.texts is not None:
        owner: dict[str, int] = {}
        documents, first = np.unique(view.document, return_index=True)
        shared = sum(
            owner.setdefault(view.texts[document], int(view.group[at])) != view.group[at]
            for document, at in zip(documents, first)
        )
        if shared:
            found.append(f"{shared} documents have the very text of one in another group, perhaps across folds.")
    return found


def _line(rows: Design | NDArray[Any], seed: int) -> Design:
    """Return the samples along one random direction, in units of each feature's deviation."""
    design = rows if isinstance(rows, Design) else Design(rows)
    drawn = np.random.default_rng(seed).standard_normal((design.shape[1], 1))
    return Design(design.product(drawn))


def _plain(view: View) -> LinearProbe:
    return Logistic(1.0) if view.classes else Ridge(1.0)
