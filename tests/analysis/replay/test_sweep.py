from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import scipy.stats
import torch
import xarray as xr
from scipy.special import log_softmax

import flexcache
from analysis import replay
from analysis.replay import Engine
from analysis.replay.metrics import Outcome
from analysis.replay.sweeps.charts import make_charts
from flexcache.errors import AnalysisError, MismatchError, StoreError
from tests.analysis.replay.test_engine import REPLAYED
from tests.corpora import token_documents
from tests.models import DEPTH, HIDDEN, VOCABULARY, tiny

Captured = Callable[..., Any]
DOCUMENTS = token_documents([6] * 9, vocabulary=VOCABULARY)
QUIET: dict[str, Any] = {"progress": False}


@pytest.fixture
def made(captured: Captured) -> tuple[Any, Any]:
    return captured(documents=DOCUMENTS, batch_tokens=30)


def donors() -> dict[str, str]:
    ids = [document["id"] for document in DOCUMENTS]
    return dict(zip(ids, ids[1:] + ids[:1]))


def logits(model: Any, document: dict[str, Any], layer: int = -1, edit: Any = None) -> np.ndarray:
    """Return the logits of one document in a plain forward, with a block's output edited by a plain hook."""
    handle = None
    if edit is not None:
        handle = model.model.layers[layer].register_forward_hook(lambda _, args, output: edit(output.clone()))
    with torch.no_grad():
        found = model(torch.tensor([document["tokens"]])).logits[0].double().numpy()
    if handle:
        handle.remove()
    return found


def test_metrics_equal_those_of_plain_forwards(made: Any) -> None:
    store, model = made
    metrics = ["kl", "loss", "loss_change", "logit_diff", "logit_diff_change", "prob", "rank", "flips"]
    at = replay.grid(layers=[1, 2], positions=[2, "last"])
    r = replay.sweep(store, model, at, replay.Zero(), metrics, answers=(7, 9), **QUIET)
    assert r.results["value"].dims == ("arm", "layer", "position", "edit", "alpha", "document", "metric")

    for layer in (1, 2):
        for label, place in (("2", 2), ("last", -1)):
            for document in DOCUMENTS[:4]:

                def zero(values: torch.Tensor, place: int = place) -> torch.Tensor:
                    values[:, place] = 0
                    return values

                before, after = logits(model, document), logits(model, document, layer, zero)
                p, q = log_softmax(before, -1), log_softmax(after, -1)
                following = document["tokens"][1:]
                losses = [-values[np.arange(len(following)), following].mean() for values in (p, q)]
                expected = {
                    "kl": (np.exp(p) * (p - q)).sum(-1).mean(),
                    "loss": losses[1],
                    "loss_change": losses[1] - losses[0],
                    "logit_diff": after[-1, 7] - after[-1, 9],
                    "logit_diff_change": after[-1, 7] - after[-1, 9] - before[-1, 7] + before[-1, 9],
                    "prob": np.exp(q[-1, 7]),
                    "rank": (after[-1] > after[-1, 7]).sum(),
                    "flips": (before.argmax(-1) != after.argmax(-1)).mean(),
                }
                found = r.results["value"].sel(arm="edit", layer=layer, position=label, document=document["id"])
                for name, value in expected.items():
                    assert float(found.sel(metric=name).squeeze()) == pytest.approx(value, abs=2e-5), name
    same = r.results["value"].sel(arm="identity")
    assert (same.sel(metric=["kl", "flips", "loss_change"]) == 0).all()
    assert (r.results["identity_error"] == 0).all()
    assert r.results["skipped"].values.tolist() == [2, 3]


def test_patching_all_tokens_recovers_the_donors_logits(made: Any) -> None:
    store, model = made
    r = replay.sweep(
        store,
        model,
        replay.grid(positions=["all", "first"]),
        replay.Patch(donors()) | replay.Interpolate(donors(), t=[0, 1]),
        ["recovered", "cosine"],
        answers={document["id"]: (5, 6) for document in DOCUMENTS},
        **QUIET,
    )
    found = r.results["value"].sel(arm="edit", metric="recovered", position="all")
    assert np.allclose(found.isel(edit=0).sel(alpha=1.0), 1, atol=1e-4)
    assert np.allclose(found.isel(edit=1).sel(alpha=0.0), 0, atol=1e-4)
    assert np.allclose(found.isel(edit=1).sel(alpha=1.0), 1, atol=1e-4)
    assert np.isnan(found.isel(edit=0).sel(alpha=0.0)).all(), "an edit without strengths has one only"
    last = r.results["value"].sel(arm="edit", metric="recovered", position="first", layer=DEPTH - 1, alpha=1.0)
    assert np.allclose(last.isel(edit=0), 0, atol=1e-5), "a first token patched after the last block does nothing"
    cosine = r.results["value"].sel(metric="cosine", position="all")
    assert np.allclose(cosine.sel(arm="identity", alpha=1.0), 1)
    assert (cosine.sel(arm="edit", alpha=1.0) < 0.9999).all()


def test_steering_scales_and_its_controls_have_equal_norms(made: Any) -> None:
    store, model = made
    vector = np.random.default_rng(0).standard_normal(HIDDEN)
    lengths: dict[str, list[float]] = {}

    def moved(outcome: Outcome) -> float:
        change = outcome.residuals["resid_post", 1] - outcome.base_residuals["resid_post", 1]
        return float(change.norm())

    metric = replay.Metric("moved", moved, (("resid_post", 1),))
    arms = ["identity", "random_direction", "norm_matched"]
    r = replay.sweep(
        store, model, replay.grid(layers=1), replay.Steer(vector, [0, 2, 8]), [metric], arms, seed=3, **QUIET
    )
    value = r.results["value"].squeeze()
    assert value.sizes == {"arm": 4, "alpha": 3, "document": 9}
    for arm in ("edit", "random_direction", "norm_matched"):
        for alpha in (0, 2, 8):
            expected = alpha * np.linalg.norm(vector)
            assert np.allclose(value.sel(arm=arm, alpha=alpha), expected, rtol=1e-4), (arm, alpha, lengths)
    assert (value.sel(arm="identity") == 0).all()


def test_several_edits_in_one_forward_agree_and_the_error_is_measured(made: Any) -> None:
    store, model = made
    at = replay.grid(layers=[0, 2], positions="each")
    edit = replay.Patch(donors()) | replay.Zero()
    one = replay.sweep(store, model, at, edit, ["kl", "loss"], **QUIET)
    many = replay.sweep(store, model, at, edit, ["kl", "loss"], copies=5, **QUIET)
    assert list(one.results["position"].values) == list("012345")
    assert np.allclose(one.results["value"], many.results["value"], atol=1e-5)
    assert (many.results["identity_error"] < 1e-4).all()
    assert "5 edits went through each forward" in many.results.attrs["notes"][-1]


@pytest.mark.parametrize("family", [*REPLAYED[::6], *(pytest.param(f, marks=pytest.mark.slow) for f in REPLAYED[2::4])])
def test_edits_of_different_layers_in_one_forward_agree(family: str, captured: Captured) -> None:
    """Each line of a forward starts at its own block; some numbers of lines divide the 6 tokens of a sequence."""
    store, model = captured(family, documents=DOCUMENTS, batch_tokens=18)
    at = replay.grid(positions=[0, 4])
    edit = replay.Scale(1.5) | replay.Patch(donors())
    one = replay.sweep(store, model, at, edit, ["kl", "cosine"], **QUIET)
    for copies in (7, 100) if family == "llama" else (7,):
        many = replay.sweep(store, model, at, edit, ["kl", "cosine"], copies=copies, **QUIET)
        assert np.allclose(one.results["value"], many.results["value"], atol=2e-5, equal_nan=True), copies
        assert (many.results["identity_error"] < 1e-4).all()


@pytest.mark.parametrize("site", ["attn_out", "mlp_post", "resid_pre"])
def test_edits_inside_blocks_of_different_layers_go_through_one_forward(site: str, made: Any) -> None:
    store, model = made
    at, edit = replay.grid(site, positions=[1, "last"]), replay.Zero() | replay.Scale(3.0)
    one = replay.sweep(store, model, at, edit, ["kl"], **QUIET)
    many = replay.sweep(store, model, at, edit, ["kl"], copies=50, **QUIET)
    assert list(one.results["layer"].values) == list(range(DEPTH))
    assert (one.results["value"].sel(arm="edit").max("alpha") > 0).all()
    assert np.allclose(one.results["value"], many.results["value"], atol=1e-5, equal_nan=True)


def test_a_block_runs_only_on_the_lines_that_have_reached_it(made: Any) -> None:
    store, model = made
    engine = Engine(store, model)
    batch = next(engine.batches())
    ran: list[int] = []
    for block in model.model.layers:
        block.mlp.register_forward_hook(lambda _, args, output: ran.append(len(output)))
    engine.run(batch)
    ran.clear()
    engine.run(batch, [engine.start_at("resid_post", layer) for layer in (0, 0, 2)])
    each = batch.shape[0]
    assert ran == [2 * each, 2 * each, 3 * each + (batch.shape[1] % (3 * each) == 0)]


@pytest.mark.parametrize("copies", [1, 30])
def test_sites_before_an_edit_are_unchanged(copies: int, made: Any) -> None:
    store, model = made
    places = (("resid_post", 1), ("mlp_out", 1), ("resid_post", 3))

    def change(outcome: Outcome, place: tuple[str, int]) -> float:
        return float((outcome.residuals[place] - outcome.base_residuals[place]).abs().max())

    metrics = [
        replay.Metric(f"{site} {layer}", lambda outcome, place=(site, layer): change(outcome, place), ((site, layer),))
        for site, layer in places
    ]
    r = replay.sweep(store, model, replay.grid(positions="all"), replay.Zero(), metrics, copies=copies, **QUIET)
    value = r.results["value"].sel(arm="edit").squeeze()
    changed = (value > 1e-4).all("document").transpose("metric", "layer").values.tolist()
    assert changed == [[True, True, False, False], [True, False, False, False], [True] * DEPTH]
    assert (value.sel(metric="resid_post 1", layer=[2, 3]) == 0).all()


def test_the_error_of_several_edits_in_one_forward_is_found(made: Any) -> None:
    """The outputs of the model depend slightly on the number of lines."""
    store, model = made
    model.model.norm.register_forward_hook(lambda _, args, output: output * (1 + 1e-3 * len(output)))
    asked: dict[str, Any] = {"at": replay.grid(layers=1, positions=[0, 1]), "edit": replay.Zero(), "metrics": ["kl"]}
    asked["accept"] = ["behavior"]
    assert replay.sweep(store, model, **asked, **QUIET).results["identity_error"] == 0
    assert replay.sweep(store, model, copies=2, **asked, **QUIET).results["identity_error"] > 1e-4


def test_documents_outside_the_sweep_are_not_edited(made: Any) -> None:
    store, model = made
    asked = [DOCUMENTS[4]["id"], DOCUMENTS[1]["id"]]
    whole = replay.sweep(store, model, edit=replay.Zero(), metrics=["kl"], **QUIET)
    some = replay.sweep(store, model, edit=replay.Zero(), metrics=["kl"], documents=asked, **QUIET)
    assert set(some.results["document"].values) == set(asked)
    assert np.array_equal(some.results["value"], whole.results["value"].sel(document=some.results["document"]))


def test_documents_without_a_token_or_a_donor_are_left_out(captured: Captured) -> None:
    documents = token_documents([3, 8, 5], vocabulary=VOCABULARY)
    store, model = captured(documents=documents)
    edit = replay.Patch({"doc-0": "doc-1", "doc-1": "doc-0"})
    r = replay.sweep(store, model, replay.grid(layers=1, positions=[1, 4, -5]), edit, ["kl"], **QUIET)
    value = r.results["value"].sel(arm="edit").squeeze()
    finite = {
        (str(p), str(d)): bool(np.isfinite(value.sel(position=p, document=d)))
        for p in value.position.values
        for d in value.document.values
    }
    assert finite == {
        ("1", "doc-0"): True,
        ("1", "doc-1"): True,
        ("1", "doc-2"): False,
        ("4", "doc-0"): False,
        ("4", "doc-1"): False,
        ("4", "doc-2"): False,
        ("-5", "doc-0"): False,
        ("-5", "doc-1"): False,
        ("-5", "doc-2"): False,
    }
    ends = replay.sweep(
        store, model, replay.grid(layers=1, positions="last"), replay.Patch(edit.donor, align="end"), ["kl"], **QUIET
    )
    assert np.isfinite(ends.results["value"].sel(arm="edit")).sum() == 2


def test_running_the_head_on_the_last_token_gives_the_same_values(made: Any) -> None:
    store, model = made
    r = replay.sweep(store, model, edit=replay.Zero(), metrics=["logit_diff"], answers=(3, 4), readout="last", **QUIET)
    whole = replay.sweep(store, model, edit=replay.Zero(), metrics=["logit_diff"], answers=(3, 4), **QUIET)
    assert np.allclose(r.results["value"], whole.results["value"], atol=1e-5)
    assert (r.results["identity_error"] == 0).all()


def test_an_interrupted_sweep_resumes(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, model = made
    asked: dict[str, Any] = {"edit": replay.Zero(), "metrics": ["kl"], "folder": tmp_path / "out", **QUIET}
    module = sys.modules["analysis.replay.sweeps.sweep"]  # its name in the package is the function
    real, calls = module.run_batch, []

    def failing(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, "run_batch", failing)
    with pytest.raises(KeyboardInterrupt):
        replay.sweep(store, model, **asked)
    monkeypatch.setattr(module, "run_batch", real)
    assert len(list((tmp_path / "out/parts").glob("*.npz"))) == 1
    runs: list[int] = []
    model.register_forward_hook(lambda *_: runs.append(1))
    resumed = replay.sweep(store, model, **asked)
    fresh = replay.sweep(store, model, edit=replay.Zero(), metrics=["kl"], **QUIET)
    assert resumed.results["value"].equals(fresh.results["value"])
    again = len(runs)
    replay.sweep(store, model, **asked)
    assert len(runs) == again + 1, "all parts are there: one small forward shows that the model is the same"
    with pytest.raises(MismatchError, match="another sweep"):
        replay.sweep(store, model, **{**asked, "metrics": ["flips"]})


def test_saved_results_load_identically(made: Any, tmp_path: Path) -> None:
    store, model = made
    r = replay.sweep(store, model, edit=replay.Zero() | replay.Scale([0.5, 2]), metrics=["kl"], **QUIET)
    r.save(tmp_path)
    found = replay.load(tmp_path)
    assert found.results.identical(r.results)
    with pytest.raises(AnalysisError, match="no saved sweep"):
        replay.load(tmp_path / "elsewhere")


def load_tiny() -> Any:
    return tiny("llama")


def test_worker_processes_give_the_same_results(made: Any) -> None:
    store, model = made
    here = replay.sweep(store, model, edit=replay.Zero(), metrics=["kl"], **QUIET)
    there = replay.sweep(
        store, load_tiny, edit=replay.Zero(), metrics=["kl"], scheduler="processes", workers=1, **QUIET
    )
    assert there.results.identical(here.results)


def test_effects_have_intervals_and_tests_against_controls(made: Any, tmp_path: Path) -> None:
    store, model = made
    metrics, baselines = ["loss", "kl"], ["identity", "norm_matched"]
    at = replay.grid(layers=1, positions="first")
    r = replay.sweep(store, model, at, replay.Zero(), metrics, baselines, **QUIET)
    effect = r.effect()
    cell = effect.sel(arm="edit", metric="kl").squeeze()
    values = r.results["value"].sel(arm="edit", metric="kl").squeeze().values
    assert float(cell["mean"]) == pytest.approx(values.mean())
    assert values.min() < float(cell["ci_low"]) < values.mean() < float(cell["ci_high"]) < values.max()
    changes = r.results["value"].sel(metric="loss").squeeze()
    found = scipy.stats.permutation_test(
        ((changes.sel(arm="edit") - changes.sel(arm="identity")).values,),
        np.mean,
        permutation_type="samples",
        n_resamples=np.inf,
    )
    assert float(effect["p_identity"].sel(metric="loss").squeeze()) == pytest.approx(found.pvalue)
    assert np.isnan(effect["p_identity"].sel(metric="kl")).all(), "0 is the smallest divergence: any edit is above it"
    assert np.isfinite(effect["p_norm_matched"]).all()
    assert "kl: not tested against no edit" in effect.attrs["tests"]
    plain = r.results["unedited"].sel(edit="Zero")
    for document in DOCUMENTS[:3]:
        p = log_softmax(logits(model, document), -1)[np.arange(5), document["tokens"][1:]]
        unedited = plain.sel(document=document["id"])
        assert float(unedited.sel(metric="loss")) == pytest.approx(-p.mean(), abs=1e-5)
        assert float(unedited.sel(metric="kl")) == 0
    assert float(effect["change"].sel(arm="edit", metric="loss").squeeze()) == pytest.approx(
        float((r.results["value"].sel(arm="edit", metric="loss").squeeze() - plain.sel(metric="loss")).mean())
    )
    assert len(r.to_dataframe()) == 3 * 9
    by_label = r.effect(store, groups="label")
    assert float(by_label["ci_low"].sel(arm="edit", metric="kl").squeeze()) >= values.min()
    copied = flexcache.copy(store.path, tmp_path / "copy.zarr")
    copied.join({"id": copied.documents["id"], "joined": copied.documents["label"]})
    by_joined = r.effect(copied, groups="joined")
    assert by_joined["ci_low"].equals(by_label["ci_low"])
    assert by_joined.attrs["labels"] == copied.label_checksums(["joined"])
    with pytest.raises(AnalysisError, match="cannot be grouped"):
        r.effect(store, groups="lable")
    labels: list[float | None] = [float("nan"), None] * 4 + [None]
    ids = [document["id"] for document in DOCUMENTS]
    unlabelled: Any = SimpleNamespace(documents=pa.table({"id": ids, "who": labels}), path=store.path)
    alone = r.effect(unlabelled, groups="who")
    assert alone["ci_low"].equals(effect["ci_low"]), "documents without a group do not belong together"
    with pytest.raises(AnalysisError, match="does not have the documents"):
        r.effect(SimpleNamespace(documents=unlabelled.documents[:4], path=store.path), groups="who")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["kk"]}, "no metric 'kk'"),
        ({"metrics": []}, "metrics cannot be told apart"),
        ({"metrics": ["kl", "kl"]}, "metrics cannot be told apart"),
        ({"metrics": ["logit_diff"]}, "needs answers"),
        ({"baselines": ["nothing"]}, "no baseline"),
        ({"documents": ["doc-99"]}, "no document 'doc-99'"),
        ({"readout": "middle"}, "readout cannot be"),
        ({"edit": ()}, "no edit"),
        ({"edit": replay.Zero() | replay.Zero()}, "given twice"),
        ({"edit": replay.Steer(np.ones(3))}, "does not fit"),
        ({"at": replay.grid("mlp_out", layers=9)}, "no layer 9"),
        ({"scheduler": "processes"}, "load the model on each"),
        ({"copy": 2}, "did you mean copies"),
    ],
)
def test_invalid_arguments_of_a_sweep_raise_an_error(options: dict[str, Any], message: str, made: Any) -> None:
    store, model = made
    with pytest.raises((AnalysisError, StoreError, Exception), match=message) as error:
        replay.sweep(store, model, **{"edit": replay.Zero(), "metrics": ["kl"], **QUIET, **options})
    assert type(error.value).__name__ in ("AnalysisError", "StoreError", "SiteError")


def test_figures_are_drawn_for_positions_strengths_and_layers(made: Any, tmp_path: Path) -> None:
    store, model = made
    edits = replay.Zero() | replay.Patch(donors())
    grid = replay.sweep(store, model, replay.grid(positions="each"), edits, ["kl"], **QUIET)
    assert len(grid.plot(tmp_path / "grid.png").axes) == 3, "two maps and a colour bar"
    layers = replay.sweep(store, model, edit=edits, metrics=["kl"], baselines=["norm_matched"], **QUIET)
    (axes,) = layers.plot(tmp_path / "layers.svg").axes
    assert len(axes.lines) == 4
    steer = replay.Steer(np.ones(HIDDEN), [0, 1])
    dose = replay.sweep(store, model, edit=steer, metrics=["kl"], baselines=["identity", "norm_matched"], **QUIET)
    panels = dose.plot().axes
    assert [axes.get_xlabel() for axes in panels] == ["strength"] * DEPTH
    assert [len(axes.lines) for axes in panels] == [3] * DEPTH, "the edit and both baselines in every layer"
    by_strength, by_layer = make_charts(dose.effect())
    assert (len(by_strength.panels), len(by_layer.panels)) == (DEPTH, 1)
    assert [name for name, _, _ in by_layer.legend] == ["Steer", "identity", "norm matched"]
    assert "largest by kl" in str(dose.table().title)
    assert (tmp_path / "grid.png").stat().st_size > 1000


def test_every_edit_has_a_colour_of_its_own_and_the_legend_is_beside_the_curves(made: Any) -> None:
    store, model = made
    edits = [replay.Zero((dim,)) for dim in range(10)]
    found = replay.sweep(store, model, edit=edits, metrics=["kl"], **QUIET)
    figure = found.plot()
    (axes,) = figure.axes
    assert len({line.get_color() for line in axes.lines}) == len(edits) + 1, "and one for no edit"
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert legend.get_window_extent().x0 >= axes.get_window_extent().x1


def test_engine_runs_one_document_of_a_batch(made: Any) -> None:
    store, model = made
    batch = Engine(store, model).batch_of(4)
    assert 4 in batch.documents


def test_one_metric_baseline_or_document_needs_no_list(made: Any) -> None:
    store, model = made
    name = store.documents["id"][0].as_py()
    at = replay.grid(layers=[1])
    one = replay.sweep(store, model, at, replay.Zero(), "kl", baselines="identity", documents=name, **QUIET)
    several = replay.sweep(store, model, at, replay.Zero(), ["kl"], baselines=["identity"], documents=[name], **QUIET)
    xr.testing.assert_identical(one.results, several.results)
    assert one.results["value"].sizes["metric"] == one.results["value"].sizes["document"] == 1
    with pytest.raises(AnalysisError, match="not a metric"):
        replay.sweep(store, model, at, replay.Zero(), 3, **QUIET)
