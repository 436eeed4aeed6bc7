from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flexcache
from analysis.readout import lens
from flexcache.errors import AnalysisError
from tests.corpora import lengths, token_documents
from tests.models import tiny

FAMILIES = ("llama", "gpt2", "gpt_neox", "gemma3", "granite")


SCALED: dict[str, dict[str, Any]] = {"granite": {"logits_scaling": 3.0}, "gemma3": {"final_logit_softcapping": 2.0}}


def captured(path: Path, family: str, **options: Any) -> tuple[Any, flexcache.Store]:
    model = tiny(family, **SCALED.get(family, {}))
    documents = token_documents(lengths(30, longest=12), vocabulary=250)
    return model, flexcache.capture(
        model, None, documents, path, sites=["resid_post"], dtype="float32", batch_tokens=64, progress=False, **options
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_lens_at_the_last_layer_equals_the_prediction_of_the_model(family: str, tmp_path: Path) -> None:
    model, store = captured(tmp_path / "s.zarr", family)
    found = lens.compute(store, lens.Head.of(model), rows=store.n_rows, progress=False)
    assert (found["kl"].values[-1] == 0).all()
    assert (found["kl"].values[:-1] > 0).all()
    assert found["agrees"].values[-1].all()
    for number in (0, 7):
        tokens = store.tokens["tokens"][number].as_py()
        document = store.tokens["document"][number].as_py()
        rows = store.rows(document)
        with torch.inference_mode():
            expected = model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
        last = found.isel(layer=-1).sel(row=rows)
        entropy = -(expected.exp() * expected).sum(-1)
        np.testing.assert_allclose(last["entropy"], entropy, rtol=1e-4)
        for place, token in enumerate(tokens[1:]):
            own = expected[place, token]
            assert float(last["log_probability"][place]) == pytest.approx(float(own), abs=1e-4)
            assert abs(int(last["rank"][place]) - int((expected[place] > own).sum())) <= 1
        assert np.isnan(last["log_probability"][-1])
        assert int(last["rank"][-1]) == -1


def test_the_lens_applies_norm_and_unembedding_at_earlier_layers(tmp_path: Path) -> None:
    model, store = captured(tmp_path / "s.zarr", "llama")
    found = lens.compute(store, lens.Head.of(model), rows=store.n_rows, progress=False)
    with torch.inference_mode():
        logits = [
            model.lm_head(model.model.norm(torch.from_numpy(store.read("resid_post", layer)))).log_softmax(-1).double()
            for layer in range(4)
        ]
    for layer in range(4):
        kl = (logits[-1].exp() * (logits[-1] - logits[layer])).sum(-1)
        np.testing.assert_allclose(found["kl"].values[layer], kl, rtol=1e-4, atol=1e-6)
    inner = store.coordinates["position"].values > 0
    np.testing.assert_allclose(found["kl_mean"], found["kl"].values[:, inner].mean(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_loading_a_head_reads_no_other_weights(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(family)
    model.save_pretrained(tmp_path / "model")
    whole, loaded = lens.Head.of(model), lens.Head.load(tmp_path / "model")
    residual = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    torch.testing.assert_close(loaded.log_probabilities(residual), whole.log_probabilities(residual))


def test_a_lens_that_cannot_be_computed_is_refused(tmp_path: Path) -> None:
    _, store = captured(tmp_path / "s.zarr", "llama", rows="mean")
    with pytest.raises(AnalysisError, match="means of documents"):
        lens.compute(store, None)
    _, store = captured(tmp_path / "t.zarr", "llama")
    with pytest.raises(AnalysisError, match="norm and unembedding"):
        lens.compute(store, tmp_path / "nothing")
    with pytest.raises(AnalysisError, match="does not fit"):
        lens.compute(store, lens.Head(torch.nn.Identity(), torch.zeros(7, 3)))
    with pytest.raises(AnalysisError, match="cannot be loaded"):
        lens.compute(store, tmp_path)
    for wrong in (tiny("llama"), 5):
        with pytest.raises(AnalysisError, match="cannot use this as a head") as error:
            lens.compute(store, wrong)  # type: ignore[arg-type]
        assert error.value.found == type(wrong).__name__
    with pytest.raises(AnalysisError, match="no head"):
        lens.Head.of(tiny("t5"))
