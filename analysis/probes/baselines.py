"""What a probe has to beat, on the same folds."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge

from analysis.probes.folds import trainable
from analysis.view import View
from flexcache.errors import AnalysisError

NAMES = ("majority", "shuffled", "tfidf")
Prediction = tuple[NDArray, NDArray[np.float64]]
"""Predicted codes or values, and the decision that ranks samples; ``(n_samples,)`` each."""


def majority(view: View, fold: NDArray[np.int64], cv: int) -> Prediction:
    """Always say the training samples' commonest class (the first of several), or their mean."""
    predicted = np.empty_like(view.y)
    for number in range(cv):
        train = view.y[fold != number]
        predicted[fold == number] = train.mean() if view.task == "regression" else np.bincount(train).argmax()
    return predicted, np.zeros(view.n_samples) if view.task == "classification" else predicted


def tfidf(view: View, fold: NDArray[np.int64], cv: int) -> Prediction:
    """Fit words and pairs of words, without any model: what the text alone gives away.

    TF-IDF of 1- and 2-grams, learnt from the training documents of each fold, and scikit-learn's
    `LogisticRegression` or `Ridge` with their own defaults. Every row of a document gets its prediction.

    Raises
    ------
    AnalysisError
        The store has no texts, or there is no word in them.
    """
    if view.texts is None:
        raise AnalysisError("the store kept no texts", remedy="capture with the text, or leave tfidf out")
    texts = np.asarray(view.texts, dtype=object)
    _, first = np.unique(view.document, return_index=True)
    target = view.y[first]
    predicted, decision = np.empty_like(view.y), np.empty(view.n_samples)
    for number in range(cv):
        test = fold == number
        train = np.unique(view.document[~test])
        vectorizer = TfidfVectorizer(ngram_range=(1, 2))
        try:
            known = vectorizer.fit_transform(texts[train])
        except ValueError as error:
            raise AnalysisError("TF-IDF found no word in the texts", found=str(error)) from error
        model = Ridge() if view.task == "regression" else LogisticRegression(max_iter=10_000)
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)
            try:
                model.fit(known, target[train])
            except ConvergenceWarning as error:
                raise AnalysisError("the TF-IDF baseline did not converge", found=str(error)) from error
        asked, place = np.unique(view.document[test], return_inverse=True)
        words = vectorizer.transform(texts[asked])
        predicted[test] = model.predict(words)[place]
        if len(view.classes) == 2:
            decision[test] = model.decision_function(words)[place]
    return predicted, decision if len(view.classes) == 2 else predicted.astype(float)


def shuffle(view: View, fold: NDArray[np.int64], cv: int, seed: int) -> NDArray:
    """Return the target moved to other documents, ``(n_samples,)``: what is found where nothing is.

    Where a group has one value throughout, whole groups exchange values, so that what lives in a group stays
    together; otherwise documents exchange them across all groups.

    Raises
    ------
    AnalysisError
        No shuffle leaves every class in every training side.
    """
    unit = view.document
    _, first = np.unique(view.group, return_index=True)
    if view.n_groups < view.n_samples and (view.y == view.y[first][view.group]).all():
        unit = view.group
    _, first, place = np.unique(unit, return_index=True, return_inverse=True)
    values, rng = view.y[first], np.random.default_rng(seed)
    for _ in range(100):
        moved = rng.permutation(values)[place]
        if view.task == "regression" or trainable(moved, fold, cv, without=1):
            return moved
    raise AnalysisError(
        "the target cannot be shuffled", found="a class in too few groups", remedy="ask for fewer folds"
    )
