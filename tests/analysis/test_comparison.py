"""Paired comparisons of layers, sites, probes and stores, against scipy and explicit jackknives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from scipy import stats
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier

from analysis import probes
from analysis.dataset.probe_dataset import build_dataset
from analysis.probes.evaluation import folds
from analysis.probes.held_out_predictions import HeldOutPredictions
from flexcache.errors import AnalysisError
from tests.analysis.stores import value_store

QUICK: dict[str, Any] = {"resamples": 10, "progress": False, "mdl": False, "baselines": ()}


def told(path: Path, n: int = 90, shift: tuple[float, ...] = (0.4, 1.2, 2.0), **options: Any) -> Any:
    """Return a store whose layers tell the label with growing certainty; documents have one to four tokens."""
    rng = np.random.default_rng(0)
    label, lengths = rng.integers(2, size=n), [int(k) for k in rng.integers(1, 5, n)]
    values = rng.normal(size=(len(shift), sum(lengths), 4))
    values[:, :, 0] += np.array(shift)[:, None] * np.repeat(label, lengths)
    labels = {"label": [["no", "yes"][v] for v in label], "other": [int(v) for v in rng.integers(2, size=n)]}
    labels["group"] = [f"g{i // 3}" for i in range(n)]
    return value_store(path, values, lengths, labels=labels, **options)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return told(tmp_path_factory.mktemp("compared") / "run.zarr")


@pytest.fixture(scope="module")
def sweep(store: Any) -> probes.Sweep:
    return probes.sweep(store, "label", "resid_post", probes.Logistic(0.1), **QUICK)


def test_the_difference_of_two_layers_is_a_paired_t_test_over_documents(store: Any, sweep: probes.Sweep) -> None:
    found = sweep.compare(0, 2).squeeze("pair")
    held = sweep.predictions
    assert held is not None
    right = (held.predicted == build_dataset(store, "resid_post", "label").y).astype(float)
    expected = stats.ttest_rel(right[0], right[2])
    assert float(found["difference"]) == pytest.approx(right[0].mean() - right[2].mean())
    assert float(found["p"]) == pytest.approx(expected.pvalue, rel=1e-9)
    ends = expected.confidence_interval()
    assert (float(found["ci_low"]), float(found["ci_high"])) == pytest.approx((ends.low, ends.high), rel=1e-9)
    by_fold = sweep.results["score"].sel(arm="probe", metric="accuracy")
    apart = (by_fold.sel(layer=0) - by_fold.sel(layer=2)).values
    half = stats.t.ppf(0.975, 4) * apart.std(ddof=1) * np.sqrt(1 / 5 + 1 / 4)
    assert float(found["fold_high"]) - float(found["fold_low"]) == pytest.approx(2 * half)
    expected_p = 2 * stats.t.sf(abs(apart.mean()) / (half / stats.t.ppf(0.975, 4)), 4)
    assert float(found["fold_p"]) == pytest.approx(expected_p)
    assert (str(found["first"].values), str(found["second"].values)) == ("layer 0", "layer 2")
    assert float(found["first_score"]) == float(sweep.results["pooled"].sel(arm="probe", layer=0, metric="accuracy"))


def test_groups_and_auroc_are_compared_by_a_jackknife_over_groups(store: Any) -> None:
    sweep = probes.sweep(store, "label", "resid_post", probes.Logistic(0.1), rows="all", groups="group", **QUICK)
    found = sweep.compare(1, 2, metric="auroc").squeeze("pair")
    held = sweep.predictions
    assert held is not None

    def auroc(layer: int, kept: np.ndarray) -> float:
        pairs, ranked = 0, 0.0
        for k in range(5):
            at = kept & (held.fold == k)
            count = int((held.y[at] == 1).sum() * (held.y[at] == 0).sum())
            pairs, ranked = pairs + count, ranked + count * roc_auc_score(held.y[at], held.decision[layer, at])
        return ranked / pairs

    everything = np.ones(len(held.y), bool)
    assert float(found["difference"]) == pytest.approx(auroc(1, everything) - auroc(2, everything))
    left = [auroc(1, held.group != g) - auroc(2, held.group != g) for g in range(30)]
    error = np.sqrt(29 / 30 * ((np.array(left) - np.mean(left)) ** 2).sum())
    half = stats.t.ppf(0.975, 29) * error
    assert float(found["ci_high"]) - float(found["ci_low"]) == pytest.approx(2 * half)
    assert found.attrs["groups"] == 30


def test_all_pairs_are_corrected_by_holm(store: Any, sweep: probes.Sweep) -> None:
    found = probes.compare({str(layer): (sweep, layer) for layer in (0, 1, 2)})
    p = found["p"].values
    order, running, expected = np.argsort(p), 0.0, np.empty(3)
    for rank, at in enumerate(order):
        running = max(running, min(1.0, (3 - rank) * p[at]))
        expected[at] = running
    np.testing.assert_allclose(found["p_corrected"], expected)
    assert found.attrs["correction"] == "Holm, 3 comparisons"
    assert found["first"].values.tolist() == ["0", "0", "1"]
    assert (found["p_corrected"] >= found["p"]).all()


def test_the_best_layers_of_probes_and_sites_are_compared_by_their_nested_predictions(store: Any) -> None:
    kinds = {"mean": probes.MassMean(), "ridge": probes.Ridge(1.0)}
    sweeps = {
        name: found for (_, _, name), found in probes.sweeps(store, "label", "resid_post", kinds, **QUICK).items()
    }
    found = probes.compare(sweeps, metric="accuracy").squeeze("pair")
    for name, side in (("mean", "first_score"), ("ridge", "second_score")):
        assert float(found[side]) == pytest.approx(float(sweeps[name].results["best_pooled"].sel(metric="accuracy")))
    one = sweeps["mean"].compare(sweeps["ridge"], metric="accuracy").squeeze("pair")
    assert float(one["difference"]) == float(found["difference"])
    assert one.attrs["notes"] == []
    plain = probes.sweep(store, "label", "resid_post", probes.MassMean(), select="none", **QUICK)
    assert "too high" in plain.compare(sweeps["ridge"]).attrs["notes"][0]


def test_stores_of_one_corpus_have_equal_folds_and_are_paired_by_document(sweep: probes.Sweep, tmp_path: Path) -> None:
    other = told(tmp_path / "other.zarr", batch_tokens=400)
    again = probes.sweep(other, "label", "resid_post", probes.Logistic(0.1), **QUICK)
    assert sweep.predictions is not None
    assert again.predictions is not None
    assert not np.array_equal(sweep.predictions.key, again.predictions.key), "the rows are in another order"
    found = probes.compare({"a": (sweep, 2), "b": (again, 2)}).squeeze("pair")
    assert float(found["difference"]) == 0
    assert float(found["p"]) == 1
    for groups in ("document", "group"):
        orders = []
        for path in (sweep, again):
            held = probes.sweep(
                told(tmp_path / f"{groups}{len(orders)}.zarr", batch_tokens=64 + 300 * len(orders)),
                "label",
                "resid_post",
                probes.MassMean(),
                groups=groups,
                rows="all",
                layers=0,
                **QUICK,
            ).predictions
            assert path is not None
            assert held is not None
            orders.append(held.fold[np.argsort(held.key, kind="stable")])
        assert np.array_equal(*orders)


def test_folds_follow_the_corpus_and_not_the_rows(store: Any) -> None:
    dataset = build_dataset(store, "resid_post", "label")
    corpus = store.documents["source_index"].to_numpy()[dataset.source]
    assert not np.array_equal(corpus, np.sort(corpus))
    assert np.array_equal(dataset.corpus_order, np.argsort(corpus))
    split = folds.splitter(dataset, 5, 0).split(np.zeros(90), dataset.y[dataset.corpus_order])
    for k, (_, test) in enumerate(split):
        assert set(dataset.corpus_order[test]) == set(np.flatnonzero(folds.assign(dataset, 5, 0) == k))


def test_sweeps_that_cannot_be_paired_are_refused(store: Any, sweep: probes.Sweep, tmp_path: Path) -> None:
    fast = {"layers": [0, 1], **QUICK}
    cases = [
        ({"seed": 1}, "other folds"),
        ({"rows": "all"}, "samples, 90 documents in common"),
        ({"groups": "group"}, "other groups"),
        ({"cv": 4}, "other folds"),
    ]
    for options, message in cases:
        other = probes.sweep(store, "label", "resid_post", probes.MassMean(), **{**fast, **options})
        with pytest.raises(AnalysisError, match=message):
            sweep.compare(other)
    other = probes.sweep(store, "other", "resid_post", probes.MassMean(), **fast)
    with pytest.raises(AnalysisError, match=r"target 'label' and target 'other'"):
        sweep.compare(other)
    fewer = probes.sweep(told(tmp_path / "few.zarr", 60), "label", "resid_post", probes.MassMean(), **fast)
    with pytest.raises(AnalysisError, match="90 and 60 samples, 60 documents in common"):
        sweep.compare(fewer)
    with pytest.raises(AnalysisError, match="layer 7 was not probed"):
        sweep.compare(0, 7)
    with pytest.raises(AnalysisError, match="did not measure 'acuracy'"):
        sweep.compare(0, 1, metric="acuracy")
    with pytest.raises(AnalysisError, match="needs two probes"):
        sweep.compare(1, 1)
    with pytest.raises(AnalysisError, match=r"holds no predictions[\s\S]*run the sweep again"):
        sweep.compare(probes.Sweep(sweep.results))


def test_a_saved_sweep_can_be_compared(store: Any, sweep: probes.Sweep, tmp_path: Path) -> None:
    sweep.save(tmp_path / "a")
    xr.testing.assert_identical(probes.load(tmp_path / "a").compare(0, 2), sweep.compare(0, 2))
    other = probes.sweep(store, "label", "resid_post", KNeighborsClassifier(3), **QUICK)
    other.save(tmp_path / "b")
    loaded = probes.load(tmp_path / "b")
    assert loaded.coef is None
    xr.testing.assert_identical(loaded.compare(0, 1), other.compare(0, 1))


@dataclass
class Predicted:
    """Predictions of two probes that are not fitted to anything."""

    results: xr.Dataset
    predictions: HeldOutPredictions


@pytest.mark.parametrize("groups", [8, 20])
@pytest.mark.parametrize("metric", ["accuracy", "auroc"])
def test_equally_good_predictions_differ_at_the_level_of_the_test(groups: int, metric: str) -> None:
    """Errors are shared by the three samples of a group, and partly by both probes."""
    rng, found = np.random.default_rng(groups), []
    group = np.repeat(np.arange(groups), 3)
    attrs = {"layer_chosen": "given", "classes": [0, 1], "target": "label"}
    results = xr.Dataset(coords={"layer": [0, 1], "metric": ["accuracy", "auroc"]}, attrs=attrs)
    for _ in range(150):
        y = (rng.permutation(groups) % 2)[group]
        shared, own = rng.normal(size=groups), rng.normal(size=(2, groups))
        decision = 1.5 * (2 * y - 1) + (shared + own)[:, group] + 0.5 * rng.normal(size=(2, len(y)))
        held = HeldOutPredictions(
            group.astype(np.uint64), y, group % 2, group, (decision > 0).astype(np.int64), decision
        )
        told = Predicted(results, held)
        found.append(probes.compare({"a": (told, 0), "b": (told, 1)}, metric=metric).squeeze("pair"))
    covered = np.mean([float(one["ci_low"]) <= 0 <= float(one["ci_high"]) for one in found])
    assert covered >= 0.91  # 150 draws of 0.95 fall below this in 2 cases of 100
    assert np.mean([float(one["p"]) < 0.05 for one in found]) <= 0.09


def test_layers_fitted_to_other_documents_differ_at_the_level_of_the_test_over_folds(array_store: Any) -> None:
    rng, p = np.random.default_rng(1), []
    for _ in range(20):
        label = rng.permutation(30) % 2
        values = rng.normal(size=(6, 30, 4))
        values[:, :, 0] += label
        store = array_store(values, [1] * 30, label=label)
        sweep = probes.sweep(store, "label", "resid_post", probes.MassMean(), select="none", **QUICK)
        p += [sweep.compare(layer, layer + 1)["fold_p"].item() for layer in (0, 2, 4)]
    assert np.mean(np.array(p) < 0.05) < 0.12


def test_few_groups_cannot_give_a_smaller_p_than_their_signs(array_store: Any) -> None:
    label = np.arange(8) % 2
    values = np.stack([label * 10.0, (1 - label) * 0.0])[:, :, None] + np.zeros((2, 8, 1))
    values[1] = np.array([0.0, 1, 1, 0, 0, 1, 1, 0])[:, None]
    sweep = probes.sweep(
        array_store(values, [1] * 8, label=label), "label", "resid_post", probes.MassMean(), cv=2, **QUICK
    )
    assert sweep.compare(0, 1)["p"].item() == 2.0**-7
