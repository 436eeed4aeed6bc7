from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import binomtest, norm
from scipy.stats import t as student
from sklearn.calibration import calibration_curve
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    brier_score_loss,
    f1_score,
    log_loss,
    r2_score,
    roc_auc_score,
    roc_curve,
)

from analysis.probes.evaluation import pooled_metrics, score
from analysis.statistics import bootstrap
from analysis.statistics.bootstrap import percentile_interval

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
    "balanced_accuracy": lambda y, at: balanced_accuracy_score(y, PREDICTED[at]),
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
def test_the_value_of_a_fold_equals_scikit_learn(metric: score.Metric) -> None:
    y, said = question(metric)
    top, bottom = score.parts(metric, y, said, FOLD, CV)
    expected = [REFERENCE[metric](y[k == FOLD], k == FOLD) for k in range(CV)]
    np.testing.assert_allclose(score.ratio(top, bottom), expected, rtol=1e-12)


def test_metrics_of_several_classes_equal_scikit_learn() -> None:
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


@pytest.mark.parametrize("folds", [1, 3, 10])
@pytest.mark.parametrize("classes", [2, 4])
def test_the_calibration_error_is_binned_once_over_all_folds(folds: int, classes: int) -> None:
    rng = np.random.default_rng(classes)
    raw, y = rng.normal(size=(200, classes)) * 2, rng.integers(classes, size=200)
    probability = np.exp(raw) / np.exp(raw).sum(1, keepdims=True)
    said = score.Prediction(raw.argmax(1), raw[:, 1], probability)
    top, bottom = score.parts("ece", y, said, rng.permutation(200) % folds, folds)
    sure, right = probability.max(1), probability.argmax(1) == y
    accuracy, confidence = calibration_curve(right, sure, n_bins=15)
    size = np.histogram(sure, np.linspace(0, 1, 16))[0]
    expected = np.abs(accuracy - confidence) @ size[size > 0] / 200
    assert top.sum() / bottom.sum() == pytest.approx(expected, rel=1e-12)
    assert (len(top), bottom.sum()) == (folds, 200)


def test_the_recall_threshold_lets_one_negative_in_a_hundred_pass() -> None:
    decision = np.concatenate([np.arange(300.0), [298.5, 297.5, 296.5, 100.2]])
    y = np.concatenate([np.zeros(300, int), np.ones(4, int)])
    said = score.Prediction((decision > 0).astype(int), decision)
    top, bottom = score.parts("recall@1%", y, said, np.zeros(304, int), 1)
    assert (top[0], bottom[0]) == (3, 4), "three negatives are allowed, 299, 298 and 297; 296.5 is above the fourth"
    tied = score.Prediction(said.predicted, np.where(decision > 290, 290.0, decision))
    assert score.parts("recall@1%", y, tied, np.zeros(304, int), 1)[0][0] == 0, "ties are found together"


@pytest.mark.parametrize("decimals", [0, 1, 6])
def test_the_recall_of_one_fold_lies_on_the_roc_curve_of_scikit_learn(decimals: int) -> None:
    rng = np.random.default_rng(decimals)
    y = (rng.random(700) < 0.4).astype(int)
    decision = np.round(rng.normal(size=700) + 2.5 * y, decimals)
    rate, found, _ = roc_curve(y, decision, drop_intermediate=False)
    top, bottom = score.parts("recall@1%", y, score.Prediction(y, decision), np.zeros(700, int), 1)
    assert top[0] / bottom[0] == found[rate <= 0.01].max()


def test_the_recall_threshold_is_common_to_all_folds_and_independent_of_their_scales() -> None:
    rng = np.random.default_rng(0)
    y, fold = (rng.random(1000) < 0.4).astype(int), np.arange(1000) % 5
    decision = rng.normal(size=1000) + 2 * y
    for k in range(5):  # equal location and scale, so that the pooled negatives may be ranked as they are
        negatives = decision[(fold == k) & (y == 0)]
        decision[fold == k] = (decision[fold == k] - negatives.mean()) / negatives.std()
    rate, found, _ = roc_curve(y, decision, drop_intermediate=False)
    for scaled, close in ((decision, 0), (decision * (1 + fold) - 30.0 * fold, 0.01), (decision * 10.0**fold, 0.01)):
        said = score.Prediction(y, scaled)
        top, bottom = score.parts("recall@1%", y, said, fold, 5)
        assert top.sum() / bottom.sum() == pytest.approx(found[rate <= 0.01].max(), abs=close)
        np.testing.assert_array_equal(bottom, np.bincount(fold, y))


def test_folds_that_differ_only_by_chance_are_not_rescaled() -> None:
    rng = np.random.default_rng(1)
    group = np.arange(1200) // 20
    y, fold = (np.arange(60) // 5 % 2)[group], group % 5
    decision = rng.normal(size=60)[group] + rng.normal(size=1200) + 3 * y
    rate, found, _ = roc_curve(y, decision, drop_intermediate=False)
    top, bottom = score.parts("recall@1%", y, score.Prediction(y, decision), fold, 5, group)
    assert top.sum() / bottom.sum() == pytest.approx(found[rate <= 0.01].max(), abs=0.05)


@pytest.mark.parametrize("value", [0.0, 1.0, -1e6])
def test_decisions_that_are_all_equal_find_no_positive(value: float) -> None:
    y, fold = np.arange(40) % 2, np.arange(40) // 2 % 4
    said = score.Prediction(y, np.full(40, value))
    assert not score.parts("recall@1%", y, said, fold, 4, fold)[0].any()
    drawn = score.draw_scores(["recall@1%"], y, said, fold, fold, resamples=20, seed=0)
    np.testing.assert_allclose(drawn, 0.01)
    low, high = score.interval(score.replicates(["recall@1%"], y, said, fold, fold, resamples=100, seed=0))
    assert low[0] < 0.01 < high[0]


def test_a_fold_without_negatives_has_no_recall() -> None:
    y, fold = np.array([0, 0, 1, 1, 1, 1]), np.array([0, 0, 0, 0, 1, 1])
    said = score.Prediction(y, np.array([0.0, 1, 2, 0.5, 3, 3]))
    top, bottom = score.parts("recall@1%", y, said, fold, 2)
    assert (top.tolist(), bottom.tolist()) == ([1, 0], [2, 0])
    nothing = score.parts("recall@1%", np.ones(6, int), said, fold, 2)
    assert np.isnan(score.ratio(*nothing)).all()
    assert np.isnan(score.replicates(["recall@1%"], np.ones(6, int), said, fold, fold, resamples=5, seed=0)).all()


@pytest.mark.parametrize(
    ("n", "share", "apart", "size", "sharper"),
    [(600, 0.45, 1.8, 1, 1.0), (200, 0.5, 1.8, 1, 1.0), (600, 0.1, 3.0, 1, 2.0), (1200, 0.45, 1.2, 4, 2.0)],
    ids=["many", "few", "rare", "groups"],
)
def test_intervals_of_pooled_metrics_cover_the_truth(
    n: int, share: float, apart: float, size: int, sharper: float
) -> None:
    def sample(n: int) -> tuple[np.ndarray, score.Prediction, np.ndarray]:
        group = np.arange(n) // size
        y = (rng.random(n // size) < share).astype(int)[group]
        same = rng.normal(size=n // size)[group]
        decision = (same + rng.normal(size=n)) / 2**0.5 + apart * y if size > 1 else same + apart * y
        chance = 1 / (1 + np.exp(-sharper * (apart * decision - apart**2 / 2 + np.log(share / (1 - share)))))
        return y, score.Prediction((chance > 0.5).astype(int), decision, np.stack([1 - chance, chance], 1)), group

    rng, inside = np.random.default_rng(0), []
    y, said, group = sample(200_000)
    error = score.parts("ece", y, said, np.zeros(len(y), int), 1)[0].sum() / len(y)
    truth = np.array([1 - norm.cdf(norm.ppf(0.99) - apart), error])
    for seed in range(80):
        y, said, group = sample(n)
        fold = group % 5
        drawn = score.replicates(["recall@1%", "ece"], y, said, fold, group, resamples=200, seed=seed)
        low, high = percentile_interval(drawn)
        inside.append((low <= truth) & (truth <= high))
        both = [score.parts(metric, y, said, fold, 5) for metric in ("recall@1%", "ece")]
        estimate = np.array([top.sum() / bottom.sum() for top, bottom in both])
        assert low[1] <= estimate[1] <= high[1]
    assert (np.mean(inside, axis=0) >= 0.9).all()


def test_the_band_covers_all_layers_at_once() -> None:
    rng = np.random.default_rng(0)
    truth, inside, narrow = np.linspace(0.5, 0.8, 8), 0, 0
    for _ in range(200):
        pooled = truth + 0.03 * rng.normal(size=8)
        drawn = pooled[:, None] + 0.03 * rng.normal(size=(8, 400))
        low, high = score.band(pooled, drawn)
        inside += bool(((low <= truth) & (truth <= high)).all())
        ends = percentile_interval(drawn)
        narrow += bool(((ends[0] <= truth) & (truth <= ends[1])).all())
    assert inside > 180
    assert narrow < 170


@pytest.mark.parametrize("metric", ["accuracy", "auroc"])
def test_the_bootstrap_equals_scores_of_the_drawn_groups(metric: score.Metric) -> None:
    draws, values = (
        np.concatenate([weights for _, weights in bootstrap.resample_groups(20, 50, seed=1, n_samples=N)]),
        [],
    )
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
    asked = ([metric], Y, SAID, FOLD, GROUP)
    np.testing.assert_allclose(score.draw_scores(*asked, resamples=50, seed=1)[0], values)
    assert percentile_interval(np.array(values)) == pytest.approx(tuple(np.percentile(values, [2.5, 97.5])))
    order = np.argsort(score.draw_scores(*asked, resamples=50, seed=1)[0], kind="stable")
    assert (np.diff(score.replicates(*asked, resamples=50, seed=1)[0][order]) >= 0).all()


def test_the_bootstrap_does_not_depend_on_the_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = (["auroc", "ece", "recall@1%"], Y, SAID, FOLD, GROUP)
    whole = score.replicates(*asked, resamples=40, seed=0)
    monkeypatch.setattr(bootstrap, "CHUNK", 7 * N)
    np.testing.assert_allclose(score.replicates(*asked, resamples=40, seed=0), whole)


def test_the_r2_interval_covers_its_estimate_without_bias() -> None:
    y = RNG.normal(size=N)
    predicted = y + RNG.normal(size=N)
    said = score.Prediction(predicted, predicted)
    low, high = percentile_interval(score.replicates(["r2"], y, said, FOLD, GROUP, resamples=4000, seed=0), level=0.02)
    top, bottom = score.parts("r2", y, said, FOLD, CV)
    assert (low[0] + high[0]) / 2 == pytest.approx(top.sum() / bottom.sum(), abs=0.04)


def test_a_clustered_sample_has_a_wider_interval_than_its_rows_suggest() -> None:
    right = np.repeat(RNG.integers(2, size=20), 3)  # whole groups are right or wrong
    said = score.Prediction(right, np.zeros(N))
    by_group, by_row = (
        percentile_interval(score.replicates(["accuracy"], np.ones(N, int), said, FOLD, group, resamples=500, seed=0))
        for group in (GROUP, np.arange(N))
    )
    assert np.ptp(by_group) > 1.4 * np.ptp(by_row)


def test_the_fold_interval_is_that_of_nadeau_and_bengio() -> None:
    values = np.array([0.7, 0.8, 0.9, 0.75, 0.85])
    low, high = score.fold_interval(values)
    half = student.ppf(0.975, 4) * values.std(ddof=1) * np.sqrt(1 / 5 + 1 / 4)
    assert (low, high) == pytest.approx((0.8 - half, 0.8 + half))


def test_an_undefined_metric_is_nan() -> None:
    said = score.Prediction(np.ones(4), np.arange(4.0))
    top, bottom = score.parts("auroc", np.ones(4, int), said, np.array([0, 0, 1, 1]), 2)
    assert np.isnan(score.ratio(top, bottom)).all()


def test_resamples_without_a_score_are_left_out_of_the_band() -> None:
    pooled, drawn = np.array([0.5, 0.7]), np.random.default_rng(0).normal(0.6, 0.1, (2, 400))
    some = np.concatenate([drawn, np.full((2, 30), np.nan)], axis=1)
    assert np.allclose(score.band(pooled, some), score.band(pooled, drawn))


@pytest.mark.parametrize("metric", ["accuracy", "f1", "balanced_accuracy", "log_loss", "brier", "r2"])
def test_the_pooled_value_equals_scikit_learn_on_all_held_out_samples(metric: score.Metric) -> None:
    y, said = question(metric)
    assert score.pooled(metric, y, said, FOLD, GROUP) == pytest.approx(REFERENCE[metric](y, np.ones(N, bool)), rel=1e-9)


def test_the_pooled_correlation_is_about_the_means_of_the_folds() -> None:
    y, said = question("pearson")
    middle = [np.array([v[k == FOLD].mean() for k in range(CV)])[FOLD] for v in (y, said.predicted)]
    expected = np.corrcoef(y - middle[0], said.predicted - middle[1])[0, 1]
    assert score.pooled("pearson", y, said, FOLD) == pytest.approx(expected)


def test_the_pooled_auroc_counts_all_pairs_within_a_fold() -> None:
    pairs = [
        (DECISION[i] > DECISION[j]) + (DECISION[i] == DECISION[j]) / 2
        for i in np.flatnonzero(Y == 1)
        for j in np.flatnonzero(Y == 0)
        if FOLD[i] == FOLD[j]
    ]
    assert score.pooled("auroc", Y, SAID, FOLD, GROUP) == pytest.approx(np.mean(pairs))
    one = np.zeros(N, int)
    assert score.pooled("auroc", Y, SAID, one, one) == pytest.approx(roc_auc_score(Y, DECISION))


@pytest.mark.parametrize("right", [0, 3, 11, 12])
def test_the_interval_of_independent_samples_is_close_to_the_exact_one(right: int) -> None:
    y = (np.arange(12) >= right).astype(int)
    said = score.Prediction(np.zeros(12, int), np.zeros(12))
    drawn = score.replicates(["accuracy"], y, said, np.zeros(12, int), np.arange(12), resamples=1000, seed=0)
    low, high = score.interval(drawn)
    exact = binomtest(right, 12).proportion_ci(0.95)
    assert low[0] <= exact.low + 1e-6
    assert high[0] >= exact.high - 1e-6
    assert high[0] - low[0] < (exact.high - exact.low) * 1.35


@pytest.mark.parametrize(("groups", "cv"), [(8, 4), (20, 5), (50, 5)])
def test_intervals_of_few_groups_cover_the_truth(groups: int, cv: int) -> None:
    rng, inside = np.random.default_rng(groups), []
    chosen: list[score.Metric] = ["accuracy", "auroc", "balanced_accuracy", "log_loss", "r2"]

    def sample(count: int) -> tuple[np.ndarray, score.Prediction, np.ndarray]:
        group = np.repeat(np.arange(count), 1 + rng.geometric(0.2, count))
        y = rng.permutation(np.arange(count) % 2)[group]
        shared = rng.normal(size=count)[group] + rng.normal(size=len(group))
        decision = shared / 2**0.5 + 1.5 * (y - 0.5)
        chance = 1 / (1 + np.exp(-1.5 * decision))
        return y, score.Prediction((chance > 0.5).astype(int), decision, np.stack([1 - chance, chance], 1)), group

    y, said, group = sample(100_000)
    truth = np.array([score.pooled(metric, y, said, np.zeros(len(y), int)) for metric in chosen])
    for seed in range(200):
        y, said, group = sample(groups)
        order = np.argsort(y[np.unique(group, return_index=True)[1]], kind="stable")
        fold = np.empty(groups, int)
        fold[order] = np.arange(groups) % cv
        low, high = score.interval(score.replicates(chosen, y, said, fold[group], group, resamples=100, seed=seed))
        inside.append((low <= truth) & (truth <= high))
    assert (np.mean(inside, axis=0) >= 0.93).all()


@pytest.mark.parametrize(("groups", "size"), [(8, 1), (30, 20)])
def test_the_interval_of_the_recall_covers_the_truth_for_few_groups(groups: int, size: int) -> None:
    rng, inside, truth = np.random.default_rng(groups), 0, 1 - norm.cdf(norm.ppf(0.99) - 1.8)
    for seed in range(100):
        group = np.arange(groups * size) // size
        y = (np.arange(groups) // 4 % 2)[group]
        decision = 0.7**0.5 * rng.normal(size=groups)[group] + 0.3**0.5 * rng.normal(size=len(group)) + 1.8 * y
        drawn = score.replicates(
            ["recall@1%"], y, score.Prediction(y, decision), group % 4, group, resamples=200, seed=seed
        )
        low, high = score.interval(drawn)
        inside += bool(low[0] <= truth <= high[0])
    assert inside >= 93


@pytest.mark.parametrize("sharper", [1.0, 2.0])
def test_the_debiased_calibration_error_is_that_of_many_samples(sharper: float) -> None:
    rng = np.random.default_rng(0)

    def sample(n: int) -> tuple[np.ndarray, score.Prediction]:
        raw = rng.normal(0, 1.5, n)
        y = (rng.random(n) < 1 / (1 + np.exp(-raw))).astype(int)
        chance = 1 / (1 + np.exp(-sharper * raw))
        return y, score.Prediction((raw > 0).astype(int), raw, np.stack([1 - chance, chance], 1))

    y, said = sample(400_000)
    truth = score.pooled("ece", y, said, np.zeros(len(y), int))
    drawn = [sample(600) for _ in range(60)]
    plain, debiased = (
        np.mean([score.pooled(metric, y, said, np.arange(600) % 5) for y, said in drawn])
        for metric in ("ece", "ece_debiased")
    )
    assert abs(debiased - truth) < 0.01
    assert debiased < plain - (0.02 if sharper == 1 else 0.01)


def test_a_design_effect_is_one_for_independent_samples_and_the_size_of_groups_of_equal_samples() -> None:
    values = RNG.normal(size=400)
    assert pooled_metrics.design_effect(values, np.arange(400)) == pytest.approx(1.0, abs=0.02)
    assert pooled_metrics.design_effect(np.repeat(values, 10), np.repeat(np.arange(400), 10)) == pytest.approx(10, 0.02)


def test_degrees_of_freedom_fall_with_unequal_groups_and_long_tails() -> None:
    flat = RNG.uniform(-1, 1, (40, 1))
    assert bootstrap.degrees_of_freedom(flat, np.ones(40), kurtosis=False) == pytest.approx([39.0])
    assert bootstrap.degrees_of_freedom(flat, np.r_[np.ones(39), 39.0], kurtosis=False)[0] < 4
    one = np.r_[np.zeros(39), 1.0][:, None]
    assert bootstrap.degrees_of_freedom(one, np.ones(40))[0] < 3


@pytest.mark.parametrize("groups", [8, 50])
def test_the_interval_of_a_skewed_mean_covers_it(groups: int) -> None:
    rng = np.random.default_rng(groups)
    values = rng.exponential(size=(groups, 500))
    values[0, 400:] = np.nan
    low, high = bootstrap.mean_interval(values, np.arange(groups), 200, 0)
    assert ((low <= 1) & (high >= 1)).mean() >= 0.93


def test_intervals_need_two_groups_of_each_class() -> None:
    y = np.array([0, 0, 0, 1, 1])
    said = score.Prediction(y, y.astype(float))
    asked: list[score.Metric] = ["accuracy", "auroc"]
    drawn = score.replicates(asked, y, said, np.zeros(5, int), np.array([0, 1, 2, 3, 3]), resamples=40, seed=0)
    assert np.isnan(drawn[1]).all()
    assert np.isfinite(drawn[0]).all()


def test_an_interval_without_draws_is_that_of_the_replicates() -> None:
    wanted = score.metrics("classification", 2, ranked=True, probable=True)
    asked = (wanted, Y, SAID, FOLD, GROUP)
    low, high = score.covering_interval(*asked, resamples=2000, seed=0)
    drawn = score.interval(score.replicates(*asked, resamples=2000, seed=0))
    np.testing.assert_allclose([low, high], drawn, atol=2e-3)
    assert (low < high).all()
