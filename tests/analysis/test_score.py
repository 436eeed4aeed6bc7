from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t as student
from sklearn.metrics import accuracy_score, r2_score, roc_auc_score

from analysis.probes import score

RNG = np.random.default_rng(3)
N, CV = 60, 3
GROUP = np.repeat(np.arange(20), 3)
FOLD = GROUP % CV
Y = RNG.integers(2, size=N)
DECISION = np.round(RNG.normal(size=N) + 0.8 * Y, 1)  # with ties
PREDICTED = (DECISION > 0.4).astype(int)
REFERENCE = {"accuracy": accuracy_score, "auroc": roc_auc_score, "r2": r2_score}


def arguments(metric: str) -> tuple[np.ndarray, np.ndarray]:
    return (Y.astype(float), DECISION) if metric == "r2" else (Y, PREDICTED)


@pytest.mark.parametrize("metric", ["accuracy", "auroc", "r2"])
def test_a_folds_value_is_scikit_learns(metric: score.Metric) -> None:
    y, predicted = arguments(metric)
    top, bottom = score.parts(metric, y, predicted, DECISION, FOLD, CV)
    second = DECISION if metric == "auroc" else predicted
    expected = [REFERENCE[metric](y[k == FOLD], second[k == FOLD]) for k in range(CV)]
    np.testing.assert_allclose(score.ratio(top, bottom), expected, rtol=1e-12)


@pytest.mark.parametrize("metric", ["accuracy", "auroc"])
def test_the_bootstrap_is_scoring_the_drawn_groups_themselves(metric: score.Metric) -> None:
    draws, values = np.concatenate(list(score._resamples(20, N, 50, seed=1))), []
    for drawn in draws.astype(int):
        at = np.repeat(np.arange(N), drawn[GROUP])
        top = bottom = 0.0
        for k in range(CV):
            y, decision, predicted = (v[at][FOLD[at] == k] for v in (Y, DECISION, PREDICTED))
            pairs = y.sum() * (1 - y).sum() if metric == "auroc" else len(y)
            value = roc_auc_score(y, decision) if metric == "auroc" else accuracy_score(y, predicted)
            top, bottom = top + value * pairs, bottom + pairs
        values.append(top / bottom)
    assert (draws.sum(1) == 20).all()
    low, high = score.bootstrap(metric, Y, PREDICTED[None], DECISION[None], FOLD, GROUP, resamples=50, seed=1)
    assert (low[0], high[0]) == pytest.approx(tuple(np.percentile(values, [2.5, 97.5])))


def test_the_bootstrap_does_not_depend_on_how_much_fits_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    arms = np.stack([PREDICTED, 1 - PREDICTED]), np.stack([DECISION, -DECISION])
    whole = score.bootstrap("auroc", Y, *arms, FOLD, GROUP, resamples=40, seed=0)
    monkeypatch.setattr(score, "CHUNK", 7 * N)
    np.testing.assert_allclose(score.bootstrap("auroc", Y, *arms, FOLD, GROUP, resamples=40, seed=0), whole)


def test_the_r2_interval_covers_its_estimate_without_bias() -> None:
    y = RNG.normal(size=N)
    predicted = y + RNG.normal(size=N)
    low, high = score.bootstrap(
        "r2", y, predicted[None], predicted[None], FOLD, GROUP, resamples=4000, seed=0, level=0.02
    )
    top, bottom = score.parts("r2", y, predicted, predicted, FOLD, CV)
    assert (low[0] + high[0]) / 2 == pytest.approx(top.sum() / bottom.sum(), abs=0.04)


def test_a_clustered_sample_has_a_wider_interval_than_its_rows_suggest() -> None:
    right = np.repeat(RNG.integers(2, size=20), 3)  # whole groups are right or wrong
    y, zeros = np.ones(N, int), np.zeros((1, N))
    by_group = score.bootstrap("accuracy", y, right[None], zeros, FOLD, GROUP, resamples=500, seed=0)
    by_row = score.bootstrap("accuracy", y, right[None], zeros, FOLD, np.arange(N), resamples=500, seed=0)
    assert np.ptp(by_group) > 1.4 * np.ptp(by_row)


def test_the_fold_interval_is_nadeau_and_bengios() -> None:
    values = np.array([0.7, 0.8, 0.9, 0.75, 0.85])
    low, high = score.fold_interval(values)
    half = student.ppf(0.975, 4) * values.std(ddof=1) * np.sqrt(1 / 5 + 1 / 4)
    assert (low, high) == pytest.approx((0.8 - half, 0.8 + half))


def test_nothing_to_measure_is_nan() -> None:
    top, bottom = score.parts("auroc", np.ones(4, int), np.ones(4), np.arange(4.0), np.array([0, 0, 1, 1]), 2)
    assert np.isnan(score.ratio(top, bottom)).all()
