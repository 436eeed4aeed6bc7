"""Baselines of a probe, evaluated on the same folds."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import TfidfTransformer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from analysis.dataset.probe_dataset import ProbeDataset
from analysis.probes.evaluation.folds import trainable
from analysis.probes.evaluation.score import Prediction
from flexcache.errors import AnalysisError


def majority(dataset: ProbeDataset, fold: NDArray[np.int64], cv: int) -> Prediction:
    """Predict the most common class of the training samples, with the class shares as probabilities; or the mean."""
    predicted = np.empty_like(dataset.y)
    if dataset.task == "regression":
        for number in range(cv):
            predicted[fold == number] = dataset.y[fold != number].mean()
        return Prediction(predicted, predicted)
    probability = np.empty((dataset.n_samples, len(dataset.classes)))
    for number in range(cv):
        counts = np.bincount(dataset.y[fold != number], minlength=len(dataset.classes))
        predicted[fold == number] = counts.argmax()
        probability[fold == number] = counts / counts.sum()
    return Prediction(predicted, np.zeros(dataset.n_samples), probability)


def tfidf(dataset: ProbeDataset, fold: NDArray[np.int64], cv: int) -> Prediction:
    """Predict from words and pairs of words, without the model.

    TF-IDF of 1- and 2-grams, learnt from the training documents of each fold, and scikit-learn's
    `LogisticRegression` or `Ridge` with their defaults. Every row of a document gets the prediction of the document.

    Raises
    ------
    AnalysisError
        The store has no texts, or the texts have no word.
    """
    if dataset.texts is None:
        raise AnalysisError("the store kept no texts", remedy="capture with the text, or leave tfidf out")
    texts = np.asarray(dataset.texts, dtype=object)
    return _by_document(dataset, fold, cv, texts, lambda: TfidfVectorizer(ngram_range=(1, 2)), "TF-IDF")


def tokens(dataset: ProbeDataset, fold: NDArray[np.int64], cv: int) -> Prediction:
    """Predict from the bag of token ids of each document, weighted by TF-IDF as in `tfidf`; needs no text.

    Raises
    ------
    AnalysisError
        The store has no token ids.
    """
    table: Any = getattr(dataset.store, "tokens", None)
    if table is None:
        raise AnalysisError("the store has no token ids")
    if getattr(dataset.store, "images", False):
        raise AnalysisError("the tokens of images have no ids")
    owner = np.asarray(table["document"])
    lists = table["tokens"].combine_chunks()
    counts = np.diff(lists.offsets.to_numpy())
    ids = lists.flatten().to_numpy(zero_copy_only=False)
    _, first = np.unique(owner, return_index=True)  # a document in two units is listed twice
    kept = np.isin(np.arange(len(owner)), first)
    rows, columns = np.repeat(owner, counts), ids
    inside = np.repeat(kept, counts)
    shape = (len(dataset.store.documents), int(ids.max(initial=0)) + 1)
    bags = csr_matrix((np.ones(int(inside.sum())), (rows[inside], columns[inside])), shape)
    return _by_document(dataset, fold, cv, bags[dataset.source], TfidfTransformer, "the bag of tokens")


def length(dataset: ProbeDataset, fold: NDArray[np.int64], cv: int) -> Prediction:
    """Predict from the logarithm of the number of tokens of a document."""
    size = np.log(dataset.store.documents["n_tokens"].to_numpy().astype(float)[dataset.source])[:, None]
    return _by_document(dataset, fold, cv, size, StandardScaler, "length")


def draw_seed(seed: int, draw: int) -> int | list[int]:
    """Return the seed of one of several draws; the first draw has *seed* itself."""
    return [seed, draw] if draw else seed


def shuffle(dataset: ProbeDataset, fold: NDArray[np.int64], cv: int, seed: int | list[int]) -> NDArray:
    """Return the target, moved at random to other documents, ``(n_samples,)``.

    If every group has a single value, whole groups exchange values. Otherwise documents exchange values across all
    groups, or tokens do, if tokens have targets of their own.

    Raises
    ------
    AnalysisError
        No shuffle keeps every class in every training side.
    """
    rng = np.random.default_rng(seed)
    unit = np.arange(dataset.n_samples)
    for owner in (dataset.document, dataset.group):
        _, first, place = np.unique(owner, return_index=True, return_inverse=True)
        if (dataset.y == dataset.y[first][place]).all():
            unit = owner
    _, first, place = np.unique(unit, return_index=True, return_inverse=True)
    values = dataset.y[first]
    for _ in range(100):
        moved = rng.permutation(values)[place]
        if dataset.task == "regression" or trainable(moved, fold, cv, without=1):
            return moved
    raise AnalysisError(
        "the target cannot be shuffled", found="a class in too few groups", remedy="ask for fewer folds"
    )


def control(dataset: ProbeDataset, fold: NDArray[np.int64], cv: int, seed: int | list[int]) -> NDArray[np.int64]:
    """Return a label drawn for each token id, ``(n_samples,)``, with the class shares of the target.

    A probe that learns this control task has memorised the tokens. By how much it does better on the target is its
    selectivity (Hewitt & Liang 2019, arXiv 1909.03368).

    Raises
    ------
    AnalysisError
        A sample is not a single token, or a class is missing from a training side in every draw.
    """
    coordinates: Any = getattr(dataset.store, "coordinates", None)
    if dataset.row is None or coordinates is None or dataset.task != "classification":
        raise AnalysisError("a control task needs classes, and samples of one token each")
    token = np.asarray(coordinates["token_id"].values)[dataset.row]
    kinds, place, counts = np.unique(token, return_inverse=True, return_counts=True)
    if counts.max() > dataset.n_samples / 2:
        raise AnalysisError("one kind of token is more than half of the samples")
    share, rng = np.bincount(dataset.y) / dataset.n_samples, np.random.default_rng(seed)
    for _ in range(100):
        drawn = np.asarray(rng.choice(len(share), size=len(kinds), p=share)[place], np.int64)
        if len(np.unique(drawn)) == len(share) and trainable(drawn, fold, cv, without=1):
            return drawn
    raise AnalysisError("too few kinds of tokens for a control task", found=f"{len(kinds)}")


def _by_document(
    dataset: ProbeDataset, fold: NDArray[np.int64], cv: int, features: Any, transformer: Callable[[], Any], what: str
) -> Prediction:
    """Fit to features of documents, with the targets of all their samples, and predict samples by their document."""
    probabilities = np.empty((dataset.n_samples, len(dataset.classes))) if dataset.classes else None
    predicted, decision = np.empty_like(dataset.y), np.zeros(dataset.n_samples)
    for number in range(cv):
        test = fold == number
        train = np.flatnonzero(~test)
        _, first = np.unique(dataset.document[train], return_index=True)
        once = train[first] if _one_target_per_document(dataset, train) else train
        model = Ridge() if dataset.task == "regression" else LogisticRegression(max_iter=10_000)
        fitted = make_pipeline(transformer(), model)
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)
            try:
                fitted.fit(features[dataset.document[once]], dataset.y[once])
            except ConvergenceWarning as error:
                raise AnalysisError(f"the baseline of {what} did not converge", found=str(error)) from error
            except ValueError as error:
                raise AnalysisError(f"{what} found no word in the texts", found=str(error)) from error
        asked, place = np.unique(dataset.document[test], return_inverse=True)
        predicted[test] = fitted.predict(features[asked])[place]
        if probabilities is not None:
            probabilities[test] = fitted.predict_proba(features[asked])[place]
        if len(dataset.classes) == 2:
            decision[test] = fitted.decision_function(features[asked])[place]
    return Prediction(predicted, decision if len(dataset.classes) == 2 else predicted.astype(float), probabilities)


def _one_target_per_document(dataset: ProbeDataset, chosen: NDArray[np.int64]) -> bool:
    """Return True if the samples of each document share one target."""
    _, first, place = np.unique(dataset.document[chosen], return_index=True, return_inverse=True)
    return bool((dataset.y[chosen] == dataset.y[chosen][first][place]).all())
