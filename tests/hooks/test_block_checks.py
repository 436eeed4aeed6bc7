"""A wrong site inside a block raises: by algebra, or by the effect of a change."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flexcache.errors import SiteError
from flexcache.hooks import ActivationHooks, HookPoint, check_sites, find_hook_points
from flexcache.hooks.locate.fused_projection import FusedProjectionSlice
from flexcache.hooks.read.activation_hooks import activations_only
from flexcache.site import Site
from tests.hooks.oracle import BLOCKS, INNER
from tests.models import tiny, token_ids

SWAPS = {"q": "k", "k": "v", "v": "q"}
WRONG_SPLITS = {
    "gpt2": FusedProjectionSlice(4, 3, 0, 1, 16),
    "gpt_neox": FusedProjectionSlice(1, 12, 0, 4, 16),
    "bloom": FusedProjectionSlice(1, 12, 0, 4, 16),
    "falcon": FusedProjectionSlice(1, 8, 0, 4, 16),
    "gpt_bigcode_heads": FusedProjectionSlice(1, 12, 0, 4, 16),
    "codegen": FusedProjectionSlice(1, 12, 0, 4, 16),
    "modernbert": FusedProjectionSlice(4, 3, 0, 1, 16),
    "mpt": FusedProjectionSlice(4, 3, 0, 1, 16),
    "phi3": FusedProjectionSlice(2, 4, 0, 2, 16),
    "persimmon": FusedProjectionSlice(1, 12, 0, 4, 16),
}


@pytest.mark.parametrize("family", WRONG_SPLITS)
def test_a_fused_projection_split_like_another_familys_raises(family: str) -> None:
    model = tiny(family)
    points = find_hook_points(model, Site("q"), 1)
    check_sites(model, points)
    with pytest.raises(SiteError, match="q of layer 1 is not what its name says"):
        check_sites(model, [replace(point, fused_slice=WRONG_SPLITS[family]) for point in points])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "bert", "codegen", "opt", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("site", SWAPS)
def test_queries_keys_and_values_are_not_confused(family: str, site: str) -> None:
    model = tiny(family)
    right, other = find_hook_points(model, Site(site), 0)[0], find_hook_points(model, Site(SWAPS[site]), 0)[0]
    wrong = replace(other, array=site)
    if right != wrong:
        with pytest.raises(SiteError, match=f"{site} of layer 0 is not|cannot be told apart"):
            check_sites(model, [wrong])


@pytest.mark.parametrize(
    ("family", "site", "wrong", "side"),
    [
        ("llama", "resid_mid", "input_layernorm", "input"),
        ("llama", "resid_mid", "mlp", "input"),
        ("bert", "resid_mid", "output.LayerNorm", "output"),
        ("gpt_neox", "resid_mid", "post_attention_layernorm", "input"),
        ("gemma3", "resid_mid", "post_attention_layernorm", "input"),
        ("llama", "mlp_pre", "mlp.up_proj", "input"),
        ("llama", "z", "mlp.down_proj", "input"),
        ("opt", "z", "fc1", "input"),
        ("mixtral", "router_logits", "mlp", "output"),
    ],
)
def test_a_site_at_a_wrong_place_raises(family: str, site: str, wrong: str, side: str) -> None:
    model = tiny(family)
    point = HookPoint(site, 2, f"{BLOCKS[family][0]}.2.{wrong}", side)  # type: ignore[arg-type]
    with pytest.raises(SiteError, match=f"{site} of layer 2|mlp_post of layer 2|attn_out of layer 2|z of layer 2"):
        check_sites(model, [point])


def test_a_gate_of_another_layer_raises() -> None:
    model = tiny("llama")
    points = find_hook_points(model, Site("mlp_pre"), 1)
    check_sites(model, points)
    points = [replace(point, module="model.layers.2.mlp.act_fn") for point in points]
    with pytest.raises(SiteError, match="times the other half in a gated MLP"):
        check_sites(model, points)


def test_a_router_that_returns_probabilities_raises() -> None:
    model = tiny("mixtral")
    points = find_hook_points(model, Site("router_logits"))
    check_sites(model, points)
    model.model.layers[1].mlp.gate.register_forward_hook(lambda _, args, output: (output[0].softmax(-1), *output[1:]))
    with pytest.raises(SiteError, match="router_logits of layer 1"):
        check_sites(model, points)


def test_slices_of_a_fused_projection_can_be_read_and_replaced() -> None:
    model = tiny("gpt_neox")
    points = [find_hook_points(model, Site(site), 0)[0] for site in "qkv"]
    whole = torch.arange(2 * 3 * 192.0).view(2, 3, 192)
    parts = [point.read_output(whole) for point in points]
    assert sorted(torch.cat(parts, -1).flatten().tolist()) == whole.flatten().tolist()
    again = torch.zeros_like(whole)
    for point, part in zip(points, parts, strict=True):
        again = point.replace_output(again, part)
    assert torch.equal(again, whole)


def test_a_part_of_a_fused_projection_on_one_rank_raises() -> None:
    point = find_hook_points(tiny("gpt2"), Site("q"), 0)[0]
    with pytest.raises(SiteError, match="width of a fused projection does not fit its heads") as error:
        point.read_output(torch.zeros(2, 3, 96))
    assert "module path" in str(error.value)


def test_the_gradient_of_a_slice_is_the_slice_of_the_gradient() -> None:
    model, found = tiny("gpt2"), {}
    points = [
        *find_hook_points(model, Site.parse("q.grad"), 0),
        *find_hook_points(model, Site.parse("transformer.h.0.attn.c_attn.grad")),
    ]
    with (
        activations_only(model),
        ActivationHooks(model, points, lambda point, t: found.update({point.array: t.clone()}), stop=False) as opened,
    ):
        opened.differentiate(lambda output: output.logits[..., 5], input_ids=token_ids())
    assert torch.equal(found["q.grad"], found["transformer.h.0.attn.c_attn.grad"][..., :64])
    assert found["q.grad"].abs().sum() > 0


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_a_state_space_model_has_a_residual_stream_and_no_attention_sites(family: str) -> None:
    model = tiny(family)
    check_sites(model, [*find_hook_points(model, Site("resid_pre")), *find_hook_points(model, Site("resid_post"))])
    for site in ("attn_out", "mlp_out", "q", "z", "resid_mid"):
        with pytest.raises(SiteError, match=f"no {site} in layer 0") as error:
            find_hook_points(model, Site(site))
        assert error.value.expected == "one of resid_pre, resid_post"


def test_every_family_of_the_oracle_lists_its_inner_sites() -> None:
    assert INNER.keys() == BLOCKS.keys()
