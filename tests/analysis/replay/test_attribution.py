from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from analysis import replay
from analysis.replay.sweeps.plot import scatter
from flexcache.errors import AnalysisError
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


def test_the_top_cells_are_replayed_exactly_and_compared(made: Any, tmp_path: Path) -> None:
    store, model = made
    attributed = replay.attribution(store, DONORS, layers=[0, 2])
    exact = replay.verify(store, model, attributed, top=20)
    assert np.all(np.diff(np.abs(exact["attributed"])) <= 0)
    for cell in range(0, 20, 4):
        at = exact.isel(cell=cell)
        name, layer, place = str(at["document"].values), int(at["layer"]), int(at["position"])
        document = DOCUMENTS[IDS.index(name)]
        values = torch.from_numpy(store.read("resid_post", layer, store.rows(name)))[None]
        patched = values.clone()
        patched[0, place] = torch.from_numpy(store.read("resid_post", layer, store.rows(DONORS[name])))[place]
        with torch.no_grad():
            change = losses(model, document, layer, patched) - losses(model, document, layer, values)
        assert float(at["exact"]) == pytest.approx(float(change), abs=1e-4)
    assert exact.attrs["rank_correlation"] > 0.5
    assert exact.attrs["identity_error"] == 0
    scatter(exact, tmp_path / "scatter.png")
    assert (tmp_path / "scatter.png").exists()


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
