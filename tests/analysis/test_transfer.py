"""Probes scored on targets with other class names, layers and stores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from analysis import probes
from analysis.dataset.probe_dataset import build_dataset
from analysis.dataset.targets import DocumentTarget
from flexcache.errors import AnalysisError
from tests.analysis.stores import value_store

QUICK: dict[str, Any] = {"resamples": 20, "progress": False}
MEANING = {"fresh": "positive", "rotten": "negative"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a store whose sentiment is named in several ways."""
    rng = np.random.default_rng(0)
    sentiment = rng.integers(2, size=80)
    values = rng.normal(size=(3, 80, 6))
    values[:, :, 0] += 3.0 * sentiment
    names = {
        "label": ("negative", "positive"),
        "tomato": ("rotten", "fresh"),
        "half": ("negative", "good"),
        "number": (0, 1),
    }
    labels: dict[str, list[Any]] = {key: [pair[s] for s in sentiment] for key, pair in names.items()}
    labels["several"] = ["mixed" if i % 4 == 0 else labels["tomato"][i] for i in range(80)]
    labels["grade"] = [float(s) + 0.25 for s in sentiment]
    return value_store(tmp_path_factory.mktemp("told") / "run.zarr", values, [1] * 80, labels=labels)


@pytest.fixture(scope="module")
def sweep(store: Any) -> probes.Sweep:
    return probes.sweep(store, "label", "resid_post", probes.Logistic(0.1), baselines=(), mdl=False, **QUICK)


def auroc(store: Any, sweep: probes.Sweep, layer: int, positive: str, target: str, name: str) -> float:
    """Return the AUROC of the weights by scikit-learn, with *name* as the class that means *positive*."""
    dataset = build_dataset(store, "resid_post", target)
    truth = np.array([dataset.classes[code] == name for code in dataset.y])
    assert sweep.coef is not None
    sign = 1 if sweep.results.attrs["classes"][1] == positive else -1
    return float(roc_auc_score(truth, sign * dataset.read_layer(layer).astype(float) @ sweep.coef[layer, 0]))


def test_targets_without_a_class_in_common_are_refused(store: Any, sweep: probes.Sweep) -> None:
    for target in ("tomato", "number"):
        with pytest.raises(
            AnalysisError, match=r"no class in common[\s\S]*negative, positive[\s\S]*classes={"
        ) as raised:
            probes.transfer(sweep, store, target)
        assert "--classes" in str(raised.value.remedy)
    with pytest.raises(AnalysisError, match="only the class 'negative' in common"):
        probes.transfer(sweep, store, "half")


@pytest.mark.parametrize("classes", [MEANING, {value: key for key, value in MEANING.items()}])
def test_classes_pairs_targets_in_either_direction(store: Any, sweep: probes.Sweep, classes: Any) -> None:
    found = probes.transfer(sweep, store, "tomato", classes=classes, resamples=20)
    assert found.attrs["classes"] == MEANING
    expected = auroc(store, sweep, 1, "positive", "tomato", "fresh")
    assert float(found["score"].sel(layer=1, metric="auroc")) == pytest.approx(expected, abs=1e-12)
    assert expected > 0.95
    back = probes.sweep(store, "tomato", "resid_post", probes.Logistic(0.1), baselines=(), mdl=False, **QUICK)
    again = probes.transfer(back, store, "label", classes=classes, resamples=20)
    assert again.attrs["classes"] == {"positive": "fresh", "negative": "rotten"}
    assert float(again["score"].sel(layer=1, metric="auroc")) > 0.95


def test_the_wrong_way_round_is_what_was_asked_for(store: Any, sweep: probes.Sweep) -> None:
    found = probes.transfer(sweep, store, "tomato", classes={"fresh": "negative", "rotten": "positive"}, resamples=20)
    assert float(found["score"].sel(layer=1, metric="auroc")) < 0.05


def test_classes_without_a_pair_are_left_out_and_counted(store: Any, sweep: probes.Sweep) -> None:
    found = probes.transfer(sweep, store, "several", classes=MEANING, resamples=20)
    assert found.attrs["left_out"] == {"mixed": 20}
    assert found.attrs["samples"] == 60
    known = np.array([value != "mixed" for value in store.documents["several"].to_pylist()])
    values = np.array([value == "fresh" for value in store.documents["several"].to_pylist()])[known]
    rows = np.flatnonzero(known)
    assert sweep.coef is not None
    decision = store.read("resid_post", 2, store.documents["row_start"].to_numpy()[rows]) @ sweep.coef[2, 0]
    assert float(found["score"].sel(layer=2, metric="auroc")) == pytest.approx(roc_auc_score(values, decision))


def test_several_classes_may_mean_one(store: Any, sweep: probes.Sweep) -> None:
    pairs = MEANING | {"mixed": "negative"}
    found = probes.transfer(sweep, store, "several", classes=pairs, resamples=20)
    assert found.attrs["classes"] == pairs
    assert found.attrs["samples"] == 80
    equal = probes.transfer(sweep, store, "half", classes={"good": "positive"}, resamples=20)
    assert equal.attrs["classes"] == {"good": "positive", "negative": "negative"}


@pytest.mark.parametrize("classes", [{"fresch": "positive"}, {"fresh": "positiv"}, {"fresh": "rotten"}, {"a": "b"}])
def test_a_pair_of_names_that_are_not_classes_is_refused(store: Any, sweep: probes.Sweep, classes: Any) -> None:
    with pytest.raises(AnalysisError, match=r"not a class[\s\S]*fresh, rotten[\s\S]*negative, positive"):
        probes.transfer(sweep, store, "tomato", classes=classes)


@pytest.mark.parametrize("classes", ["fresh=positive", [("fresh", "positive")]])
def test_classes_that_are_no_mapping_are_refused(store: Any, sweep: probes.Sweep, classes: Any) -> None:
    with pytest.raises(AnalysisError, match="classes is not a mapping"):
        probes.transfer(sweep, store, "tomato", classes=classes)


def test_one_group_has_scores_and_no_intervals(store: Any, sweep: probes.Sweep) -> None:

    whole = value_store(store.path.parent / "one.zarr", np.ones((3, 80, 6)), [1] * 80, labels={"owner": ["x"] * 80})
    table = store.documents["label"].combine_chunks()
    found = probes.transfer(sweep, whole, DocumentTarget("label", lambda other: table), groups="owner", resamples=20)
    assert np.isfinite(found["score"].sel(metric=["accuracy", "auroc"])).all()
    for end in ("ci_low", "ci_high"):
        assert found[end].sel(metric=["accuracy", "auroc"]).isnull().all()


def test_a_regression_has_no_classes_to_pair(store: Any) -> None:
    grade = probes.sweep(store, "grade", "resid_post", probes.Ridge(1.0), baselines=(), task="regression", **QUICK)
    found = probes.transfer(grade, store, "number", resamples=20)
    assert (found.attrs["classes"], found.attrs["left_out"]) == ({}, {})
    with pytest.raises(AnalysisError, match="not a class"):
        probes.transfer(grade, store, "number", classes={"0": "1"})


def test_a_matrix_pairs_classes_where_their_names_differ(store: Any, sweep: probes.Sweep) -> None:
    tomato = probes.sweep(store, "tomato", "resid_post", probes.Logistic(0.1), baselines=(), mdl=False, **QUICK)
    places = {"label": (store, "label"), "tomato": (store, "tomato")}
    found = probes.transfer_matrix({"a": sweep, "b": tomato}, places, layer=1, classes=MEANING, resamples=20)
    assert (found["score"] > 0.9).all()
    with pytest.raises(AnalysisError, match="no class in common"):
        probes.transfer_matrix({"a": sweep}, {"tomato": (store, "tomato")}, layer=1, resamples=20)


def test_layers_of_a_transfer_are_given_as_everywhere(store: Any, sweep: probes.Sweep) -> None:
    for layers, expected in (("0,2", [0, 2]), (1, [1]), ("1:", [1, 2]), ([-1], [2]), (None, [0, 1, 2])):
        found = probes.transfer(sweep, store, layers=layers, resamples=20)
        assert found["layer"].values.tolist() == expected
    few = probes.sweep(store, "label", "resid_post", probes.MassMean(), layers=[0, 1], baselines=(), **QUICK)
    with pytest.raises(AnalysisError, match=r"layer 2 was not probed[\s\S]*some of 0, 1"):
        probes.transfer(few, store, layers="1,2")


def test_whole_numbers_as_floats_are_the_classes_of_the_integers(store: Any) -> None:
    """Pandas turns a column of integers with a missing value into floating-point numbers."""
    numbers = [None if i == 0 else float(v) for i, v in enumerate(store.documents["number"].to_pylist())]
    floats = DocumentTarget("floats", lambda _: numbers)
    trained = probes.sweep(store, floats, "resid_post", probes.Logistic(0.1), baselines=(), mdl=False, **QUICK)
    assert trained.results.attrs["classes"] == [0, 1]
    assert probes.transfer(trained, store, "number", resamples=20).attrs["classes"] == {"0": "0", "1": "1"}
