"""The estimates behind pooled metrics, against loops over groups and the formulas of their sources."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import foldnorm, norm
from scipy.stats import t as student

from analysis.probes.evaluation import pooled_metrics

RNG = np.random.default_rng(5)
GROUP = np.repeat(np.arange(6), [1, 2, 3, 4, 5, 6])
VALUES = RNG.normal(size=len(GROUP)) + RNG.normal(size=6)[GROUP]


def squared_error_of_a_mean(influence: np.ndarray, group: np.ndarray) -> float:
    """Return the squared standard error of a mean of influences when whole groups are drawn."""
    sums = [influence[group == g].sum() for g in np.unique(group)]
    return sum((s / len(influence)) ** 2 for s in sums) * len(sums) / (len(sums) - 1)


@pytest.mark.parametrize("groups", [2, 6])
def test_mean_and_variance_have_the_errors_of_drawn_groups(groups: int) -> None:
    at = groups > GROUP
    values, group = VALUES[at], 10 * GROUP[at]
    mean, variance, mean_error, variance_error = pooled_metrics._moments(values, group)
    assert (mean, variance) == pytest.approx((values.mean(), values.var()))
    assert mean_error == pytest.approx(squared_error_of_a_mean(values - mean, group))
    assert variance_error == pytest.approx(squared_error_of_a_mean((values - mean) ** 2 - variance, group))


def test_one_group_tells_nothing_about_the_error() -> None:
    assert pooled_metrics._moments(VALUES[:4], np.zeros(4, int))[2:] == (np.inf, np.inf)


@pytest.mark.parametrize("values", [[1.0, 4.0], [0.5, 2.0, 7.0], [1.0, 1.1, 0.9, 1.0]])
def test_values_are_shrunk_as_by_dersimonian_and_laird(values: list[float]) -> None:
    error = [0.5, 0.2, 1.5, 0.4][: len(values)]
    weight = [1 / e for e in error]
    mean = sum(w * v for w, v in zip(weight, values)) / sum(weight)
    q = sum(w * (v - mean) ** 2 for w, v in zip(weight, values))
    between = max(0, (q - (len(values) - 1)) / (sum(weight) - sum(w**2 for w in weight) / sum(weight)))
    expected = [mean + between / (between + e) * (v - mean) for v, e in zip(values, error)]
    assert pooled_metrics._shrunk(np.array(values), np.array(error)) == pytest.approx(expected)


def test_a_value_of_unknown_error_becomes_the_mean_of_the_others() -> None:
    found = pooled_metrics._shrunk(np.array([1.0, 3.0, 50.0]), np.array([0.1, 0.1, np.inf]))
    assert found[2] == pytest.approx(2.0)
    assert found[:2] == pytest.approx(pooled_metrics._shrunk(np.array([1.0, 3.0]), np.array([0.1, 0.1])))
    assert pooled_metrics._shrunk(np.array([1.0, 3.0]), np.full(2, np.inf)) == pytest.approx([2.0, 2.0])


@pytest.mark.parametrize("group", [GROUP, np.arange(len(GROUP)), np.arange(len(GROUP)) % 2], ids=["6", "each", "2"])
def test_the_debiased_error_is_the_expected_size_of_shrunk_gaps(group: np.ndarray) -> None:
    n, gaps = len(GROUP), np.zeros((len(GROUP), 3))
    gaps[np.arange(n), np.arange(n) % 3] = RNG.normal(size=n) * 0.3 + np.array([0.6, 0.05, -0.4])[np.arange(n) % 3]
    found, share = gaps.mean(0), np.full(3, 1 / 3)
    noise = np.zeros(3)
    for g in np.unique(group):
        noise += ((gaps[group == g] - found).sum(0) / n) ** 2
    noise *= len(np.unique(group)) / (len(np.unique(group)) - 1)
    one_variance = max(0.0, sum(found**2 - noise) / sum(share**2))
    expected = 0.0
    for k in range(3):
        kept = one_variance * share[k] ** 2 / (one_variance * share[k] ** 2 + noise[k])
        scale = np.sqrt(kept * noise[k])
        expected += foldnorm.mean(abs(kept * found[k]) / scale, scale=scale)
    assert pooled_metrics.debiased_error(gaps, group) == pytest.approx(expected)


def test_one_group_has_no_debiased_error() -> None:
    gaps = RNG.normal(size=(8, 3))
    assert np.isnan(pooled_metrics.debiased_error(gaps, np.zeros(8, int)))
    assert np.isfinite(pooled_metrics.debiased_error(gaps, np.arange(8) // 4))


@pytest.mark.parametrize(("sizes", "shift"), [([20, 20], 0.05), ([9, 12, 15], 0.3)])
def test_the_design_effect_is_the_widened_variance_of_groups_over_that_of_samples(
    sizes: list[int], shift: float
) -> None:
    group = np.repeat(np.arange(len(sizes)), sizes)
    values = (-1.0) ** np.arange(len(group)) + shift * (group == 0)
    away = values - values.mean()
    between = sum(away[group == g].sum() ** 2 for g in range(len(sizes))) * len(sizes) / (len(sizes) - 1)
    freedom = max(1.0, sum(sizes) ** 2 / sum(s**2 for s in sizes) - 1)
    expected = between * (student.ppf(0.975, freedom) / norm.ppf(0.975)) ** 2 / (away**2).sum()
    assert 1 < expected < len(values)
    for scale in (1.0, 1e-4):
        assert pooled_metrics.design_effect(values * scale, group) == pytest.approx(expected)


def test_a_single_group_is_worth_one_sample_and_equal_values_as_many_as_there_are() -> None:
    assert pooled_metrics.design_effect(VALUES[:4], np.zeros(4, int)) == 4
    assert pooled_metrics.design_effect(np.full(6, 2.0), np.arange(6) // 2) == 1


def test_the_rate_at_a_single_negative_is_uniform() -> None:
    """The recall at 1 % is interpolated to 0 above the negative: with rate U there, it is 0.01 / U."""
    y = np.r_[0, np.ones(20_000, int)]
    standard = np.r_[0.0, np.linspace(1, 2, 20_000)]
    low, _ = pooled_metrics.recall_distributions(y, standard, np.arange(len(y)), resamples=4000, seed=0)
    for share in (0.25, 0.5, 0.75):
        assert np.quantile(low, share) == pytest.approx(0.01 / (1 - share), rel=0.08)


def test_the_recall_is_read_between_the_negatives_around_the_rate() -> None:
    """With Dirichlet weights of the gaps, the rate at each negative is their sum; many positives add little noise."""
    rng = np.random.default_rng(3)
    negatives, positives = np.sort(rng.normal(size=300))[::-1], rng.normal(size=20_000) + 2
    y, standard = np.r_[np.zeros(300, int), np.ones(20_000, int)], np.r_[negatives, positives]
    drawn = pooled_metrics.recall_distributions(y, standard, np.arange(len(y)), resamples=4000, seed=0)
    above = np.array([(positives > value).mean() for value in negatives])
    expected = np.empty((2, 4000))
    for number, weights in enumerate(rng.dirichlet(np.ones(301), 4000)):
        rates = np.cumsum(weights)[:-1]
        expected[0, number] = np.interp(0.01, np.r_[0, rates], np.r_[0, above])
        expected[1, number] = above[np.searchsorted(rates, 0.01, "right")]
    for share in (0.05, 0.3, 0.5, 0.7, 0.95):
        np.testing.assert_allclose(
            np.quantile(drawn, share, axis=1), np.quantile(expected, share, axis=1), atol=0.015, err_msg=str(share)
        )


@pytest.mark.parametrize("size", [1, 4])
def test_the_calibration_error_of_a_clear_gap_varies_as_its_mean_over_groups(size: int) -> None:
    rng = np.random.default_rng(2)
    shared = np.repeat(0.05 * rng.normal(size=200), size)
    gaps = np.stack([0.4 + shared + 0.01 * rng.normal(size=200 * size), np.zeros(200 * size)], axis=1)
    drawn = pooled_metrics.calibration_replicates(gaps, np.repeat(np.arange(200), size), resamples=4000, seed=0)
    assert drawn.mean() == pytest.approx(gaps[:, 0].mean(), abs=1e-3)
    assert drawn.std() == pytest.approx(gaps[:, 0].reshape(200, size).mean(1).std() / 200**0.5, rel=0.08)


@pytest.mark.parametrize("errors", [0.0, 2.5])
def test_half_of_the_replicates_are_without_the_error_that_noise_alone_makes(errors: float) -> None:
    """That is the mean size of the noise around the smallest gap that is compatible with the sample."""
    n = 2000
    gaps = np.random.default_rng(4).normal(size=(n, 3)) * 0.2
    error = gaps.std(0) / n**0.5
    gaps += errors * error - gaps.mean(0) + 1e-9
    gaps[:, 0] += 1  # a clear gap, so that no replicate is cut off at 0
    drawn = pooled_metrics.calibration_replicates(gaps, np.arange(n), resamples=4000, seed=0)
    smallest = max(errors - 2, 0)
    expected = (foldnorm.mean(smallest) - smallest) * error[1:].sum()
    assert (drawn[1::2] - drawn[::2]).mean() == pytest.approx(expected, rel=0.15)
    for groups, told in ((1, False), (2, True)):
        few = pooled_metrics.calibration_replicates(gaps, np.arange(n) % groups, resamples=3, seed=0)
        assert np.isfinite(few).all() == told


def test_standardised_decisions_do_not_depend_on_the_unit_of_the_decisions() -> None:
    rng = np.random.default_rng(6)
    y, group = rng.integers(2, size=90), np.arange(90) // 3
    decision = rng.normal(size=90) * (1 + group % 5) + y
    one = pooled_metrics.standardised(y, decision, group % 5, group)
    for scale in (100.0, 0.01):
        np.testing.assert_allclose(pooled_metrics.standardised(y, scale * decision + 7, group % 5, group), one)
