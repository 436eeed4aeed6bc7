"""Simulated coverage of every 95 % interval of probe scores, by number of groups.

    python -m benchmarks.interval_coverage [--rounds 300] [--seed 0]

Prints the table of `docs/probes.md`; 300 rounds take about ten minutes on one core. Each round draws groups of 1 to 20
samples (geometric, 6 on average) whose decisions share a normal effect, half of the variance. Labels belong to groups,
in equal numbers of both classes. Folds hold whole groups: 4 folds of 8 groups, otherwise 5. (1) The predictor is fixed,
and the truth is its score on 300,000 samples: coverage of ``ci_low, ci_high``, and of the band over 6 layers. (2)
Logistic probes are trained in each fold on 10 features, of which one tells the class. The truth of ``ci_low, ci_high``
is the accuracy of these probes on 2,000 new groups; that of ``fold_low, fold_high`` and of ``repeat_low, repeat_high``
of 5 repeats is the mean accuracy of such probes over training sets. (3) Means of a replay over documents in groups,
with exponential effects.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from analysis.probes import score
from analysis.probes.estimators.design import Design
from analysis.probes.estimators.logistic import Logistic
from analysis.probes.evaluation.layer_scores import LEAST
from analysis.statistics.bootstrap import mean_interval

GROUPS = (8, 20, 50, 100, 400)
CLASSES: tuple[score.Metric, ...] = (*score.metrics("classification", 2, ranked=True, probable=True),)
NUMBERS: tuple[score.Metric, ...] = score.metrics("regression", 0, ranked=True, probable=False)
APART, LAYERS, FEATURES, REPEATS = 1.5, 6, 10, 5
Sample = tuple[NDArray, score.Prediction, NDArray[np.int64]]


def draw_groups(rng: np.random.Generator, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the group of each sample, and its class."""
    group = np.repeat(np.arange(count), np.minimum(rng.geometric(1 / 6, count), 20))
    return group, rng.permutation(np.arange(count) % 2)[group]


def share_effects(rng: np.random.Generator, group: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return normal values of variance 1, half of which the samples of a group share."""
    return np.asarray((rng.normal(size=group.max() + 1)[group] + rng.normal(size=len(group))) / 2**0.5)


def draw_classes(rng: np.random.Generator, count: int, noise: float = 0.0) -> Sample:
    """Return a sample for a fixed calibrated predictor of two classes."""
    group, y = draw_groups(rng, count)
    decision = share_effects(rng, group) + APART * (y - 0.5) + noise * rng.normal(size=len(y))
    chance = 1 / (1 + np.exp(-APART * decision / (1 + noise**2)))
    return y, score.Prediction((chance > 0.5).astype(int), decision, np.stack([1 - chance, chance], 1)), group


def draw_numbers(rng: np.random.Generator, count: int) -> Sample:
    """Return a sample for a fixed predictor of a number."""
    group, _ = draw_groups(rng, count)
    y = share_effects(rng, group)
    value = 0.6 * y + 0.5 * share_effects(rng, group)
    return y, score.Prediction(value, value), group


def assign_folds(rng: np.random.Generator, y: NDArray, group: NDArray[np.int64], stratified: bool) -> NDArray[np.int64]:
    """Return a fold for each sample, with whole groups and equal classes in each."""
    count = int(group.max()) + 1
    order = rng.permutation(count)
    if stratified:
        order = order[np.argsort(y[np.unique(group, return_index=True)[1]][order], kind="stable")]
    fold = np.empty(count, np.int64)
    fold[order] = np.arange(count) % (4 if count < 10 else 5)
    return fold[group]


def cover_scores(rng: np.random.Generator, count: int, rounds: int) -> dict[str, float]:
    """Return the coverage of the interval of each metric, for a fixed predictor."""
    found: dict[str, float] = {}
    for draw, metrics in ((draw_classes, CLASSES), (draw_numbers, NUMBERS)):
        y, said, _ = draw(rng, 50_000)
        whole = np.zeros(len(y), np.int64)
        named = ["ece" if metric == "ece_debiased" else metric for metric in metrics]  # both estimate this value
        truth = np.array([score.pooled(metric, y, said, whole) for metric in named])  # type: ignore[arg-type]
        inside = np.zeros(len(metrics))
        for seed in range(rounds):
            y, said, group = draw(rng, count)
            fold = assign_folds(rng, y, group, metrics is CLASSES)
            low, high = score.interval(score.replicates(metrics, y, said, fold, group, resamples=200, seed=seed))
            inside += (low <= truth) & (truth <= high)
        found |= dict(zip(metrics, inside / rounds, strict=True))
    return found


def cover_band(rng: np.random.Generator, count: int, rounds: int) -> dict[str, float]:
    """Return the coverage of the band of the accuracy over layers, whose predictors differ by their noise."""
    truth = np.empty(LAYERS)
    inside = 0
    noises = np.linspace(0, 2, LAYERS)
    for layer, noise in enumerate(noises):
        y, said, _ = draw_classes(rng, 30_000, noise)
        truth[layer] = (y == said.predicted).mean()
    for seed in range(rounds):
        group, y = draw_groups(rng, count)
        fold, base = assign_folds(rng, y, group, stratified=True), share_effects(rng, group) + APART * (y - 0.5)
        value, drawn = [], []
        for noise in noises:
            decision = base + noise * rng.normal(size=len(y))
            said = score.Prediction((decision > 0).astype(int), decision)
            value.append(score.pooled("accuracy", y, said, fold, group))
            drawn.append(score.replicates(["accuracy"], y, said, fold, group, resamples=400, seed=seed)[0])
        low, high = score.band(np.array(value), np.array(drawn))
        inside += bool(((low <= truth) & (truth <= high)).all())
    return {"band over layers": inside / rounds}


def cover_training(rng: np.random.Generator, count: int, rounds: int) -> dict[str, float]:
    """Return the coverage of the accuracy of trained probes: of these over groups, of others over folds and repeats."""
    probe, away = Logistic(C=0.1), np.eye(FEATURES)[0]
    made, own = [], []
    for _ in range(rounds):
        group, y = draw_groups(rng, count)
        X = np.stack([share_effects(rng, group) for _ in range(FEATURES)], 1) + np.outer(APART * (y - 0.5), away)
        by_fold = []
        for repeat in range(REPEATS):
            fold = assign_folds(rng, y, group, stratified=True)
            cv = int(fold.max()) + 1
            solved = probe.solve(Design(X), y[:, None] * 1.0, fold != np.arange(cv)[:, None], np.array([0.1]))
            decision = (X @ solved.coef[:, 0, 0].T + solved.intercept[:, 0, 0])[np.arange(len(y)), fold]
            said = score.Prediction((decision > 0).astype(int), decision)
            by_fold.append(score.ratio(*score.parts("accuracy", y, said, fold, cv)))
            if repeat == 0:
                ends = score.interval(score.replicates(["accuracy"], y, said, fold, group, resamples=200, seed=0))
                new_group, new = draw_groups(rng, 2000)
                Z = np.stack([share_effects(rng, new_group) for _ in range(FEATURES)], 1)
                Z += np.outer(APART * (new - 0.5), away)
                reached = (Z @ solved.coef[:, 0, 0].T + solved.intercept[:, 0, 0] > 0) == (new[:, None] == 1)
                own.append(reached.mean())
        folds = np.array(by_fold)
        over = score.fold_interval(folds[0]), score.fold_interval(folds.ravel(), cv=cv)
        made.append([(float(ends[0][0]), float(ends[1][0])), *((float(low), float(high)) for low, high in over)])
    truth = np.stack([np.array(own), *[np.full(rounds, np.mean(own))] * 2], axis=1)
    found = np.array(made)
    inside = ((found[..., 0] <= truth) & (truth <= found[..., 1])).mean(0)
    if count < LEAST * cv:  # a sweep has no interval over folds then
        inside[1:] = np.nan
    names = ("these trained probes, over groups", "other trained probes, over folds", "other trained probes, repeats")
    return dict(zip(names, inside.tolist(), strict=True))


def cover_means(rng: np.random.Generator, count: int, rounds: int) -> dict[str, float]:
    """Return the coverage of the mean effect of a replay, over documents in groups, with exponential effects."""
    group, _ = draw_groups(rng, count)
    values = rng.exponential(size=(count, rounds))[group] / 2 + rng.exponential(size=(len(group), rounds)) / 2
    low, high = mean_interval(values, group, 400, 0)
    return {"mean effect of a replay": float(((low <= 1) & (high >= 1)).mean())}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    columns = []
    for count in GROUPS:
        rounds = asked.rounds if count < 400 else max(asked.rounds // 2, 1)
        columns.append(
            cover_scores(np.random.default_rng([asked.seed, count, 0]), count, rounds)
            | cover_band(np.random.default_rng([asked.seed, count, 1]), count, rounds)
            | cover_training(np.random.default_rng([asked.seed, count, 2]), count, rounds)
            | cover_means(np.random.default_rng([asked.seed, count, 3]), count, 2 * rounds)
        )
        print(f"{count} groups: {columns[-1]}", flush=True)
    print("| interval of 95 % | " + " | ".join(f"{count} groups" for count in GROUPS) + " |")
    print("|---|" + "---|" * len(GROUPS))
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(_share(column[name]) for column in columns) + " |")


def _share(value: float) -> str:
    if np.isnan(value):
        return "–"
    return f"{value:.3f}"[1:] if value < 0.9995 else "1"


if __name__ == "__main__":
    main()
