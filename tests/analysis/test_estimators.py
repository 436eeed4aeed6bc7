from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import BaseEstimator, clone
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.linear_model import Ridge as LeastSquares
from sklearn.neighbors import NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from analysis import probes
from analysis.probes import estimators
from analysis.probes.estimators import design as designs
from analysis.probes.estimators.design import Design, split_rows
from analysis.probes.estimators.linear import one_hot
from flexcache.errors import AnalysisError

LINEAR = [
    probes.Logistic(C=3),
    probes.Ridge(alpha=3),
    probes.MassMean(),
    probes.NearestCentroid(),
    probes.LDA(0.2),
]
ALL = [*LINEAR, probes.INLP(3), probes.MLP(3, epochs=2)]
"""Every kind of probe of rows; add new ones to `LINEAR` or here to test them against the contract."""


def data(n: int = 90, d: int = 12, classes: int = 2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = rng.integers(classes, size=n)
    y[:classes] = np.arange(classes)
    X = rng.normal(size=(n, d)) * np.geomspace(0.01, 2000, d) + 50
    X[:, -1] += 3000 * y
    X[:, 0] = 7  # constant
    return X, np.array(["neg", "pos", "odd"])[y]


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("n", [90, 10])  # also fewer samples than features
@pytest.mark.parametrize("C", [0.01, 1, 100])
def test_logistic_is_the_optimum_of_scikit_learn(classes: int, n: int, C: float) -> None:
    X, y = data(n, classes=classes)
    ours = probes.Logistic(C, tol=1e-7).fit(X, y)
    reference = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-14, max_iter=500)
    theirs = make_pipeline(StandardScaler(), reference).fit(X, y)
    np.testing.assert_allclose(ours.coef_ * ours.scale_, theirs[-1].coef_, atol=1e-6 * np.abs(theirs[-1].coef_).max())
    np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), atol=1e-6)
    assert (ours.predict(X) == theirs.predict(X)).all()
    assert ours.distance_ <= ours.tol


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([2, 3]), st.integers(3, 15), st.integers(1, 4))
def test_solving_all_sets_and_strengths_at_once_equals_one_by_one(seed: int, classes: int, d: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    X, y = data(60, d, classes, seed)
    sets = rng.random((count, 60)) < 0.7
    sets[:, :classes] = True
    codes = np.unique(y, return_inverse=True)[1]
    for probe, one in (
        (probes.Logistic(Cs=[0.01, 1.0], tol=1e-9), lambda s: probes.Logistic(s, tol=1e-9)),
        (probes.Ridge(alphas=[2.0, 50.0]), lambda s: probes.Ridge(s)),
        (probes.LDA(shrinkages=[0.1, 0.5]), lambda s: probes.LDA(s)),
        (probes.MassMean(), lambda s: probes.MassMean()),
    ):
        probe.classes_ = np.unique(y)
        found = probe.solve(Design(X), one_hot(codes, classes), sets, probe.strengths)
        for number, held in enumerate(sets):
            for at, strength in enumerate(probe.strengths):
                alone = one(strength).fit(X[held], y[held])
                size = np.abs(alone.coef_ * X.std(0)).max()
                for ours, theirs in ((found.coef[number, at] * X.std(0), alone.coef_ * X.std(0)),):
                    np.testing.assert_allclose(ours, theirs, atol=2e-6 * size, rtol=1e-6)
                decision = X @ found.coef[number, at].T + found.intercept[number, at]
                np.testing.assert_allclose(
                    decision.squeeze(), alone.decision_function(X), atol=1e-5 * max(1, np.abs(decision).max())
                )


@pytest.mark.parametrize("classes", [2, 3])
def test_rows_read_in_blocks_give_the_same(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = data(90, classes=classes)
    sizes: list[int] = []

    def read(part: slice) -> np.ndarray:
        sizes.append(part.stop - part.start)
        return X[part]

    codes, sets = np.unique(y, return_inverse=True)[1], np.random.default_rng(0).random((3, 90)) < 0.8
    balanced = probes.Logistic(Cs=[0.01, 1.0], class_weight="balanced", tol=1e-9)
    for probe in (probes.Logistic(tol=1e-9), balanced, probes.Ridge(), probes.LDA(), probes.MassMean()):
        probe.classes_ = np.unique(y)
        there = probe.solve(Design(X), one_hot(codes, classes), sets, probe.strengths)
        with monkeypatch.context() as patch:
            patch.setattr(designs, "BLOCK", 7)
            here = probe.solve(Design(read, X.shape), one_hot(codes, classes), sets, probe.strengths)
        np.testing.assert_allclose(here.coef * X.std(0), there.coef * X.std(0), rtol=1e-6, atol=1e-9)
    assert max(sizes) == 7


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("C", [1e-3, 1, 1e3])
def test_logistic_over_many_blocks_is_the_optimum_of_scikit_learn(
    classes: int, C: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(designs, "BLOCK", 64)
    rng = np.random.default_rng(classes)
    mixed = rng.normal(size=(30, 30)) * np.geomspace(1, 1e-3, 30)
    X = rng.normal(size=(600, 30)) @ mixed + 1e3 * rng.normal(size=30)
    y = (2 * (X - X.mean(0)) @ rng.normal(size=(30, classes)) + rng.gumbel(size=(600, classes))).argmax(1)
    ours = probes.Logistic(C, tol=1e-8).fit(X, y)
    reference = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-14, max_iter=500)
    theirs = make_pipeline(StandardScaler(), reference).fit(X, y)
    np.testing.assert_allclose(ours.coef_ * ours.scale_, theirs[-1].coef_, atol=1e-6 * np.abs(theirs[-1].coef_).max())
    np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), atol=1e-6)
    assert ours.distance_ <= ours.tol


def test_rows_are_split_by_the_sets_that_they_belong_to() -> None:
    sets = np.random.default_rng(0).random((70, 40)) < 0.5
    sets[:, 20:] = sets[:, :20]
    kinds, part_of = split_rows(sets)
    assert kinds.shape == (70, 20)
    assert (kinds[:, part_of] == sets).all()


def test_decisions_are_in_the_units_of_the_activations() -> None:
    X, y = data()
    for probe in LINEAR:
        fitted: Any = clone(probe).fit(X, y)
        expected = X @ fitted.coef_[0] + fitted.intercept_[0]
        assert fitted.decision_function(X) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_logistic_that_did_not_converge_is_an_error() -> None:
    with pytest.raises(AnalysisError, match="did not converge"):
        probes.Logistic(C=1e6, max_iter=1).fit(*data())


def test_invalid_strengths_are_errors() -> None:
    for probe in (probes.Logistic(0.0), probes.Ridge(alphas=[-1.0, 2.0]), probes.LDA(2.0)):
        with pytest.raises(AnalysisError, match=r"above 0|from 0 to 1"):
            probe.fit(*data())


def test_the_best_of_several_strengths_in_cross_validation_is_used() -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(120, 60))
    y = np.where(X[:, 0] + 2 * rng.normal(size=120) > 0, "a", "b")
    for probe, grid in ((probes.Logistic(Cs=np.logspace(-4, 2, 7)), "C"), (probes.Ridge(alphas=7), "alpha")):
        fitted = probe.fit(X, y)
        assert fitted.strength_ in fitted.strengths
        alone = type(probe)(fitted.strength_).fit(X, y)
        np.testing.assert_allclose(fitted.coef_, alone.coef_, atol=1e-6)
        assert fitted.strength_ != fitted.strengths[-1], f"the weakest {grid} fits noise"


@pytest.mark.parametrize("classes", [2, 3])
def test_ridge_on_classes_is_the_ridge_classifier(classes: int) -> None:
    X, y = data(classes=classes)
    ours, theirs = probes.Ridge(3.0).fit(X, y), make_pipeline(StandardScaler(), RidgeClassifier(3.0)).fit(X, y)
    np.testing.assert_allclose(ours.decision_function(X), theirs.decision_function(X), atol=1e-9)
    assert (ours.predict(X) == theirs.predict(X)).all()
    assert ours.score(X, y) == theirs.score(X, y)


@pytest.mark.parametrize("targets", [1, 3])
def test_ridge_on_numbers_is_a_regression(targets: int) -> None:
    X, _ = data()
    y = X[:, 3 : 3 + targets] + np.random.default_rng(1).normal(size=(len(X), targets))
    y = y[:, 0] if targets == 1 else y
    ours, theirs = probes.Ridge(3.0).fit(X, y), make_pipeline(StandardScaler(), LeastSquares(3.0)).fit(X, y)
    np.testing.assert_allclose(ours.predict(X), theirs.predict(X), rtol=1e-9)
    assert ours.score(X, y) == pytest.approx(theirs.score(X, y))


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("shrinkage", [0.0, 0.3])
def test_lda_is_that_of_scikit_learn(classes: int, shrinkage: float) -> None:
    X, y = data(classes=classes)
    X = X[:, 1:] / X[:, 1:].std(0)  # without the constant, which makes the covariance singular
    ours = probes.LDA(shrinkage).fit(X, y)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage or None).fit(X, y)
    scale = np.abs(theirs.decision_function(X)).max()
    if classes == 2:
        np.testing.assert_allclose(ours.coef_ * X.std(0), theirs.coef_ * X.std(0), rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(ours.decision_function(X), theirs.decision_function(X), atol=1e-6 * scale)
    np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), atol=1e-7)
    assert (ours.predict(X) == theirs.predict(X)).all()


def test_a_regularisation_that_is_lost_in_rounding_is_an_error() -> None:
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(60, 200)), np.arange(60) % 3
    within = np.eye(3)[y]  # features that tell the classes, and do not vary within them
    for probe, rows in ((probes.Ridge(1e-16), X), (probes.LDA(1e-18), X), (probes.LDA(), within[:, :2])):
        with pytest.raises(AnalysisError, match="lost in rounding"):
            probe.fit(rows, y)


@pytest.mark.parametrize("features", [1, 2, 5])
@pytest.mark.parametrize("classes", [2, 3])
def test_constant_features_give_the_shares_of_the_classes(features: int, classes: int) -> None:
    X, y = np.ones((60, features)), np.arange(60) * classes // 90
    share = np.bincount(y) / 60
    for shrinkage in (0.0, 0.1, 1.0):
        found = probes.LDA(shrinkage).fit(X, y)
        np.testing.assert_allclose(found.predict_proba(X), np.broadcast_to(share, (60, len(share))))
    assert not probes.Ridge().fit(X, y).coef_.any()


@pytest.mark.parametrize("classes", [2, 3])
def test_nearest_centroid_is_that_of_scikit_learn(classes: int) -> None:
    X, y = data(classes=classes)
    X = X[:, 1:]
    assert (probes.NearestCentroid().fit(X, y).predict(X) == NearestCentroid().fit(X, y).predict(X)).all()


def test_mass_mean_is_the_difference_of_means_and_iid_is_lda() -> None:
    X, y = data()
    X = np.delete(X, 0, 1)
    one, two = (X[y == name].mean(0) for name in ("neg", "pos"))
    plain, tilted = probes.MassMean().fit(X, y), probes.MassMean(iid=True).fit(X, y)
    np.testing.assert_allclose(plain.coef_[0], two - one, rtol=1e-9, atol=1e-9)
    assert plain.decision_function([(one + two) / 2]) == pytest.approx(0, abs=1e-6)
    lda = LinearDiscriminantAnalysis(solver="lsqr").fit(X, y).coef_[0]
    cosine = tilted.coef_[0] @ lda / np.linalg.norm(tilted.coef_[0]) / np.linalg.norm(lda)
    assert cosine == pytest.approx(1, abs=1e-9)


def test_inlp_removes_the_directions_that_a_probe_finds() -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(2, size=400)
    X = rng.normal(size=(400, 20))
    X[:, 3] += 3 * y
    X[:, 8] -= 3 * y
    fitted = probes.INLP(rounds=6).fit(X, y)
    np.testing.assert_allclose(fitted.directions_ @ fitted.directions_.T, np.eye(len(fitted.directions_)), atol=1e-9)
    assert fitted.accuracies_[0] > 0.95
    erased = fitted.transform(X)
    np.testing.assert_allclose(erased @ fitted.directions_.T, (erased @ fitted.directions_.T)[:1].repeat(400, 0))
    assert probes.Logistic().fit(erased, y).score(erased, y) < 0.66
    assert fitted.score(X, y) == fitted.accuracies_[0]


def test_a_perceptron_learns_a_label_that_no_linear_probe_can() -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(600, 5))
    y = np.where(X[:, 0] * X[:, 1] > 0, "same", "other")
    fitted = probes.MLP(32, learning_rate=1e-2, weight_decay=0.0).fit(X[:400], y[:400])
    assert fitted.score(X[400:], y[400:]) > 0.85
    assert probes.Logistic().fit(X[:400], y[:400]).score(X[400:], y[400:]) < 0.7
    again = clone(fitted).fit(X[:400], y[:400])
    np.testing.assert_array_equal(again.predict_proba(X), fitted.predict_proba(X))


def test_attention_pooling_finds_the_informative_token() -> None:
    rng = np.random.default_rng(0)
    lengths, y = rng.integers(20, 60, size=500), rng.integers(2, size=500)
    X = [rng.normal(size=(length, 8)) for length in lengths]
    for tokens, label in zip(X, y):
        at = rng.integers(len(tokens))
        tokens[at, 0] += 6  # which token it is
        tokens[at, 1] += 3 * (2 * label - 1)  # what it says
    fitted = probes.AttentionPooled(2, learning_rate=2e-2, weight_decay=0.0).fit(X[:400], y[:400])
    assert (fitted.predict(X[400:]) == y[400:]).mean() > 0.9
    mean = np.stack([tokens.mean(0) for tokens in X])
    assert probes.Logistic(1.0).fit(mean[:400], y[:400]).score(mean[400:], y[400:]) < 0.85
    np.testing.assert_allclose(fitted.predict_proba(X[:3]), fitted.predict_proba(X)[:3], atol=1e-6)


def test_every_kind_of_probe_is_held_to_the_contract_and_exported() -> None:
    names = {
        name
        for module in pkgutil.iter_modules(estimators.__path__, f"{estimators.__name__}.")
        for name, kind in vars(importlib.import_module(module.name)).items()
        if isinstance(kind, type) and issubclass(kind, BaseEstimator) and kind.__module__ == module.name
    }
    bases = {"LinearProbe", "LogOdds"}
    public = {name for name in names if not name.startswith("_")}
    assert public - bases == set(estimators.__all__) - bases
    assert set(estimators.__all__) <= set(probes.__all__)
    assert public - bases - {"AttentionPooled"} == {type(probe).__name__ for probe in ALL}  # it takes tokens, not rows


@pytest.mark.parametrize("probe", ALL)
def test_a_probe_is_a_scikit_learn_estimator(probe: Any) -> None:
    assert clone(probe).get_params() == probe.get_params()
    with pytest.raises(ValueError, match="features"):
        clone(probe).fit(*data()).predict(np.zeros((1, 2)))
