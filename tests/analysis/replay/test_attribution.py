from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import flexcache
from analysis import replay
from analysis.replay.gradients.plot import scatter
from flexcache.errors import AnalysisError, MismatchError
from tests.corpora import token_documents
from tests.models import VOCABULARY

Captured = Callable[..., Any]
DOCUMENTS = token_documents([6] * 6 + [4], vocabulary=VOCABULARY)
IDS = [document["id"] for document in DOCUMENTS]
DONORS = dict(zip(IDS, IDS[1:6] + IDS[:1]))


@pytest.fixture
def made(captured: Captured) -> tuple[Any, Any]:
    return captured(documents=DOCUMENTS, batch_tokens=24, sites=["resid_post", "resid_post.grad"])


def losses(model: Any, document: dict[str, Any], layer: int, values: torch.Tensor) -> torch.Tensor:
    """Return the summed loss as a function of a block's output, in plain PyTorch."""
    handle = model.model.layers[layer].register_forward_hook(lambda *_: values)
    ids = torch.tensor([document["tokens"]])
    logits = model(ids, use_cache=False).logits
    handle.remove()
    return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")


def test_attribution_is_the_gradient_times_the_difference(made: Any) -> None:
    store, model = made
    found = replay.attribution(store, DONORS)
    assert found.dims == ("layer", "token")
    assert found.sizes["layer"] == 4
    for method in ("patching", "ig"):
        found = replay.attribution(store, DONORS, method=method)
        for at, layer in ((0, 1), (3, 2)):
            mine, theirs = (
                torch.from_numpy(store.read("resid_post", layer, store.rows(i))) for i in (IDS[at], DONORS[IDS[at]])
            )
            slopes = []
            for document, values in ((at, mine), (IDS.index(DONORS[IDS[at]]), theirs)):
                point = values[None].clone().requires_grad_()
                losses(model, DOCUMENTS[document], layer, point).backward()
                assert point.grad is not None
                slopes.append(point.grad[0])
            slope = slopes[0] if method == "patching" else (slopes[0] + slopes[1]) / 2
            expected = (slope * (theirs - mine)).sum(-1)
            got = found.sel(layer=layer).values[found["document"].values == IDS[at]]
            np.testing.assert_allclose(got, expected, atol=1e-5)


def exact_change(made: Any, cell: Any) -> float:
    """Return the change of the summed loss when one token is its donor's, in plain PyTorch."""
    store, model = made
    name, layer, place = str(cell["document"].values), int(cell["layer"]), int(cell["position"])
    values = torch.from_numpy(store.read("resid_post", layer, store.rows(name)))[None]
    patched = values.clone()
    patched[0, place] = torch.from_numpy(store.read("resid_post", layer, store.rows(DONORS[name])))[place]
    document = DOCUMENTS[IDS.index(name)]
    with torch.no_grad():
        return float(losses(model, document, layer, patched) - losses(model, document, layer, values))


def test_top_cells_a_uniform_sample_and_first_tokens_are_replayed_exactly(made: Any, tmp_path: Path) -> None:
    store, model = made
    attributed = replay.attribution(store, DONORS, layers=[0, 2])
    exact = replay.verify(store, model, attributed, top=9, sample=12, seed=3)
    drawn = exact["drawn"].values
    assert [int((drawn == name).sum()) for name in ("top", "uniform", "first")] == [9, 12, 12]
    later = attributed.values[:, attributed["position"].values > 0]
    np.testing.assert_array_equal(
        np.abs(exact["attributed"].values[drawn == "top"]), np.sort(np.abs(later).ravel())[::-1][:9]
    )
    assert (exact["position"].values == 0).tolist() == (drawn == "first").tolist()
    for cell in range(exact.sizes["cell"]):
        at = exact.isel(cell=cell)
        assert float(at["exact"]) == pytest.approx(exact_change(made, at), abs=1e-4)
        assert at["donor"] == DONORS[str(at["document"].values)]
    for name, key in (("top", "_top"), ("uniform", ""), ("first", "_first")):
        part = exact.isel(cell=np.flatnonzero(drawn == name))
        expected = pd.Series(part["attributed"]).corr(pd.Series(part["exact"]), method="spearman")
        assert exact.attrs[f"rank_correlation{key}"] == pytest.approx(expected)
    assert exact.attrs["rank_correlation_top"] > 0.5
    assert exact.attrs["identity_error"] == 0
    scatter(exact, tmp_path / "scatter.png")
    assert (tmp_path / "scatter.png").exists()


def test_the_uniform_sample_reaches_every_cell_and_depends_on_the_seed(made: Any) -> None:
    store, model = made
    attributed = replay.attribution(store, DONORS, layers=1)
    later = int((attributed["position"] > 0).sum())
    everything = replay.verify(store, model, attributed, top=0, sample=1000)
    assert (everything["drawn"] == "uniform").sum() == later
    few = [replay.verify(store, model, attributed, top=0, sample=8, seed=seed) for seed in (0, 0, 1)]
    assert few[0].equals(few[1])
    assert not few[0].equals(few[2])
    assert np.isnan(few[0].attrs["rank_correlation_top"])
    with pytest.raises(AnalysisError, match="no cell is to be replayed"):
        replay.verify(store, model, attributed, top=0, sample=0)
    with pytest.raises(AnalysisError, match="sample cannot be used"):
        replay.verify(store, model, attributed, sample=-1)


def test_integrated_gradients_take_the_midpoints_between_document_and_donor(made: Any) -> None:
    store, model = made
    found = replay.attribution(store, DONORS, "resid_post", "ig", [1], steps=3, model=model)
    assert found.attrs["steps"] == 3
    name = IDS[2]
    own, theirs = (torch.from_numpy(store.read("resid_post", 1, store.rows(i))) for i in (name, DONORS[name]))
    slopes = []
    for share in (1 / 6, 3 / 6, 5 / 6):
        point = (own + share * (theirs - own))[None].requires_grad_()
        losses(model, DOCUMENTS[2], 1, point).backward()
        assert point.grad is not None
        slopes.append(point.grad[0])
    expected = (sum(slopes) / 3 * (theirs - own)).sum(-1)
    np.testing.assert_allclose(found.values[0, found["document"].values == name], expected, atol=1e-5)


@pytest.mark.parametrize("site", ["resid_post", "mlp_out"])
def test_integrated_gradients_sum_to_the_change_of_the_objective(captured: Captured, site: str) -> None:
    store, model = captured(documents=DOCUMENTS, batch_tokens=24, sites=["resid_post", "mlp_out"])
    errors = [
        replay.attribution(store, DONORS, site, "ig", [0, 2], steps=steps, model=model).attrs["completeness_error"]
        for steps in (1, 4, 32)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-3
    if site == "resid_post":
        found = replay.attribution(store, DONORS, site, "ig", [2], steps=32, model=model)
        name = IDS[1]
        own, theirs = (torch.from_numpy(store.read(site, 2, store.rows(i)))[None] for i in (name, DONORS[name]))
        with torch.no_grad():
            change = losses(model, DOCUMENTS[1], 2, theirs) - losses(model, DOCUMENTS[1], 2, own)
        assert found.values[0, found["document"].values == name].sum() == pytest.approx(float(change), abs=1e-3)


def test_the_gradients_of_the_model_are_left_alone(made: Any) -> None:
    store, model = made
    replay.attribution(store, DONORS, method="ig", layers=[1], steps=2, model=model)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_steps_without_model_or_method_raise_an_error(made: Any) -> None:
    store, model = made
    for options in ({"method": "ig"}, {"model": model}):
        with pytest.raises(AnalysisError, match="steps belong to integrated gradients"):
            replay.attribution(store, DONORS, steps=4, **options)
    with pytest.raises(AnalysisError, match="steps cannot be used"):
        replay.attribution(store, DONORS, method="ig", steps=0, model=model)


def test_a_layer_that_was_not_captured_raises_an_error(captured: Captured) -> None:
    store, _ = captured(documents=DOCUMENTS, layers=[1, 3], sites=["resid_post", "resid_post.grad"])
    assert replay.attribution(store, DONORS, layers=-1)["layer"].values.tolist() == [3]
    with pytest.raises(AnalysisError, match="layer 2 of resid_post was not captured"):
        replay.attribution(store, DONORS, layers=[1, 2])


def test_effects_are_of_the_objective_of_the_store(captured: Captured) -> None:
    objective = flexcache.LogitDifference(5, 9)
    store, model = captured(documents=DOCUMENTS, sites=["resid_post", "resid_post.grad"], objective=objective)
    attributed = replay.attribution(store, DONORS, layers=[1])
    for wrong in (flexcache.LogitDifference(5, 8), flexcache.NextTokenLoss()):
        with pytest.raises(MismatchError, match="gradients of the store are those of another objective"):
            replay.verify(store, model, attributed, objective=wrong)
    exact = replay.verify(store, model, attributed, objective=objective, top=4, sample=4)
    assert exact.equals(replay.verify(store, model, attributed, top=4, sample=4)), "by default that of the capture"
    at = exact.isel(cell=0)
    name, place = str(at["document"].values), int(at["position"])
    own, theirs = (torch.from_numpy(store.read("resid_post", 1, store.rows(i)))[None] for i in (name, DONORS[name]))
    found = []
    for values in (torch.cat([own[:, :place], theirs[:, place : place + 1], own[:, place + 1 :]], 1), own):
        handle = model.model.layers[1].register_forward_hook(lambda *_, given=values: given)
        with torch.no_grad():
            last = model(torch.tensor([DOCUMENTS[IDS.index(name)]["tokens"]]), use_cache=False).logits[0, -1]
        handle.remove()
        found.append(float(last[5] - last[9]))
    assert float(at["exact"]) == pytest.approx(found[0] - found[1], abs=1e-5)


def first_logit(output: Any, batch: Any) -> torch.Tensor:
    logits: torch.Tensor = output.logits[:, 0, 0]
    return logits


def test_an_objective_that_cannot_be_rebuilt_has_to_be_passed(captured: Captured) -> None:
    sites = ["resid_post", "resid_post.grad"]
    store, model = captured(documents=DOCUMENTS, sites=sites, objective=first_logit)
    attributed = replay.attribution(store, DONORS, layers=[1])
    with pytest.raises(MismatchError, match="record cannot be made into one"):
        replay.verify(store, model, attributed)
    exact = replay.verify(store, model, attributed, objective=first_logit, top=3, sample=0)
    assert (exact["exact"] == 0).all(), "later tokens do not change the first logit"


def test_attribution_without_gradients_or_donors_raises_an_error(made: Any, captured: Captured) -> None:
    store, _ = made
    plain, _ = captured()
    with pytest.raises(AnalysisError, match="needs activations and their gradients") as error:
        replay.attribution(plain, DONORS)
    assert "resid_post.grad" in str(error.value.remedy)
    with pytest.raises(AnalysisError, match="no document has a donor"):
        replay.attribution(store, {"doc-0": "doc-0"})
    with pytest.raises(AnalysisError, match="no document 'nobody'"):
        replay.attribution(store, {"nobody": "doc-1"})
    short = replay.attribution(store, {"doc-0": "doc-6"})
    assert short.sizes["token"] == 4, "positions that the donor has"
