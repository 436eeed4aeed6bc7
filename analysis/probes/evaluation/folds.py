"""Assign samples to test folds, equally for every layer, probe and baseline."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import BaseCrossValidator, GroupKFold, StratifiedGroupKFold, StratifiedKFold

from analysis.arguments import MOST_SEED, check_whole
from analysis.dataset.probe_dataset import ProbeDataset
from flexcache.errors import AnalysisError
from flexcache.spec import is_whole


def splitter(dataset: ProbeDataset, cv: int, seed: int) -> BaseCrossValidator:
    """Return the scikit-learn splitter that `assign` uses, shuffled by *seed*.

    ``StratifiedGroupKFold`` for classes; ``StratifiedKFold``, which is faster, if every sample is its own group;
    ``GroupKFold`` for a regression.
    """
    if dataset.task == "regression":
        return GroupKFold(cv, shuffle=True, random_state=seed)
    kind = StratifiedKFold if dataset.n_groups == dataset.n_samples else StratifiedGroupKFold
    return kind(cv, shuffle=True, random_state=seed)


def assign(dataset: ProbeDataset, cv: int, seed: int) -> NDArray[np.int64]:
    """Return the fold in which each sample is tested, ``(n_samples,)`` of 0 … cv−1; no group is in two folds.

    Folds depend on the order of the documents in the corpus, not on the batches of the capture.

    Raises
    ------
    AnalysisError
        *cv* or *seed* is not a valid number; there are fewer groups than folds; a class is in fewer groups than folds,
        or missing from the training side of a fold.
    """
    if not is_whole(cv) or cv < 2:
        expected = "cv as a whole number of at least 2"
        raise AnalysisError(
            "there must be at least two folds", expected=expected, found=f"cv={cv!r}", remedy="set cv=5"
        )
    check_whole("seed", seed, 0, MOST_SEED)
    if dataset.n_groups < cv:
        raise AnalysisError(
            "there are fewer groups than folds",
            where=f"groups={dataset.groups!r}",
            expected=f"at least {cv} groups",
            found=f"{dataset.n_groups} groups of {dataset.n_documents} documents",
            remedy="ask for fewer folds, or group by another column",
        )
    if dataset.task == "classification":
        spread = np.bincount(_classes_within(dataset.y, dataset.group), minlength=len(dataset.classes))
        if spread.min() < cv:
            small = [f"{dataset.classes[c]!r} in {spread[c]}" for c in np.argsort(spread)[:5] if spread[c] < cv]
            raise AnalysisError(
                "a class is smaller than the number of folds",
                where=f"target {dataset.target!r} of {len(dataset.classes)} classes",
                expected=f"every class in at least {cv} groups",
                found=", ".join(small) + (", …" if (spread < cv).sum() > 5 else ""),
                remedy="ask for fewer folds, leave these classes out, or choose another target",
            )
    fold = np.full(dataset.n_samples, -1, np.int64)
    chosen = splitter(dataset, cv, seed)
    order = dataset.corpus_order
    _, first, place = np.unique(dataset.group[order], return_index=True, return_inverse=True)
    group = None if isinstance(chosen, StratifiedKFold) else first.argsort().argsort()[place]
    for number, (_, test) in enumerate(chosen.split(np.zeros(dataset.n_samples), dataset.y[order], group)):
        fold[order[test]] = number
    if dataset.task == "classification" and not trainable(dataset.y, fold, cv, without=1):
        raise AnalysisError(
            "a fold would train on fewer classes than there are",
            where=f"groups={dataset.groups!r}, target {dataset.target!r}",
            found="a class whose samples are nearly all in one group",
            remedy="ask for fewer folds, or group by another column",
        )
    return fold


def trainable(y: NDArray[np.int64], fold: NDArray[np.int64], cv: int, *, without: int) -> bool:
    """Return True if every class remains when any *without* folds are left out.

    That is the case if each class is in more than *without* folds.
    """
    present = _classes_within(y, fold)
    return cv > without and bool((np.bincount(present, minlength=int(y.max()) + 1) > without).all())


def _classes_within(y: NDArray[np.int64], part: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the class of every pair of a class and a part of the samples that occurs."""
    count = int(part.max()) + 1
    return np.asarray(np.unique(y * count + part) // count)
