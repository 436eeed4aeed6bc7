from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import t as student
from sklearn.metrics import accuracy_score, brier_score_loss, f1_score, log_loss, r2_score, roc_auc_score

from analysis.probes import score

RNG = np.random.default_rng(3)
N, CV = 60, 3
GROUP = np.repeat(np.arange(20), 3)
FOLD = GROUP % CV
Y = RNG.integers(2, size=N)
DECISION = np.round(RNG.normal(size=N) + 0.8 * Y, 1)  # with ties
PREDICTED = (DECISION > 0.4).astype(int)
CHANCE = 1 / (1 + np.exp(-DECISION + 0.4))
SAID = score.Prediction(PREDICTED, DECISION, np.stack([1 - CHANCE, CHANCE], axis=1))
REFERENCE = {
    "accuracy": lambda y, at: accuracy_score(y, PREDICTED[at]),
    "auroc": lambda y, at: roc_auc_score(y, DECISION[at]),
    "f1": lambda y, at: f1_score(y, PREDICTED[at]),
    "log_loss": lambda y, at: log_loss(y, CHANCE[at]),
    "brier": lambda y, at: brier_score_loss(y, CHANCE[at]),
    "r2": lambda y, at: r2_score(y, DECISION[at]),
    "pearson": lambda y, at: np.corrcoef(y, DECISION[at])[0, 1],
}


def question(metric: str) -> tuple[np.ndarray, score.Prediction]:
    if metric in ("r2", "pearson"):
        return Y.astype(float), score.Prediction(DECISION, DECISION)
    return Y, SAID


@pytest.mark.parametrize("metric", list(REFERENCE))
def test_a_folds_value_is_scikit_learns(metric: score.Metric) -> None:
    y, said = question(metric)
    top, bottom = score.parts(metric, y, said, FOLD, CV)
    expected = [REFERENCE[metric](y[k == FOLD], k == FOLD) for k in range(CV)]
    np.testing.assert_allclose(score.ratio(top, bottom), expected, rtol=1e-12)


def test_metrics_of_several_classes_are_scikit_learns() -> None:
    y = RNG.integers(3, size=N)
    raw = RNG.normal(size=(N, 3)) + 1.5 * (y[:, None] == np.arange(3))
    probability = np.exp(raw) / np.exp(raw).sum(1, keepdims=True)
    said = score.Prediction(raw.argmax(1), raw.argmax(1).astype(float), probability)
    whole = np.zeros(N, int)
    for metric, expected in (
        ("f1", f1_score(y, raw.argmax(1), average="macro")),
        ("log_loss", log_loss(y, probability)),
        ("brier", ((probability - np.eye(3)[y]) ** 2).sum(1).mean()),
    ):
        top, bottom = score.parts(metric, y, said, whole, 1)
        assert float(top[0] / bottom[0]) == pytest.approx(expected, rel=1e-12)


def test_the_calibration_error_is_the_gap_bin_by_bin() -> None:
    top, bottom = score.parts("ece", Y, SAID, np.zeros(N, int), 1)
    sure, right = np.maximum(CHANCE, 1 - CHANCE), (CHANCE > 0.5) == Y
    edges, expected = np.linspace(0, 1, score.BINS + 1), 0.0
    for low, high in pairwise(edges):
        inside = (sure >= low) & (sure < high)
        if inside.any():
            expected += inside.mean() * abs(sure[inside].mean() - right[inside].mean())
    assert float(top[0] / bottom[0]) == pytest.approx(expected)


def test_recall_at_one_percent_is_where_one_negative_in_a_hundred_is_found() -> None:
    decision = np.concatenate([np.arange(300.0), [298.5, 297.5, 296.5, 100.2]])
    y = np.concatenate([np.zeros(300, int), np.ones(4, int)])
    said = score.Prediction((decision > 0).astype(int), decision)
    top, bottom = score.parts("recall@1%", y, said, np.zeros(304, int), 1)
    assert (top[0], bottom[0]) == (3, 4), "three negatives are allowed, 299, 298 and 297; 296.5 is above the fourth"
    tied = score.Prediction(said.predicted, np.where(decision > 290, 290.0, decision))
    assert score.parts("recall@1%", y, tied, np.zeros(304, int), 1)[0][0] == 0, "ties are found together"


def test_the_band_over_layers_holds_all_of_them_at_once() -> None:
    rng = np.random.default_rng(0)
    truth, inside, narrow = np.linspace(0.5, 0.8, 8), 0, 0
    for _ in range(200):
        pooled = truth + 0.03 * rng.normal(size=8)
        drawn = pooled[:, None] + 0.03 * rng.normal(size=(8, 400))
        low, high = score.band(pooled, drawn)
        inside += bool(((low <= truth) & (truth <= high)).all())
        ends = score.interval(drawn)
        narrow += bool(((ends[0] <= truth) & (truth <= ends[1])).all())
    assert inside > 180
    assert narrow < 170


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
    drawn = score.replicates([metric], Y, SAID, FOLD, GROUP, resamples=50, seed=1)
    np.testing.assert_allclose(drawn[0], values)
    assert score.interval(drawn[0]) == pytest.approx(tuple(np.percentile(values, [2.5, 97.5])))


def test_the_bootstrap_does_not_depend_on_how_much_fits_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = (["auroc", "ece", "recall@1%"], Y, SAID, FOLD, GROUP)
    whole = score.replicates(*asked, resamples=40, seed=0)
    monkeypatch.setattr(score, "CHUNK", 7 * N)
    np.testing.assert_allclose(score.replicates(*asked, resamples=40, seed=0), whole)


def test_the_r2_interval_covers_its_estimate_without_bias() -> None:
    y = RNG.normal(size=N)
    predicted = y + RNG.normal(size=N)
    said = score.Prediction(predicted, predicted)
    low, high = score.interval(score.replicates(["r2"], y, said, FOLD, GROUP, resamples=4000, seed=0), level=0.02)
    top, bottom = score.parts("r2", y, said, FOLD, CV)
    assert (low[0] + high[0]) / 2 == pytest.approx(top.sum() / bottom.sum(), abs=0.04)


def test_a_clustered_sample_has_a_wider_interval_than_its_rows_suggest() -> None:
    right = np.repeat(RNG.integers(2, size=20), 3)  # whole groups are right or wrong
    said = score.Prediction(right, np.zeros(N))
    by_group, by_row = (
        score.interval(score.replicates(["accuracy"], np.ones(N, int), said, FOLD, group, resamples=500, seed=0))
        for group in (GROUP, np.arange(N))
    )
    assert np.ptp(by_group) > 1.4 * np.ptp(by_row)


def test_the_fold_interval_is_nadeau_and_bengios() -> None:
    values = np.array([0.7, 0.8, 0.9, 0.75, 0.85])
    low, high = score.fold_interval(values)
    half = student.ppf(0.975, 4) * values.std(ddof=1) * np.sqrt(1 / 5 + 1 / 4)
    assert (low, high) == pytest.approx((0.8 - half, 0.8 + half))


def test_nothing_to_measure_is_nan() -> None:
    said = score.Prediction(np.ones(4), np.arange(4.0))
    top, bottom = score.parts("auroc", np.ones(4, int), said, np.array([0, 0, 1, 1]), 2)
    assert np.isnan(score.ratio(top, bottom)).all()


def test_resamples_without_a_score_are_left_out_of_the_band() -> None:
    pooled, drawn = np.array([0.5, 0.7]), np.random.default_rng(0).normal(0.6, 0.1, (2, 400))
    some = np.concatenate([drawn, np.full((2, 30), np.nan)], axis=1)
    assert np.allclose(score.band(pooled, some), score.band(pooled, drawn))
