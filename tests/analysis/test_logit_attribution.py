"""Direct logit attribution against the model's own logits, and against plain PyTorch hooks and weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flexcache
from analysis import logit_attribution
from analysis.readout import contributions
from flexcache.errors import AnalysisError
from tests.corpora import token_documents
from tests.models import DEPTH, HIDDEN, VOCABULARY, tiny

DOCUMENTS = token_documents([5, 7, 4, 6], vocabulary=VOCABULARY)
IDS = [document["id"] for document in DOCUMENTS]
OPTIONS: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 2.0},
    "qwen2": {"attention_bias": True},
    "cohere": {"logit_scale": 0.3},
    "llama": {"attention_bias": True},
}
FAMILIES = ["llama", "gpt2", "gpt_neox", "gemma2", "olmo2", "qwen3", "phi"]
OTHERS = [
    *("gptj", "gemma3", "glm4", "falcon", "falcon_sequential", "opt", "bloom", "phi3", "mixtral", "mistral", "qwen2"),
    *("gemma", "olmo", "exaone4", "smollm3", "stablelm", "stablelm_parallel", "starcoder2", "gpt_bigcode", "gpt_neo"),
    *("codegen", "mpt", "cohere", "cohere2", "nemotron", "persimmon", "helium", "qwen3_moe", "olmoe", "gpt_oss"),
    *("deepseek_v3", "qwen3_next"),
]
SITES = ["resid_post", "z", "attn_out", "mlp_out"]
Captured = Callable[..., Any]


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Captured:
    made: dict[str, Path] = {}

    def make(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[flexcache.Store, Any]:
        key = f"{family} {dtype} {options}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("direct") / "run.zarr"
            settings = {"sites": SITES, "progress": False, "batch_tokens": 48, **options}
            model = tiny(family, dtype, **OPTIONS.get(family, {}))
            flexcache.capture(model, None, DOCUMENTS, made[key], **settings)
        return flexcache.open(made[key]), tiny(family, dtype, **OPTIONS.get(family, {})).requires_grad_(False)

    return make


def own_logits(model: Any, document: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([document["tokens"]]), use_cache=False).logits[0].double()


@pytest.mark.parametrize("family", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_components_sum_to_the_logits_of_the_model(family: str, captured: Captured) -> None:
    store, model = captured(family)
    pairs = {name: (5 + number, 40 + number) for number, name in enumerate(IDS)}
    for answers in (17, (17, 91), pairs, None):
        found = logit_attribution.compute(store, model, answers, rows="all")
        assert (found["kind"] == "head").sum() == DEPTH * 4
        for row in range(found.sizes["row"]):
            at = found.isel(row=row)
            document = DOCUMENTS[IDS.index(str(at["document"].values))]
            place = int(at["position"])
            logits = own_logits(model, document)[place]
            expected = logits[int(at["token"])] - (logits[int(at["other"])] if int(at["other"]) >= 0 else 0)
            assert float(at["contribution"].sum()) == pytest.approx(float(expected), abs=2e-5)
            if answers is None:
                assert int(at["token"]) == document["tokens"][place + 1]
    assert found.attrs["rounding_error"] < 2e-5


def by_hand(model: Any, family: str, document: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return inputs of output projections, MLP terms and the last residual of a document's last token, by own hooks."""
    blocks = model.transformer.h if family == "gpt2" else model.model.layers
    kept: dict[str, torch.Tensor] = {}
    handles = []
    for number, block in enumerate(blocks):
        projection = block.attn.c_proj if family == "gpt2" else block.self_attn.o_proj
        mlp = block.post_feedforward_layernorm if family in ("gemma2", "olmo2") else block.mlp

        def keep(_: Any, args: Any, output: Any, key: int = number) -> None:
            kept[f"z{key}"], kept[f"projected{key}"] = args[0][0, -1].double(), output[0, -1].double()

        handles.append(projection.register_forward_hook(keep))
        handles.append(
            mlp.register_forward_hook(lambda _, args, out, key=number: kept.update({f"mlp{key}": out[0, -1].double()}))
        )
    norm = model.transformer.ln_f if family == "gpt2" else model.model.norm
    handles.append(norm.register_forward_pre_hook(lambda _, args: kept.update({"last": args[0][0, -1].double()})))
    own_logits(model, document)
    for handle in handles:
        handle.remove()
    return kept


def norm_by_hand(x: torch.Tensor, like: torch.Tensor, norm: Any, family: str) -> torch.Tensor:
    """Return a norm of *x* without bias, with the scale that *like* has."""
    if family == "gpt2":
        return norm.weight.double() * (x - x.mean()) / (like.var(unbiased=False) + norm.eps).sqrt()
    eps = norm.eps if family == "gemma2" else norm.variance_epsilon
    gain = 1 + norm.weight.double() if family == "gemma2" else norm.weight.double()
    return gain * x / (like.square().mean() + eps).sqrt()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "olmo2"])
def test_each_head_and_mlp_equals_its_formula(family: str, captured: Captured) -> None:
    store, model = captured(family)
    found = logit_attribution.compute(store, model, (11, 60)).set_index(component="component")
    unembedding = model.lm_head.weight.double()
    direction = unembedding[11] - unembedding[60]
    final = model.transformer.ln_f if family == "gpt2" else model.model.norm
    for document in DOCUMENTS:
        kept = by_hand(model, family, document)
        row = found["contribution"][int(np.flatnonzero(found["document"].values == document["id"])[0])]

        def contribution(vector: torch.Tensor, last: torch.Tensor = kept["last"]) -> float:
            return float(norm_by_hand(vector, last, final, family) @ direction)

        for layer in range(DEPTH):
            if family == "gpt2":
                projection = model.transformer.h[layer].attn.c_proj
                weight = projection.weight.double().T
            else:
                block = model.model.layers[layer]
                projection, weight = block.self_attn.o_proj, block.self_attn.o_proj.weight.double()
            whole = kept[f"projected{layer}"]
            parts = [torch.zeros(HIDDEN, dtype=torch.float64) if projection.bias is None else projection.bias.double()]
            for z, columns in zip(kept[f"z{layer}"].chunk(4), weight.chunk(4, 1), strict=True):
                parts.append(columns @ z)
            if family in ("gemma2", "olmo2"):
                parts = [norm_by_hand(part, whole, block.post_attention_layernorm, family) for part in parts]
            for head, part in enumerate(parts[1:]):
                assert float(row.sel(component=f"layer {layer} head {head}")) == pytest.approx(
                    contribution(part), abs=1e-5
                )
            assert float(row.sel(component=f"layer {layer} attention bias")) == pytest.approx(
                contribution(parts[0]), abs=1e-5
            )
            assert float(row.sel(component=f"layer {layer} mlp")) == pytest.approx(
                contribution(kept[f"mlp{layer}"]), abs=1e-5
            )
        bias = final.bias.double() @ direction if family == "gpt2" else 0
        assert float(row.sel(component="final norm bias")) == pytest.approx(float(bias), abs=1e-6)


def test_terms_of_a_softcap_and_of_biases_have_names(captured: Captured) -> None:
    store, model = captured("gemma2")
    found = logit_attribution.compute(store, model, 11)
    named = {str(one["component"].values): one for one in found["contribution"].transpose()}
    logits = torch.stack([own_logits(model, document)[-1, 11] for document in DOCUMENTS]).numpy()
    before = 2 * np.arctanh(logits / 2)
    np.testing.assert_allclose(sorted(named["softcap"].values), sorted(logits - before), atol=1e-5)
    store, model = captured("phi")
    found = logit_attribution.compute(store, model, (11, 60))
    bias = found["contribution"].values[:, found["component"].values == "logit bias"]
    np.testing.assert_allclose(bias, float(model.lm_head.bias[11] - model.lm_head.bias[60]), atol=1e-7)


def test_without_z_attention_is_one_component_that_sums_its_heads(captured: Captured) -> None:
    store, model = captured("llama")
    split, whole = (logit_attribution.compute(store, model, (3, 4), heads=heads) for heads in (None, False))
    for layer in range(DEPTH):
        inside = (split["layer"] == layer) & (split["kind"] != "mlp")
        expected = split["contribution"].values[:, inside.values].sum(1)
        at = whole["contribution"].values[:, whole["component"].values == f"layer {layer} attention"]
        np.testing.assert_allclose(at[:, 0], expected, atol=1e-6)
    without, _ = captured("llama", sites=["resid_post", "attn_out", "mlp_out"])
    assert logit_attribution.compute(without, model, (3, 4)).equals(whole)
    with pytest.raises(AnalysisError, match="does not hold the terms"):
        logit_attribution.compute(without, model, (3, 4), heads=True)


def test_a_store_of_the_last_layers_names_what_comes_before(captured: Captured) -> None:
    store, model = captured("gpt2")
    last, _ = captured("gpt2", sites=["resid_pre", *SITES], layers=[2, 3])
    few, all_of = (logit_attribution.compute(one, model, 9) for one in (last, store))
    assert few["component"].values[0] == "layers before 2"
    assert few.attrs["first_layer"] == 2
    earlier = all_of["contribution"].values[:, (all_of["kind"] == "embedding") | all_of["layer"].isin([0, 1])]
    np.testing.assert_allclose(few["contribution"].values[:, 0], earlier.sum(1), atol=1e-5)
    np.testing.assert_allclose(few["logit"], all_of["logit"], atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_bfloat16_leaves_a_named_term_of_rounding(family: str, captured: Captured) -> None:
    store, model = captured(family, torch.bfloat16)
    found = logit_attribution.compute(store, model, (17, 91), rows="all")
    assert 0 < found.attrs["rounding_error"] < 0.05
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}, "the model is left as it is"
    np.testing.assert_allclose(found["contribution"].sum("component"), found["logit"])
    for row in (0, 9):
        at = found.isel(row=row)
        logits = own_logits(model, DOCUMENTS[IDS.index(str(at["document"].values))])[int(at["position"])]
        assert float(at["logit"]) == pytest.approx(float(logits[17] - logits[91]), abs=0.03)


@pytest.mark.parametrize(("family", "sites"), [("mamba", ["resid_post"]), ("granite", ["resid_post", "z"])])
def test_a_store_without_the_terms_raises_an_error(family: str, sites: list[str], captured: Captured) -> None:
    store, model = captured(family, sites=sites)
    with pytest.raises(AnalysisError, match="does not hold the terms|no head that"):
        logit_attribution.compute(store, model, 5)


def test_a_block_that_normalizes_last_raises_an_error(captured: Captured) -> None:
    store, model = captured("opt_post_norm")
    with pytest.raises(AnalysisError, match="no head that|do not sum to the last residual stream"):
        logit_attribution.compute(store, model, 5)


def test_a_store_of_another_model_does_not_sum(captured: Captured) -> None:
    store, model = captured("llama")
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.mul_(1.001)
    with pytest.raises(AnalysisError, match="do not sum to the last residual stream"):
        logit_attribution.compute(store, model, 5)


def test_a_head_of_another_form_raises_an_error(captured: Captured) -> None:
    store, model = captured("llama")
    model.lm_head.register_forward_hook(lambda _, args, output: output * 1.5)
    with pytest.raises(AnalysisError, match="not those of its final norm and unembedding"):
        logit_attribution.compute(store, model, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"answers": VOCABULARY}, "answers cannot be read"),
        ({"answers": (1, 2, 3)}, "answers cannot be read"),
        ({"answers": True}, "answers cannot be read"),
        ({"answers": (3, " good")}, "' good' is not one token: no tokenizer"),
        ({"answers": {"nobody": 3}}, "no document 'nobody'"),
        ({"answers": 3, "documents": ["nobody"]}, "no document 'nobody'"),
        ({"answers": 3, "rows": "first"}, "rows cannot be read"),
        ({"answers": 3, "rows": 40}, "no row has an answer"),
        ({}, "no row has an answer"),
    ],
)
def test_arguments_that_cannot_be_used_raise_an_error(
    options: dict[str, Any], message: str, captured: Captured
) -> None:
    store, model = captured("llama")
    with pytest.raises(AnalysisError, match=message):
        logit_attribution.compute(store, model, **options)


def test_rows_and_documents_are_those_asked_for(captured: Captured) -> None:
    store, model = captured("llama")
    found = logit_attribution.compute(store, model, {IDS[0]: 3, IDS[2]: (4, 5)}, rows=-2, documents=IDS[:3])
    assert sorted(found["document"].values) == sorted([IDS[0], IDS[2]])
    assert set(found["position"].values.tolist()) == {3, 2}
    assert dict(zip(found["document"].values, found["other"].values.tolist())) == {IDS[0]: -1, IDS[2]: 5}


def test_the_figure_and_the_table_show_the_mean_contributions(captured: Captured, tmp_path: Path) -> None:
    store, model = captured("gpt2")
    for heads in (True, False):
        found = logit_attribution.compute(store, model, (17, 91), heads=heads)
        image: Any = contributions.heat_map(found, tmp_path / f"{heads}.png").axes[0].images[0].get_array()
        mean = found["contribution"].mean("row").values
        assert image.shape == (DEPTH, 6 if heads else 2)
        name = "layer 2 head 3" if heads else "layer 2 attention"
        assert image[2, 3 if heads else 0] == pytest.approx(mean[found["component"].values == name][0])
        assert image[1, -1] == pytest.approx(mean[found["component"].values == "layer 1 mlp"][0])
        shown = contributions.table(found, rows=3)
        first = str(found["component"].values[np.argmax(np.abs(mean))])
        assert next(iter(shown.columns[0].cells)) == first
        assert len(shown.rows) == 3
