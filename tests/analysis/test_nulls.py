"""Distributions of the baselines of a layer over draws, compared with scikit-learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from analysis import probes, report
from analysis.dataset import targets
from analysis.dataset.probe_dataset import build_dataset
from analysis.probes.evaluation import baselines, folds
from analysis.probes.table import null_text
from flexcache.errors import AnalysisError
from tests.analysis.stores import value_store

QUICK: dict[str, Any] = {"resamples": 20, "progress": False, "mdl": False}
LAYER = ("shuffled", "random", "control")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a store of 60 documents with two tokens; their label is in layer 1, and only noise in layer 0."""
    rng = np.random.default_rng(0)
    label, values = rng.integers(2, size=60), rng.normal(size=(2, 120, 5))
    values[1, :, 0] += 4.0 * np.repeat(label, 2)
    labels = {"label": label.tolist(), "grade": (3 * label + rng.normal(size=60)).tolist()}
    return value_store(tmp_path_factory.mktemp("nulls") / "run.zarr", values, [2] * 60, labels=labels, text=True)


@pytest.fixture(scope="module")
def sweep(store: Any) -> probes.Sweep:
    return probes.sweep(store, "label", "resid_post", probes.Logistic(0.1), baselines=LAYER, nulls=20, **QUICK)


def test_each_draw_equals_scikit_learn_on_labels_drawn_anew(store: Any, sweep: probes.Sweep) -> None:
    dataset = build_dataset(store, "resid_post", "label")
    fold = folds.assign(dataset, 5, 0)
    made = {"shuffled": baselines.shuffle, "control": baselines.control}
    for arm, draw, layer in (("shuffled", 0, 0), ("shuffled", 19, 1), ("control", 7, 0)):
        X, y = dataset.read_layer(layer).astype(float), made[arm](dataset, fold, 5, [0, draw] if draw else 0)
        right = 0
        for k in range(5):
            model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, tol=1e-10))
            right += (model.fit(X[fold != k], y[fold != k]).predict(X[fold == k]) == y[fold == k]).sum()
        found = sweep.results["null_score"].sel(baseline=arm, layer=layer, metric="accuracy", draw=draw)
        assert float(found) == pytest.approx(right / 60)


def test_draws_give_intervals_p_values_and_the_spread_of_the_selectivity(sweep: probes.Sweep) -> None:
    data = sweep.results
    assert data["null_score"].sizes == {"baseline": 3, "layer": 2, "metric": len(sweep.metrics), "draw": 20}
    accuracy, probe = data["null_score"].sel(metric="accuracy"), data["pooled"].sel(arm="probe", metric="accuracy")
    for arm in LAYER:
        for layer in (0, 1):
            draws, own = accuracy.sel(baseline=arm, layer=layer).values, float(probe.sel(layer=layer))
            at = data.sel(baseline=arm, layer=layer, metric="accuracy")
            assert float(at["null_p"]) == pytest.approx((1 + (draws >= own).sum()) / 21)
            best = accuracy.sel(baseline=arm).values.max(0)
            assert float(at["null_p_corrected"]) == pytest.approx((1 + (best >= own).sum()) / 21)
            row = data.sel(arm=arm, layer=layer, metric="accuracy")
            assert float(row["pooled"]) == pytest.approx(draws.mean())
            assert float(row["score"].mean("fold")) == pytest.approx(float(row["mean"]))
            assert (float(row["ci_low"]), float(row["ci_high"])) == tuple(np.quantile(draws, [0.025, 0.975]))
            assert draws.std() > 0
    over = float(probe.sel(layer=1)) - accuracy.sel(baseline="control", layer=1).values
    assert float(data["selectivity"].sel(layer=1)) == pytest.approx(over.mean())
    assert float(data["selectivity_sd"].sel(layer=1)) == pytest.approx(over.std(ddof=1))
    assert float(data["selectivity_low"].sel(layer=1)) == pytest.approx(np.quantile(over, 0.025))
    loss = data["null_score"].sel(metric="log_loss", baseline="shuffled", layer=1).values
    own = float(data["pooled"].sel(arm="probe", metric="log_loss", layer=1))
    assert float(data["null_p"].sel(metric="log_loss", baseline="shuffled", layer=1)) == (1 + (loss <= own).sum()) / 21


def test_a_label_that_is_there_has_the_smallest_p_and_noise_has_not(sweep: probes.Sweep) -> None:
    p = sweep.results.sel(metric="accuracy", baseline="shuffled")
    assert float(p["null_p"].sel(layer=1)) == float(p["null_p_corrected"].sel(layer=1)) == pytest.approx(1 / 21)
    assert float(p["null_p"].sel(layer=0)) > 0.1
    assert float(p["null_p_corrected"].sel(layer=0)) >= float(p["null_p"].sel(layer=0))


def test_one_draw_is_the_first_of_many(store: Any, sweep: probes.Sweep) -> None:
    one = probes.sweep(store, "label", "resid_post", probes.Logistic(0.1), baselines=LAYER, **QUICK).results
    assert "null_p" not in one
    for arm in LAYER:
        first = sweep.results["null_score"].sel(baseline=arm, draw=0)
        np.testing.assert_array_equal(one["pooled"].sel(arm=arm), first)
    assert "selectivity_sd" not in one


def test_p_values_of_noise_are_uniform(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    store = value_store(
        tmp_path / "run.zarr", rng.normal(size=(30, 40, 3)), [1] * 40, labels={"label": [i % 2 for i in range(40)]}
    )
    found = probes.sweep(
        store, "label", "resid_post", probes.MassMean(), baselines="shuffled", nulls=9, select="none", **QUICK
    )
    p = found.results["null_p"].sel(metric="accuracy").values.ravel()
    assert 0.35 < p.mean() < 0.75  # a tie counts as reached, so p is somewhat too large
    assert (p <= 0.1).mean() < 0.2
    assert (found.results["null_p_corrected"].sel(metric="accuracy") > 0.1).all()


def test_draws_are_saved_and_told(sweep: probes.Sweep, store: Any, tmp_path: Path) -> None:
    sweep.save(tmp_path)
    xr.testing.assert_identical(probes.load(tmp_path).results, sweep.results)
    said = null_text(sweep.results)
    assert "20 draws at this layer" in said
    assert "shuffled labels" in said
    assert "p .048" in said
    assert "(sd)" in said
    page = report.write(store, sweep, tmp_path / "page.html").read_text("utf-8")
    assert said in page.replace("&#39;", "'")
    assert "middle 95 % of 20 draws" in page


def test_a_regression_and_a_target_of_tokens_have_draws(store: Any) -> None:
    found = probes.sweep(store, "grade", "resid_post", probes.Ridge(1.0), nulls=3, layers=1, **QUICK).results
    assert found["baseline"].values.tolist() == ["shuffled", "random"]
    assert float(found["null_p"].sel(baseline="shuffled", metric="r2").squeeze()) == 0.25
    early = targets.function("early", lambda told: told["position"] == 0)
    again = probes.sweep(store, early, "resid_post", probes.MassMean(), nulls=3, layers=1, **QUICK).results
    assert again.sizes["draw"] == 3


@pytest.mark.parametrize("nulls", [0, -1, 2.0, "20", None, True])
def test_a_number_of_draws_that_is_none_is_refused(store: Any, nulls: Any) -> None:
    with pytest.raises(AnalysisError, match="nulls cannot be used"):
        probes.sweep(store, "label", "resid_post", nulls=nulls)
