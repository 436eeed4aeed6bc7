"""Further measures of a sweep, and uses of its probes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import flexcache
from analysis import probes
from analysis.dataset import targets
from analysis.dataset.probe_dataset import build_dataset
from analysis.probes.evaluation import baselines, codelength, folds
from flexcache.errors import AnalysisError
from tests.analysis.stores import value_store
from tests.corpora import token_documents
from tests.models import VOCABULARY, tiny

QUICK: dict[str, Any] = {"resamples": 20, "progress": False}


def told(path: Path, n: int = 80, seed: int = 0, shift: float = 2.0, **options: Any) -> flexcache.Store:
    """Return a store of documents with one to six tokens, whose label is in layers from 1 on."""
    rng = np.random.default_rng(seed)
    lengths = [int(k) for k in rng.integers(2, 7, n)]
    label = rng.integers(2, size=n)
    values = rng.normal(size=(3, sum(lengths), 6))
    values[1:, :, 0] += shift * np.repeat(label, lengths)
    labels = {"label": [["no", "yes"][v] for v in label], "grade": [float(v) for v in label * 2.0 + rng.normal(size=n)]}
    return value_store(path, values, lengths, labels=labels, text=True, **options)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> flexcache.Store:
    return told(tmp_path_factory.mktemp("told") / "run.zarr")


@pytest.fixture(scope="module")
def sweep(store: flexcache.Store) -> probes.Sweep:
    return probes.sweep(store, "label", "resid_post", probes.Logistic(Cs=4), metric="accuracy", **QUICK)


@pytest.mark.parametrize("metric", ["accuracy", None], ids=["accuracy", "log-loss"])
def test_strengths_are_chosen_inside_the_folds(store: flexcache.Store, metric: str | None) -> None:
    Cs = [1e-3, 0.1, 10.0]
    options: Any = {"baselines": (), "mdl": False, "metric": metric, **QUICK}
    sweep = probes.sweep(store, "label", "resid_post", probes.Logistic(Cs=Cs), **options)
    dataset = build_dataset(store, "resid_post", "label")
    fold = folds.assign(dataset, 5, 0)
    for layer in range(3):
        X = dataset.read_layer(layer).astype(float)
        for k in range(5):
            inner = np.zeros(3)
            for at, C in enumerate(Cs):
                for j in set(range(5)) - {k}:
                    train = (fold != k) & (fold != j)
                    model = make_pipeline(StandardScaler(), LogisticRegression(C=C, tol=1e-10, max_iter=2000))
                    model.fit(X[train], dataset.y[train])
                    test = fold == j
                    if metric == "accuracy":
                        inner[at] += (model.predict(X[test]) == dataset.y[test]).sum()
                    else:
                        inner[at] -= log_loss(dataset.y[test], model.predict_proba(X[test]), normalize=False)
            chosen = Cs[int(inner.argmax())]
            assert float(sweep.results["strength"].sel(layer=layer, fold=k)) == chosen
            model = make_pipeline(StandardScaler(), LogisticRegression(C=chosen, tol=1e-10, max_iter=2000))
            expected = model.fit(X[fold != k], dataset.y[fold != k]).score(X[fold == k], dataset.y[fold == k])
            got = sweep.results["score"].sel(arm="probe", layer=layer, fold=k, metric="accuracy")
            assert float(got) == pytest.approx(expected)


def test_reading_in_blocks_gives_the_same_sweep(store: flexcache.Store, sweep: probes.Sweep) -> None:
    options: Any = {"metric": "accuracy", "memory": 1000, **QUICK}
    again = probes.sweep(store, "label", "resid_post", probes.Logistic(Cs=4), **options)
    assert again.coef is not None
    assert sweep.coef is not None
    np.testing.assert_allclose(again.coef, sweep.coef, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(again.results["pooled"], sweep.results["pooled"], atol=1e-6)
    with pytest.raises(AnalysisError, match="needs all samples in memory"):
        probes.sweep(store, "label", "resid_post", probes.MLP(epochs=1), memory=1000, **QUICK)


@pytest.mark.parametrize(
    "probe", [probes.MassMean(), probes.LDA(shrinkages=3), probes.MLP(8, epochs=3), probes.INLP(2)]
)
def test_every_kind_of_probe_can_be_swept(store: flexcache.Store, probe: Any) -> None:
    found = probes.sweep(store, "label", "resid_post", probe, **QUICK)
    assert found.best.layer in (1, 2) or isinstance(probe, probes.MLP)
    assert ("log_loss" in found.metrics) == hasattr(probe, "predict_proba")


def test_attention_over_tokens_can_be_swept(tmp_path: Path) -> None:
    probe = probes.AttentionPooled(epochs=60, learning_rate=2e-2)
    found = probes.sweep(
        told(tmp_path / "run.zarr", 150, shift=4.0), "label", "resid_post", probe, rows="tokens", layers=1, **QUICK
    )
    assert found.best.score > 0.85
    assert "random" not in found.arms


def test_the_codelength_equals_that_of_probes_fitted_one_after_another(store: flexcache.Store) -> None:
    sweep = probes.sweep(store, "label", "resid_post", probes.Logistic(0.1), baselines=(), **QUICK)
    dataset = build_dataset(store, "resid_post", "label")
    parts = codelength.prefixes(dataset, 0)
    assert parts is not None
    assert (parts.sets.sum(1)[1:] == parts.sets.sum(1)[:-1] + parts.nexts.sum(1)[:-1]).all()
    assert (parts.sets[-1] | parts.nexts[-1]).all()
    X = dataset.read_layer(2).astype(float)
    bits = float(parts.sets[0].sum())
    for held, following in zip(parts.sets, parts.nexts):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, tol=1e-10, max_iter=2000))
        chance = model.fit(X[held], dataset.y[held]).predict_proba(X[following])
        bits -= np.log2(chance[np.arange(following.sum()), dataset.y[following]]).sum()
    assert float(sweep.results["codelength"].sel(layer=2)) == pytest.approx(bits, rel=1e-5)
    compression = sweep.results["compression"]
    assert float(compression.sel(layer=2)) == pytest.approx(80 / bits, rel=1e-5)
    assert float(compression.sel(layer=0)) < float(compression.sel(layer=2))


def test_the_codelength_mixes_strengths_without_labels_that_are_still_to_be_coded(store: flexcache.Store) -> None:
    """The probability of each label is the mean over strengths, weighted by what each gave to the labels before."""
    Cs = [1e-4, 1e-2, 1.0]
    sweep = probes.sweep(store, "label", "resid_post", probes.Logistic(Cs=Cs), layers=1, baselines=(), **QUICK)
    dataset = build_dataset(store, "resid_post", "label")
    parts = codelength.prefixes(dataset, 0)
    assert parts is not None
    X = dataset.read_layer(1).astype(float)
    weight, bits, alone = np.full(3, 1 / 3), float(parts.sets[0].sum()), np.full(3, float(parts.sets[0].sum()))
    for held, following in zip(parts.sets, parts.nexts):
        models = [make_pipeline(StandardScaler(), LogisticRegression(C=C, tol=1e-10, max_iter=2000)) for C in Cs]
        chances = [model.fit(X[held], dataset.y[held]).predict_proba(X[following]) for model in models]
        for sample, label in enumerate(dataset.y[following]):
            each = np.array([chance[sample, label] for chance in chances])
            bits -= np.log2(weight @ each)
            alone -= np.log2(each)
            weight = weight * each / (weight @ each)
    assert sweep.results["codelength"].item() == pytest.approx(bits, rel=1e-5)
    assert alone.min() < bits < alone.min() + np.log2(3)


def test_a_control_task_gives_equal_labels_to_equal_tokens(store: flexcache.Store) -> None:
    dataset = build_dataset(store, "resid_post", "label", rows="all")
    fold = folds.assign(dataset, 5, 0)
    drawn = baselines.control(dataset, fold, 5, 0)
    token = np.asarray(store.coordinates["token_id"].values)[dataset.row]
    assert all(len(set(drawn[token == kind])) == 1 for kind in set(token))
    assert len(set(drawn)) == 2
    with pytest.raises(AnalysisError, match="samples of one token each"):
        baselines.control(build_dataset(store, "resid_post", "label", rows="mean"), fold, 5, 0)


def test_memorised_tokens_have_no_selectivity(tmp_path: Path) -> None:
    """Activations that encode only the token id, so that any labelling of tokens is equally easy."""
    rng = np.random.default_rng(0)
    lengths = [12] * 60
    tokens = rng.integers(0, 8, sum(lengths))
    documents = [{"id": str(i), "tokens": tokens[12 * i : 12 * i + 12].tolist()} for i in range(60)]
    with flexcache.record(
        tmp_path / "run.zarr", documents, sites={"resid_post": (1, 8)}, model="x", dtype="float32"
    ) as to:
        for batch in to.batches():
            ids = np.asarray(to.store.coordinates["token_id"].values)[batch.rows]
            to.put("resid_post", np.eye(8)[ids] + 0.01 * rng.normal(size=(len(ids), 8)), rows=batch.rows, layer=0)
    store = flexcache.open(tmp_path / "run.zarr")
    even = targets.function("even", lambda told: told["token_id"] % 2 == 0)
    found = probes.sweep(store, even, "resid_post", probes.Logistic(1.0), **QUICK)
    assert float(found.results["pooled"].sel(arm="probe", metric="accuracy").squeeze()) > 0.99
    assert abs(float(found.results["selectivity"].squeeze())) < 0.01


def test_a_random_direction_and_the_length_predict_little(sweep: probes.Sweep) -> None:
    pooled = sweep.results["pooled"].sel(metric="accuracy")
    for arm in ("random", "length", "tokens", "shuffled"):
        assert float(pooled.sel(arm=arm, layer=2)) < 0.75
    assert float(pooled.sel(arm="probe", layer=1)) > 0.8


def test_a_direction_equals_the_probe_fitted_to_all_documents(
    store: flexcache.Store, sweep: probes.Sweep, tmp_path: Path
) -> None:
    dataset = build_dataset(store, "resid_post", "label")
    direction = sweep.to_direction(2)
    strength = float(sweep.results["final_strength"].sel(layer=2))
    X = dataset.read_layer(2).astype(float)
    alone = probes.Logistic(strength).fit(X, np.array(dataset.classes)[dataset.y])
    np.testing.assert_allclose(direction.score(X), alone.decision_function(X), atol=1e-5)
    assert np.linalg.norm(direction.unit) == pytest.approx(1)
    np.testing.assert_allclose(direction.score_store(store, dataset.row), direction.score(X))
    assert len(direction.score_store(store, block=7)) == store.n_rows
    saved = probes.load_direction(direction.save(tmp_path / "deep" / "er" / "d.safetensors"))
    assert np.array_equal(saved.vector, direction.vector)
    assert (saved.bias, saved.site, saved.layer, saved.provenance) == (
        direction.bias,
        "resid_post",
        2,
        direction.provenance,
    )
    with pytest.raises(AnalysisError, match="layer 9 was not probed"):
        sweep.to_direction(9)
    with pytest.raises(AnalysisError, match="cannot be read"):
        probes.load_direction(tmp_path / "none.safetensors")
    trees = probes.sweep(store, "label", "resid_post", probes.MLP(4, epochs=1), baselines=(), layers=1, **QUICK)
    with pytest.raises(AnalysisError, match="has no direction"):
        trees.to_direction()


def test_weights_are_saved_and_loaded(sweep: probes.Sweep, tmp_path: Path) -> None:
    sweep.save(tmp_path)
    again = probes.load(tmp_path)
    assert again.coef is not None
    assert np.array_equal(again.coef, sweep.coef)
    assert {path.name for path in tmp_path.iterdir()} == {"sweep.json", "weights.safetensors"}
    (tmp_path / "weights.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(AnalysisError, match="weights cannot be read"):
        probes.load(tmp_path)


def test_transfer_scores_the_saved_weights_on_another_store(sweep: probes.Sweep, store: Any, tmp_path: Path) -> None:
    other = told(tmp_path / "other.zarr", 60, seed=5)
    found = probes.transfer(sweep, other, resamples=50)
    dataset = build_dataset(other, "resid_post", "label")
    assert sweep.coef is not None
    assert sweep.intercept is not None
    for layer in range(3):
        said = dataset.read_layer(layer).astype(float) @ sweep.coef[layer, 0] + sweep.intercept[layer, 0] > 0
        assert float(found["score"].sel(layer=layer, metric="accuracy")) == (said == dataset.y).mean()
    assert (found["ci_low"] <= found["score"]).all()
    first = build_dataset(other, "resid_post", "label", rows="first").read_layer(0).astype(float)
    expected = roc_auc_score(dataset.y, first @ sweep.coef[0, 0])
    at_first = probes.transfer(sweep, other, rows="first", layers=0, resamples=20)["score"].sel(metric="auroc")
    assert float(at_first[0]) == pytest.approx(expected)
    assert float(at_first[0]) != pytest.approx(float(found["score"].sel(layer=0, metric="auroc")))
    across = probes.transfer(sweep, other, across=True, resamples=20)
    assert across["score"].sizes == {"trained": 3, "tested": 3, "metric": len(sweep.metrics)}
    assert float(across["score"].sel(trained=1, tested=2, metric="accuracy")) > 0.7, "the label is in the same dim"
    assert np.allclose(np.diag(across["score"].sel(metric="accuracy")), found["score"].sel(metric="accuracy"))
    matrix = probes.transfer_matrix({"a": sweep}, {"own": (store, "label"), "other": (other, "label")}, resamples=20)
    assert float(matrix["score"].sel(trained="a", tested="own")) >= 0.9
    probes.transfer_map(matrix, tmp_path / "matrix.png")
    with pytest.raises(AnalysisError, match="no class in common"):
        probes.transfer(sweep, other, targets.coordinate("token_id"), rows="all", resamples=20)


def test_a_site_without_layers_is_swept_and_transferred(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    documents = [{"id": str(i), "tokens": [1, 2], "label": i % 2} for i in range(60)]
    sites = {"a": 4, "b": (3, 4)}
    with flexcache.record(tmp_path / "a.zarr", documents, sites=sites, model="m", dtype="float32") as recorder:
        label = np.repeat(np.arange(60) % 2, 2)
        for batch in recorder.batches():
            values = rng.normal(size=(len(batch.rows), 4)) + 2.0 * label[batch.rows, None]
            recorder.put("a", values, rows=batch.rows)
            for layer in range(3):
                recorder.put("b", values * (layer == 2), rows=batch.rows, layer=layer)
    store = flexcache.open(tmp_path / "a.zarr")
    sweep = probes.sweep(store, "label", "a", probes.Ridge(), **QUICK)
    assert sweep.best.layer is None
    assert (sweep.results["chosen_layer"] == -1).all()
    matrix = probes.transfer_matrix({"a": sweep}, {"own": (store, "label")}, resamples=20)
    assert float(matrix["score"][0, 0]) == float(probes.transfer(sweep, store, resamples=20)["score"][0, 0]) > 0.8
    assert len(probes.transfer(sweep, store, layers="all", resamples=20)["layer"]) == 1
    layered = probes.sweep(store, "label", "b", probes.Ridge(), **QUICK)
    best = probes.transfer_matrix({"b": layered}, {"own": (store, "label")}, resamples=20)
    assert float(best["score"][0, 0]) == float(probes.transfer(layered, store, resamples=20)["score"][2, 0])


def test_probes_of_another_model_are_refused(tmp_path: Path) -> None:
    documents = [dict(d, label=i % 2) for i, d in enumerate(token_documents([4] * 24, vocabulary=VOCABULARY))]
    model = tiny("llama")
    first = flexcache.capture(model, None, documents, tmp_path / "a.zarr", progress=False)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    second = flexcache.capture(model, None, documents, tmp_path / "b.zarr", progress=False)
    sweep = probes.sweep(first, "label", "resid_post", probes.Ridge(), cv=3, layers=1, **QUICK)
    assert len(probes.transfer(sweep, first, resamples=5)["layer"]) == 1
    with pytest.raises(AnalysisError, match="another model"):
        probes.transfer(sweep, second)


def test_a_live_model_is_scored_as_its_store(tmp_path: Path) -> None:
    documents = [dict(d, label=i % 2) for i, d in enumerate(token_documents([4, 7] * 12, vocabulary=VOCABULARY))]
    model = tiny("llama")
    store = flexcache.capture(model, None, documents, tmp_path / "a.zarr", progress=False)
    direction = probes.sweep(store, "label", "resid_post", probes.Ridge(), cv=3, **QUICK).to_direction(2)

    class Batch(dict[str, torch.Tensor]):
        def to(self, _: Any) -> Batch:
            return self

    def tokenizer(text: str, return_tensors: str) -> Batch:
        return Batch(input_ids=torch.tensor([documents[int(text)]["tokens"]]))

    live = direction.score_model(model, tokenizer, ["3", "8"])
    for number, scores in zip((3, 8), live):
        rows = store.rows(document=documents[number]["id"])
        np.testing.assert_allclose(scores, direction.score_store(store, rows), atol=1e-3)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(AnalysisError, match="another model than the one"):
        direction.score_model(model, tokenizer, ["3"])
    (allowed,) = direction.score_model(model, tokenizer, ["3"], allow_changed_model=True)
    np.testing.assert_array_equal(allowed, live[0])


def test_positions_are_swept_one_by_one_and_plotted(store: flexcache.Store, tmp_path: Path) -> None:
    found = probes.by_position(
        store, "label", "resid_post", probes.Ridge(), positions=[0, 1, -1], baselines=("majority",), **QUICK
    )
    assert found["pooled"].sizes == {"position": 3, "layer": 3}
    alone = probes.sweep(store, "label", "resid_post", probes.Ridge(), rows=1, **QUICK)
    expected = alone.results["pooled"].sel(arm="probe", metric="accuracy").values
    assert np.array_equal(found["pooled"].sel(position=1), expected)
    assert found.attrs["metric"] == alone.metrics[0]
    probes.heat_map(found, tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 1000


def test_confusion_and_calibration_use_the_nested_predictions(sweep: probes.Sweep, tmp_path: Path) -> None:
    table = sweep.results["confusion"].values
    assert table.sum() == 80
    assert np.trace(table) / 80 == pytest.approx(sweep.best.score)
    sizes = sweep.results["samples_in_bin"].values
    assert sizes.sum() == 80
    right = np.nansum(sweep.results["accuracy_in_bin"].values * sizes) / 80
    assert right == pytest.approx(sweep.best.score)
    probes.confusion(sweep, tmp_path / "c.png")
    probes.calibration(sweep, tmp_path / "d.svg")
    with pytest.raises(AnalysisError, match="no probabilities"):
        probes.calibration(probes.Sweep(sweep.results.drop_vars("confidence")))


def test_warnings_about_the_data_are_in_the_notes(tmp_path: Path) -> None:
    few = told(tmp_path / "few.zarr", 12, shift=4.0)
    notes = " ".join(probes.sweep(few, "label", "resid_post", probes.Ridge(), cv=2, **QUICK).results.attrs["notes"])
    assert "Classes in fewer than 10 groups" in notes
    wide = value_store(
        tmp_path / "w.zarr", np.zeros((1, 40, 50)), [2] * 20, labels={"label": [i % 2 for i in range(20)]}
    )
    notes = " ".join(
        probes.sweep(wide, "label", "resid_post", probes.MassMean(), cv=2, baselines=(), **QUICK).results.attrs["notes"]
    )
    assert "20 samples of 50 features" in notes
