from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.linear_model import Ridge as LeastSquares
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from analysis import probes
from flexcache.errors import AnalysisError


def data(n: int = 90, d: int = 12, classes: int = 2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = rng.integers(classes, size=n)
    X = rng.normal(size=(n, d)) * np.geomspace(0.01, 2000, d) + 50
    X[:, -1] += 3000 * y
    X[:, 0] = 7  # constant
    return X, np.array(["neg", "pos", "odd"])[y]


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("n", [90, 10])  # also fewer samples than features
@pytest.mark.parametrize("C", [0.01, 10])
def test_logistic_is_the_optimum_of_scikit_learn(classes: int, n: int, C: float) -> None:
    X, y = data(n, classes=classes)
    ours = probes.Logistic(C).fit(X, y)
    reference = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-12, max_iter=500)
    theirs = make_pipeline(StandardScaler(), reference).fit(X, y)
    np.testing.assert_allclose(ours.coef_ * ours.scale_, theirs[-1].coef_, atol=1e-4 if C > 1 else 1e-6)
    np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), atol=1e-4 if C > 1 else 1e-6)
    assert (ours.predict(X) == theirs.predict(X)).all()
    assert ours.gradient_ <= ours.tol


def test_decisions_are_in_the_units_of_the_activations() -> None:
    X, y = data()
    for probe in (probes.Logistic(), probes.Ridge()):
        fitted: Any = probe.fit(X, y)
        assert fitted.decision_function(X) == pytest.approx(X @ fitted.coef_[0] + fitted.intercept_[0], abs=1e-9)


def test_logistic_that_did_not_converge_is_an_error() -> None:
    with pytest.raises(AnalysisError, match="did not converge"):
        probes.Logistic(C=1e6, max_iter=1).fit(*data())


@pytest.mark.parametrize("classes", [2, 3])
def test_ridge_on_classes_is_the_ridge_classifier(classes: int) -> None:
    X, y = data(classes=classes)
    ours, theirs = probes.Ridge(3.0).fit(X, y), make_pipeline(StandardScaler(), RidgeClassifier(3.0)).fit(X, y)
    np.testing.assert_allclose(ours.decision_function(X), theirs.decision_function(X), atol=1e-9)
    assert (ours.predict(X) == theirs.predict(X)).all()
    assert ours.score(X, y) == theirs.score(X, y)


def test_ridge_on_numbers_is_a_regression() -> None:
    X, _ = data()
    y = X[:, 3] + np.random.default_rng(1).normal(size=len(X))
    ours, theirs = probes.Ridge(3.0).fit(X, y), make_pipeline(StandardScaler(), LeastSquares(3.0)).fit(X, y)
    np.testing.assert_allclose(ours.predict(X), theirs.predict(X), rtol=1e-9)
    assert ours.score(X, y) == pytest.approx(theirs.score(X, y))


@pytest.mark.parametrize("probe", [probes.Logistic(C=3), probes.Ridge(alpha=3)])
def test_a_probe_is_a_scikit_learn_estimator(probe: Any) -> None:
    assert 3 in probe.get_params().values()
    assert clone(probe).get_params() == probe.get_params()
    with pytest.raises(ValueError, match="features"):
        probe.fit(*data()).predict(np.zeros((1, 2)))
