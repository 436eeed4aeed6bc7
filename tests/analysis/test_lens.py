from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flexcache
from analysis.readout import lens, predictions
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
@pytest.mark.parametrize("rows", ["all", "last"])
def test_a_loaded_model_is_compared_by_its_own_logits(family: str, rows: str, tmp_path: Path) -> None:
    model, store = captured(tmp_path / "s.zarr", family, rows=rows)
    assert lens.compute(store, model, rows=8, progress=False).attrs["reference"] == "the model's own logits"
    model = model.bfloat16().float()  # not the weights of the capture: layers differ from the model's own logits
    found = lens.compute(store, model, rows=store.n_rows, progress=False)
    assert found.attrs["reference"] == "the model's own logits, whose weights are not those of the capture"
    for number in (0, 7):
        document = store.tokens["document"][number].as_py()
        own = store.rows(document)
        with torch.inference_mode():
            logits = model(torch.tensor([store.tokens["tokens"][number].as_py()])).logits[0]
        head = lens.Head.of(model)
        p = logits.double().log_softmax(-1)[-len(own) :]
        q = head.log_probabilities(store.read("resid_post", 3, own))
        kl = (p.exp() * (p - q)).sum(-1)
        assert (kl > 0).all()
        np.testing.assert_allclose(found["kl"].sel(layer=3, row=own), kl, rtol=1e-3, atol=1e-12)
        agrees = (p.argmax(-1) == q.argmax(-1)).numpy()
        np.testing.assert_array_equal(found["agrees"].sel(layer=3, row=own), agrees)


def test_some_layers_are_compared_with_the_last_of_the_model(tmp_path: Path) -> None:
    model, store = captured(tmp_path / "s.zarr", "llama")
    whole = lens.compute(store, lens.Head.of(model), rows=store.n_rows, progress=False)
    few = lens.compute(store, lens.Head.of(model), rows=store.n_rows, layers=[0, 2], progress=False)
    assert few.attrs["reference"] == "layer 3, the model's last"
    for name in ("kl", "agrees", "kl_mean", "agreement"):
        np.testing.assert_allclose(few[name], whole[name].sel(layer=[0, 2]), rtol=1e-6)
    assert (few["kl_mean"] > 0).all()


def test_a_store_without_the_last_layer_has_no_divergence(tmp_path: Path) -> None:
    model, store = captured(tmp_path / "s.zarr", "llama", layers=[0, 2])
    found = lens.compute(store, lens.Head.of(model), rows=store.n_rows, progress=False)
    assert found.attrs["reference"] == "missing: the store does not have resid_post of the model's last layer"
    assert found["kl"].isnull().all()
    assert found["agreement"].isnull().all()
    assert "agrees" not in found
    assert found["loss"].notnull().all()


def test_a_large_vocabulary_takes_evenly_spaced_rows_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, store = captured(tmp_path / "s.zarr", "llama")
    head = lens.Head.of(model)
    whole = lens.compute(store, head, progress=False)
    monkeypatch.setattr(lens, "LEAST_ROWS", 9)
    monkeypatch.setattr(lens, "OPERATIONS", 20 * 2 * head.weight.numel() * 4)
    few = lens.compute(store, head, progress=False)
    assert few.sizes["row"] == 20
    assert few.attrs["sample"] == f"20 rows, evenly spaced in {store.n_rows}"
    np.testing.assert_allclose(few["kl"], whole["kl"].sel(row=few["row"]), rtol=1e-6)
    assert lens.compute(store, head, rows=store.n_rows, progress=False).sizes["row"] == store.n_rows
    assert lens.affordable_rows(lens.Head(head.norm, torch.empty(10**6, 4096, device="meta")), 80) == 9


@pytest.mark.parametrize("block", [1, 7, 100])
@pytest.mark.parametrize("spread", [1e-4, 1.0, 1000.0])
def test_sums_over_blocks_of_the_vocabulary_equal_the_whole(
    block: int, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    hidden = [random.normal(size=(50, 8)).astype(np.float32) * scale for scale in (1, 1, spread)]
    weight = torch.from_numpy(random.normal(size=(100, 8)).astype(np.float32))
    bias = torch.zeros(100)
    bias[:9] = -torch.inf  # the first block has no probability
    head, target = lens.Head(torch.nn.Identity(), weight, bias), random.integers(-1, 100, 50)
    target[target == 0] = 50
    target[(target > 0) & (target < 9)] = 50
    monkeypatch.setattr(predictions, "CHUNK", block)
    monkeypatch.setattr(predictions, "LAYER_ROWS", 16)
    found = predictions.predict_rows(head, hidden, np.arange(50), target, 1)
    logits = np.stack([values @ weight.numpy().T for values in hidden]).astype(np.longdouble)[:, :, 9:]
    log = logits - logits.max(-1, keepdims=True)
    log -= np.log(np.exp(log).sum(-1, keepdims=True))
    kl = (np.exp(log[1]) * (log[1] - log)).sum(-1)
    np.testing.assert_allclose(found["kl"], kl.astype(float), rtol=1e-4 * max(1, spread / 100), atol=1e-9)
    assert (found["kl"][1] == 0).all()
    assert (found["kl"] >= 0).all()
    np.testing.assert_allclose(found["entropy"], -(np.exp(log) * log).sum(-1).astype(float), rtol=1e-3, atol=1e-9)
    np.testing.assert_array_equal(found["best"], 9 + log.argmax(-1))
    known = np.flatnonzero(target >= 0)
    own = log[:, known, target[known] - 9]
    np.testing.assert_allclose(found["log_probability"][:, known], own.astype(float), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found["rank"][:, known], (log[:, known] > own[..., None]).sum(-1))
    assert (found["rank"][:, target < 0] == -1).all()


def test_a_head_does_not_change_its_model(tmp_path: Path) -> None:
    model = tiny("llama").bfloat16()
    lens.Head.of(model)
    assert model.model.norm.weight.dtype == torch.bfloat16


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
    for wrong in (torch.nn.Linear(2, 2), 5):
        with pytest.raises(AnalysisError, match="cannot use this as a head") as error:
            lens.compute(store, wrong)  # type: ignore[arg-type]
        assert error.value.found == type(wrong).__name__
    with pytest.raises(AnalysisError, match="no head"):
        lens.Head.of(tiny("t5"))
