from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure
from rich.console import Console
from scipy.stats import t as student
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.linear_model import Ridge as LeastSquares
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, log_loss, r2_score, roc_auc_score
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from analysis import probes
from flexcache.errors import AnalysisError, FlexCacheError, OutputError

QUICK = {"resamples": 20, "progress": False}


def reference(C: float = 0.01) -> Any:
    return make_pipeline(StandardScaler(), LogisticRegression(C=C, solver="newton-cholesky", tol=1e-10))


def last_rows(store: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    columns = store.columns
    return store.values["resid_post"][:, columns["row_start"] + columns["n_rows"] - 1].astype(float), columns


def test_scores_equal_scikit_learn_written_out_by_hand(make_store: Any) -> None:
    store = make_store()
    X, columns = last_rows(store)
    y, texts = (columns["label"] == "pos").astype(int), columns["text"]
    found = probes.sweep(store, "label", "resid_post", probes.Logistic(), cv=4, seed=3, **QUICK).results
    for k, (train, test) in enumerate(StratifiedKFold(4, shuffle=True, random_state=3).split(X[0], y)):
        at = found["score"].sel(fold=k)
        for layer in range(3):
            model = reference().fit(X[layer, train], y[train])
            assert at.sel(arm="probe", layer=layer, metric="accuracy") == model.score(X[layer, test], y[test])
            auroc = roc_auc_score(y[test], model.decision_function(X[layer, test]))
            assert float(at.sel(arm="probe", layer=layer, metric="auroc")) == pytest.approx(auroc, abs=1e-12)
        words = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression()).fit(texts[train], y[train])
        assert (at.sel(arm="tfidf", metric="accuracy") == words.score(texts[test], y[test])).all()
        auroc = roc_auc_score(y[test], words.decision_function(texts[test]))
        np.testing.assert_allclose(at.sel(arm="tfidf", metric="auroc"), auroc, rtol=1e-12)
        majority = DummyClassifier().fit(X[0, train], y[train]).score(X[0, test], y[test])
        assert (at.sel(arm="majority", metric="accuracy") == majority).all()
    np.testing.assert_allclose(found["mean"], found["score"].mean("fold"))


def test_grouped_multinomial_scores_on_every_row_equal_scikit_learn(make_store: Any) -> None:
    store = make_store(150, classes=3)
    columns = store.columns
    document = np.repeat(np.arange(150), columns["n_rows"])
    y, group = columns["label"][document], columns["group"][document]
    found = probes.sweep(store, "label", "resid_post", probes.Logistic(), groups="group", rows="all", **QUICK).results
    code, number = np.unique(y, return_inverse=True)[1], document // 3
    split = StratifiedGroupKFold(5, shuffle=True, random_state=0).split(y, code, number)
    for k, (train, test) in enumerate(split):
        assert not set(group[train]) & set(group[test])
        for layer in range(3):
            X = store.values["resid_post"][layer].astype(float)
            expected = accuracy_score(y[test], reference().fit(X[train], y[train]).predict(X[test]))
            assert found["score"].sel(arm="probe", layer=layer, metric="accuracy", fold=k) == expected
    named = ["accuracy", "f1", "balanced_accuracy", "log_loss", "brier", "ece", "ece_debiased"]
    assert found["metric"].values.tolist() == named
    error = found.sel(arm="probe", metric="ece")
    assert (error["ci_low"] <= error["pooled"]).all()
    assert (error["pooled"] <= error["ci_high"]).all()
    samples = found["fold_samples"] / found["fold_samples"].sum()
    np.testing.assert_allclose((error["score"] * samples).sum("fold"), error["pooled"])


def test_a_regression_equals_scikit_learn(make_store: Any) -> None:
    store = make_store()
    X, columns = last_rows(store)
    y = columns["score"]
    found = probes.sweep(store, "score", "resid_post", probes.Ridge(5.0), **QUICK).results
    for k, (train, test) in enumerate(GroupKFold(5, shuffle=True, random_state=0).split(X[0], y, np.arange(len(y)))):
        for layer in range(3):
            model = make_pipeline(StandardScaler(), LeastSquares(5.0)).fit(X[layer, train], y[train])
            at = found["score"].sel(arm="probe", layer=layer, metric="r2", fold=k)
            assert float(at) == pytest.approx(r2_score(y[test], model.predict(X[layer, test])), abs=1e-12)
    assert (found["mean"].sel(arm="majority", metric="r2") < 0).all()


def test_the_layer_is_chosen_without_the_fold_it_is_scored_on(make_store: Any) -> None:
    store = make_store(60, layers=4)
    X, columns = last_rows(store)
    y = (columns["label"] == "pos").astype(int)
    sweep = probes.sweep(store, "label", "resid_post", probes.Logistic(), metric="accuracy", **QUICK)
    fold = np.full(60, -1)
    for k, (_, test) in enumerate(StratifiedKFold(5, shuffle=True, random_state=0).split(X[0], y)):
        fold[test] = k
    chosen, right = [], []
    for k in range(5):
        inner = np.zeros(4)
        for layer, j in itertools.product(range(4), set(range(5)) - {k}):
            train = (fold != k) & (fold != j)
            model = reference().fit(X[layer, train], y[train])
            inner[layer] += (model.predict(X[layer, fold == j]) == y[fold == j]).sum()
        chosen.append(int(inner.argmax()))
        model = reference().fit(X[chosen[-1], fold != k], y[fold != k])
        right.append(model.predict(X[chosen[-1], fold == k]) == y[fold == k])
    assert sweep.best.chosen == tuple(chosen)
    assert sweep.best.score == np.concatenate(right).mean()
    np.testing.assert_array_equal(sweep.results["best_score"].sel(metric="accuracy"), [r.mean() for r in right])
    assert sweep.best.nested


def test_choosing_among_layers_of_noise_stays_at_chance_only_when_nested(array_store: Any) -> None:
    rng = np.random.default_rng(1)
    nested, plain = [], []
    for _ in range(6):
        store = array_store(rng.normal(size=(10, 60, 3)), [1] * 60, label=rng.permutation(60) % 2)
        best = probes.sweep(store, "label", "resid_post", baselines=(), metric="accuracy", **QUICK).best
        nested.append(best.score)
        plain.append(best.on_layer)
    assert np.mean(plain) > 0.56
    assert abs(np.mean(nested) - 0.5) < 0.04


def test_the_best_layer_is_marked_if_it_was_not_chosen_inside_the_folds(make_store: Any) -> None:
    sweep = probes.sweep(make_store(), "label", "resid_post", select="none", **QUICK)
    assert not sweep.best.nested
    assert sweep.best.score == sweep.best.on_layer == sweep.results["pooled"].sel(arm="probe", metric="accuracy").max()
    assert "too high" in str(sweep.best)
    two = probes.sweep(make_store(), "label", "resid_post", cv=2, **QUICK)
    assert not two.best.nested
    assert "not chosen inside the folds" in two.results.attrs["notes"][0]


def test_rows_of_a_document_leak_its_identity_unless_they_are_grouped(array_store: Any) -> None:
    rng = np.random.default_rng(0)
    documents, rows, hidden = 60, 20, 64
    centre = np.repeat(rng.normal(size=(documents, hidden)), rows, axis=0)
    values = (centre + 0.5 * rng.normal(size=centre.shape))[None]
    store = array_store(values, [rows] * documents, label=rng.permutation(documents) % 2)  # labels mean nothing
    probe = probes.Logistic(1.0)
    grouped = probes.sweep(store, "label", "resid_post", probe, rows="all", **QUICK)
    leaking = probes.sweep(store, "label", "resid_post", probe, rows="all", groups=None, **QUICK)
    at = {"arm": "probe", "layer": 0, "metric": "accuracy"}
    assert leaking.results["pooled"].sel(at) > 0.85
    assert grouped.results["ci_low"].sel(at) < 0.5 < grouped.results["ci_high"].sel(at)
    assert grouped.results["pooled"].sel(at) < 0.6
    assert "in both training and test folds" in " ".join(leaking.results.attrs["notes"])
    assert "in both training and test folds" not in " ".join(grouped.results.attrs["notes"])


def test_shuffled_labels_score_at_chance_while_the_probe_does_not(make_store: Any) -> None:
    found = probes.sweep(make_store(400), "label", "resid_post", rows="all", **QUICK).results["pooled"]
    accuracy = found.sel(metric="accuracy")
    assert (abs(accuracy.sel(arm="shuffled") - 0.5) < 0.08).all()
    assert (accuracy.sel(arm="probe", layer=[1, 2]) > 0.75).all()


def test_shuffling_keeps_a_group_of_one_value_together(array_store: Any) -> None:
    from analysis.dataset.probe_dataset import build_dataset
    from analysis.probes.evaluation import baselines, folds

    store = array_store(np.zeros((1, 120, 1)), [2] * 60, label=list("ab") * 30, group=[i // 2 for i in range(60)])
    mixed = build_dataset(store, "resid_post", "label", rows="all", groups="group")
    moved = baselines.shuffle(mixed, folds.assign(mixed, 5, 0), 5, 0).reshape(60, 2)
    assert (moved[:, 0] == moved[:, 1]).all()
    store.documents = store.documents.append_column("topic", [["x" if i % 4 < 2 else "y" for i in range(60)]])
    alike = build_dataset(store, "resid_post", "topic", rows="all", groups="group")
    moved = baselines.shuffle(alike, folds.assign(alike, 5, 0), 5, 0).reshape(30, 4)
    assert (moved == moved[:, :1]).all()
    assert (moved[:, 0] != alike.y.reshape(30, 4)[:, 0]).any()


def test_layers_are_read_one_at_a_time_and_once(make_store: Any) -> None:
    store = make_store()
    probes.sweep(store, "label", "resid_post", **QUICK)
    assert [layer for layer, size in store.reads if size > 1] == [0, 1, 2]


def test_equal_seeds_give_equal_sweeps_and_other_seeds_other_folds(make_store: Any) -> None:
    first, again, other = (
        probes.sweep(make_store(), "label", "resid_post", seed=seed, **QUICK).results for seed in (0, 0, 1)
    )
    xr.testing.assert_identical(first, again)
    assert not first["score"].equals(other["score"])


@pytest.mark.parametrize(
    "probe", [KNeighborsClassifier(3), NearestCentroid(), make_pipeline(StandardScaler(), probes.Ridge())]
)
def test_any_scikit_learn_estimator_is_a_probe(make_store: Any, probe: Any) -> None:
    before = vars(probe).copy()
    # probabilities of a few neighbours are 0 and 1, so that their log-loss says little
    metric = "accuracy" if isinstance(probe, KNeighborsClassifier) else None
    sweep = probes.sweep(make_store(), "label", "resid_post", probe, metric=metric, **QUICK)
    assert sweep.best.layer in (1, 2)
    assert sweep.best.score > 0.65
    assert vars(probe) == before


def test_a_probe_that_does_not_converge_is_an_error_with_its_place(make_store: Any) -> None:
    for probe in (LogisticRegression(C=1e9, max_iter=1), probes.Logistic(C=1e9, max_iter=1)):
        with pytest.raises(AnalysisError, match="did not converge") as raised:
            probes.sweep(make_store(), "label", "resid_post", probe, **QUICK)
        assert raised.value.where == "resid_post, layer 0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "score", "probe": probes.Logistic()}, "Logistic cannot be fitted to target 'score'"),
        ({"probe": LeastSquares()}, "Ridge cannot be fitted to target 'label'"),
        ({"probe": probes.Logistic}, "is not a probe"),
        ({"baselines": ("tfdif",)}, "did you mean tfidf"),
        ({"select": "best"}, "select cannot be 'best'"),
        ({"probe": probes.Logistic(C=-1.0)}, "C is above 0"),
        ({"cv": 200}, "fewer groups than folds"),
        ({"resample": 10}, r"sweep has no argument .resample.[\s\S]*did you mean resamples"),
    ],
)
def test_an_impossible_sweep_is_refused(make_store: Any, arguments: Any, message: str) -> None:
    with pytest.raises(AnalysisError, match=message):
        probes.sweep(make_store(), **{"target": "label", "site": "resid_post", **QUICK, **arguments})


def test_the_tfidf_baseline_is_left_out_with_a_note_if_there_are_no_words(make_store: Any) -> None:
    store = make_store()
    store.documents = store.documents.set_column(2, "text", [["?"] * 120])
    sweep = probes.sweep(store, "label", "resid_post", **QUICK)
    assert "tfidf" not in sweep.arms
    assert any("found no word" in note for note in sweep.results.attrs["notes"])
    assert any("119 documents have the same text" in note for note in sweep.results.attrs["notes"])
    store.documents = store.documents.drop_columns(["text"])
    assert "kept no texts" in probes.sweep(store, "label", "resid_post", **QUICK).results.attrs["notes"][0]


def test_saved_results_load_identically(make_store: Any, tmp_path: Any) -> None:
    saved = [
        probes.sweep(make_store(), "label", "resid_post", KNeighborsClassifier(3), cv=3, **QUICK),
        probes.sweep(make_store(), "score", "resid_post", probes.Ridge(), layers=1, **QUICK),
    ]
    saved[0].results["score"][0, 0, 0, 0] = np.nan
    for i, sweep in enumerate(saved):
        sweep.save(tmp_path / str(i))
        xr.testing.assert_identical(probes.load(tmp_path / str(i)).results, sweep.results)
        assert repr(probes.load(tmp_path / str(i))) == repr(sweep)


@pytest.mark.parametrize("content", [None, "{", "{}", '{"dims": {}, "attrs": {"format": "other"}}'])
def test_a_folder_without_a_sweep_is_an_error(tmp_path: Any, content: str | None) -> None:
    if content is not None:
        (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(AnalysisError):
        probes.load(tmp_path)


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_a_plot_is_written_in_the_format_of_its_name(store: Any, tmp_path: Any, suffix: str) -> None:
    sweep = probes.sweep(store, "label", "resid_post", **QUICK)
    sweep.plot(tmp_path / "new" / f"plot.{suffix}")
    start = (tmp_path / "new" / f"plot.{suffix}").read_bytes()[:5]
    assert start == {"png": b"\x89PNG\r", "svg": b"<?xml", "pdf": b"%PDF-"}[suffix]


def test_a_plot_draws_the_pooled_scores_into_given_axes(store: Any) -> None:
    sweep, axes = probes.sweep(store, "label", "resid_post", **QUICK), Figure().subplots()
    assert sweep.plot(axes, metric="auroc") is axes.figure
    drawn = [line.get_ydata() for line in axes.lines if len(line.get_ydata()) == 3]
    expected = sweep.results["pooled"].sel(metric="auroc")
    assert any(np.array_equal(line, expected.sel(arm="probe")) for line in drawn)
    assert any(np.array_equal(line, expected.sel(arm="shuffled")) for line in drawn)
    with pytest.raises(AnalysisError, match="did you mean auroc"):
        sweep.plot(axes, metric="auorc")


def test_the_table_shows_every_layer_and_baseline(store: Any) -> None:
    sweep = probes.sweep(store, "label", "resid_post", **QUICK)
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(sweep.table())
    console.file.close()
    text = console.export_text()
    score = float(sweep.results["pooled"].sel(arm="probe", layer=2, metric="accuracy"))
    line = next(line for line in text.splitlines() if "│ 2 │" in " ".join(line.split()))
    assert f"{score:.3f}"[1:] in line
    for words in ("majority", "TF-IDF", "length", "shuffled"):
        assert words in text
    assert "[95 % over groups]" in text


def test_a_module_path_has_one_score(array_store: Any) -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(2, size=80)
    store = array_store(rng.normal(size=(80, 4)) + 2 * label[:, None], [1] * 80, label=label)
    sweep = probes.sweep(store, "label", "model.norm", **QUICK)
    assert sweep.results["layer"].values.tolist() == [-1]
    assert sweep.best.layer is None
    assert sweep.best.nested
    assert sweep.table().row_count == 1 + len({"majority", "length"})
    sweep.plot()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"cv": cv}, "at least two folds") for cv in (2.0, "5", None, 1, True)),
        *(({"seed": seed}, "seed cannot be used") for seed in (-1, None, "x", 2**32)),
        ({"baselines": None}, "baselines cannot be None"),
        ({"baselines": 3}, "baselines cannot be read"),
        *(({"memory": memory}, "memory, in bytes, cannot be used") for memory in ("1GB", 1.5, -1, 0)),
        *(({"resamples": number}, "resamples cannot be used") for number in ("x", None, 0)),
        ({"target": None}, "not a target"),
        ({"target": np.arange(40)}, "not a target"),
    ],
)
def test_invalid_arguments_are_refused(store: Any, options: Any, message: str) -> None:
    with pytest.raises(FlexCacheError, match=message):
        probes.sweep(store, **{"target": "label", "site": "resid_post", **QUICK, **options})


def test_one_baseline_target_or_site_needs_no_list(make_store: Any) -> None:
    store = make_store()
    options: Any = {"layers": 0, "select": "none", "mdl": False, **QUICK}
    found = probes.sweeps(store, "label", "resid_post", baselines="majority", **options)
    assert list(found) == [("label", "resid_post", "probe")]
    expected = probes.sweep(store, "label", "resid_post", baselines=["majority"], **options)
    xr.testing.assert_identical(found["label", "resid_post", "probe"].results, expected.results)
    assert expected.arms == ("probe", "majority")


def test_a_sweep_that_cannot_be_saved_goes_to_a_temporary_folder(make_store: Any) -> None:
    found = probes.sweep(make_store(), "label", "resid_post", layers=0, baselines=(), mdl=False, **QUICK)
    with pytest.raises(OutputError, match="cannot be written") as caught:
        found.save("/proc/x")
    kept = str(caught.value.remedy).split()[3].rstrip(":")
    xr.testing.assert_identical(probes.load(kept).results, found.results)


@pytest.fixture
def rare(array_store: Any) -> Any:
    """Return a store in which 24 of 240 documents are of the second class, which layer 1 tells."""
    rng = np.random.default_rng(2)
    label = (rng.permutation(240) < 24).astype(int)
    values = rng.normal(size=(2, 240, 5))
    values[1] += 1.5 * label[:, None]
    return array_store(values, [1] * 240, label=label)


def test_equal_class_weights_equal_scikit_learn_and_find_the_rare_class(rare: Any) -> None:
    y, fold = np.asarray(rare.documents["label"]), np.full(240, -1)
    for k, (_, test) in enumerate(StratifiedKFold(5, shuffle=True, random_state=0).split(y[:, None], y)):
        fold[test] = k
    X = np.stack([rare.read("resid_post", layer=1, rows=slice(0, 240))]).reshape(240, 5).astype(float)
    options: Any = {"select": "none", "baselines": (), "mdl": False, **QUICK}
    found = probes.sweep(rare, "label", "resid_post", probes.Logistic(class_weight="balanced"), **options)
    predicted, probability = np.empty(240, int), np.empty(240)
    for k in range(5):
        model = make_pipeline(
            StandardScaler(), LogisticRegression(C=0.01, tol=1e-10, max_iter=5000, class_weight="balanced")
        ).fit(X[fold != k], y[fold != k])
        predicted[fold == k] = model.predict(X[fold == k])
        probability[fold == k] = model.predict_proba(X[fold == k])[:, 1]
    at = found.results["pooled"].sel(arm="probe", layer=1)
    assert float(at.sel(metric="balanced_accuracy")) == balanced_accuracy_score(y, predicted)
    assert float(at.sel(metric="f1")) == pytest.approx(f1_score(y, predicted))
    assert float(at.sel(metric="log_loss")) == pytest.approx(log_loss(y, probability), rel=1e-5)
    plain = probes.sweep(rare, "label", "resid_post", probes.Logistic(), **options)
    for metric in ("f1", "balanced_accuracy"):
        assert at.sel(metric=metric) > plain.results["pooled"].sel(arm="probe", layer=1, metric=metric) + 0.2
    with pytest.raises(AnalysisError, match="class_weight cannot be used"):
        probes.sweep(rare, "label", "resid_post", probes.Logistic(class_weight="even"), **options)


def test_uneven_classes_and_few_negatives_are_noted(rare: Any, make_store: Any) -> None:
    options: Any = {"select": "none", "baselines": (), "mdl": False, **QUICK}
    notes = " ".join(probes.sweep(rare, "label", "resid_post", **options).results.attrs["notes"])
    assert "24 of 240 samples are 1" in notes
    assert "accuracy of 0.900" in notes
    assert "recall@1%" not in notes
    notes = " ".join(probes.sweep(make_store(), "label", "resid_post", **options).results.attrs["notes"])
    assert "very different size" not in notes
    assert "negatives in" in notes


@pytest.mark.parametrize("metric", ["auroc", "log_loss"])
def test_layers_are_chosen_by_the_metric_that_is_asked_for_and_it_comes_first(make_store: Any, metric: str) -> None:
    options: Any = {"baselines": (), "mdl": False, **QUICK}
    sweep = probes.sweep(make_store(), "label", "resid_post", probes.Logistic(Cs=3), metric=metric, **options)
    curve = sweep.results["pooled"].sel(arm="probe", metric=metric).values
    assert sweep.best.layer == int(curve.argmin() if metric == "log_loss" else curve.argmax())
    assert (sweep.best.metric, sweep.metrics[0]) == (metric, metric)
    assert sweep.results.attrs["selection_metric"] == metric


def test_layers_are_chosen_by_log_loss_and_reported_by_accuracy_by_default(make_store: Any) -> None:
    options: Any = {"baselines": (), "mdl": False, **QUICK}
    default = probes.sweep(make_store(), "label", "resid_post", probes.Logistic(Cs=3), **options)
    chosen = probes.sweep(make_store(), "label", "resid_post", probes.Logistic(Cs=3), metric="log_loss", **options)
    assert default.best.metric == "accuracy"
    assert (default.best.layer, default.best.chosen) == (chosen.best.layer, chosen.best.chosen)
    np.testing.assert_array_equal(default.results["strength"], chosen.results["strength"])
    assert "by log-loss" in str(default.table().caption)
    centroid = probes.sweep(make_store(), "label", "resid_post", probes.MassMean(), **options)
    assert centroid.results.attrs["selection_metric"] == "auroc"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "ece"}, "no layer can be chosen by 'ece'"),
        ({"metric": "auorc"}, "did you mean auroc"),
        ({"metric": "r2"}, "'r2' is not measured"),
        ({"metric": "log_loss", "probe": probes.MassMean()}, "'log_loss' is not measured"),
        ({"repeats": 0}, "repeats cannot be used"),
    ],
)
def test_a_metric_that_cannot_choose_is_refused_before_any_fit(store: Any, options: Any, message: str) -> None:
    with pytest.raises(AnalysisError, match=message):
        probes.sweep(store, **{"target": "label", "site": "resid_post", **QUICK, **options})


def test_repeats_give_the_corrected_resampled_t_over_the_folds_of_all_repeats(make_store: Any) -> None:
    options: Any = {"probe": probes.Logistic(), "baselines": (), "mdl": False, **QUICK}
    single = [probes.sweep(make_store(), "label", "resid_post", seed=seed, **options).results for seed in range(3)]
    sweep = probes.sweep(make_store(), "label", "resid_post", repeats=3, **options)
    found = sweep.results
    for name, at, mean, low in (
        ("score", {"arm": "probe"}, "repeat_mean", "repeat_low"),
        ("best_score", {}, "best_repeat_mean", "best_repeat_low"),
    ):
        values = xr.concat([one[name].sel(at) for one in single], "fold").sel(metric="accuracy")
        np.testing.assert_allclose(found[mean].sel(metric="accuracy"), values.mean("fold"))
        half = student.ppf(0.975, 4) * values.std("fold", ddof=1) * np.sqrt(1 / 15 + 1 / 4)
        np.testing.assert_allclose(found[low].sel(metric="accuracy"), values.mean("fold") - half)
    for name in ("score", "pooled", "ci_low", "best_score"):
        xr.testing.assert_equal(found[name], single[0][name])
    assert "corrected resampled t" in str(sweep.table().caption)
    assert any("3 × 5 folds" in str(column.header) for column in sweep.table().columns)


def test_the_calibration_error_is_that_of_its_figure(make_store: Any) -> None:
    sweep = probes.sweep(make_store(), "label", "resid_post", probes.Logistic(1.0), baselines=(), **QUICK)
    data = sweep.results
    size = data["samples_in_bin"].values
    gaps = np.nan_to_num(np.abs(data["confidence"] - data["accuracy_in_bin"]).values)
    drawn = float(gaps @ size / size.sum())
    assert float(data["best_pooled"].sel(metric="ece")) == pytest.approx(drawn)
    said = " ".join(text.get_text() for text in probes.calibration(sweep).axes[0].texts)
    assert f"{drawn:.3f}"[1:] in said
    assert f"{float(data['best_pooled'].sel(metric='ece_debiased')):.3f}"[1:] in said
