from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from flexcache.errors import SiteError
from flexcache.hooks import HookPoint, check_sites, find_hook_points
from flexcache.site import Site
from tests.models import tiny


def moved(model: nn.Module, site: str, path: str) -> list[HookPoint]:
    """Return the site's points with the one of layer 2 on another module, as a wrong alias would have it."""
    return [replace(point, module=path) if point.layer == 2 else point for point in find_hook_points(model, Site(site))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "site", "wrong"),
    [
        ("llama", "attn_out", "model.layers.2.mlp"),
        ("llama", "mlp_out", "model.layers.1.mlp"),
        ("llama", "mlp_out", "model.layers.2.input_layernorm"),
        ("gemma3", "attn_out", "model.layers.2.self_attn.o_proj"),
        ("gemma3", "mlp_out", "model.layers.2.mlp"),
        ("bloom", "attn_out", "transformer.h.2.self_attention"),
        ("bert", "attn_out", "bert.encoder.layer.2.attention.output"),
        ("bert", "mlp_out", "bert.encoder.layer.2.output"),
        ("gpt_neox", "mlp_out", "gpt_neox.layers.2.attention.dense"),
    ],
)
def test_a_wrong_alias_raises(family: str, site: str, wrong: str, dtype: torch.dtype) -> None:
    model = tiny(family, dtype)
    with pytest.raises(SiteError, match=rf"{site}.* of layer 2") as error:
        check_sites(model, moved(model, site, wrong))
    assert wrong in str(error.value.where)
    assert "times the bound" in str(error.value.found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("site", ["attn_out", "mlp_out"])
def test_a_model_that_scales_its_sum_terms_raises(site: str, dtype: torch.dtype) -> None:
    model = tiny("granite", dtype)
    with pytest.raises(SiteError, match="adds something else"):
        check_sites(model, find_hook_points(model, Site(site)))
    check_sites(model, find_hook_points(model, Site("resid_post")))
    unscaled = tiny("granite", dtype, residual_multiplier=1.0)
    check_sites(unscaled, find_hook_points(unscaled, Site(site)))


def test_a_tensor_of_another_width_raises() -> None:
    model = tiny("llama")
    with pytest.raises(SiteError, match="not part of the residual stream"):
        check_sites(model, moved(model, "mlp_out", "model.layers.2.mlp.up_proj"))


def test_a_stream_that_changes_between_blocks_raises() -> None:
    model = tiny("llama")
    points = [*find_hook_points(model, Site("resid_post"), [0, 1])]
    check_sites(model, points)
    model.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] + 1, *args[1:]))
    check_sites(model, points)
    after_mlp = replace(points[0], module="model.layers.0.mlp")
    with pytest.raises(SiteError, match="resid_post of layer 0 is not resid_pre of layer 1"):
        check_sites(model, [after_mlp, points[1]])


def test_the_error_names_dropout_as_a_possible_cause() -> None:
    model = tiny("gpt2").train()
    with pytest.raises(SiteError, match=r"call model\.eval"):
        check_sites(model, find_hook_points(model, Site("attn_out")))


def test_a_term_lost_in_rounding_raises() -> None:
    model = tiny("llama", torch.bfloat16)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.mul_(1e-6)
    with pytest.raises(SiteError, match="attn_out of layer 1 is too small"):
        check_sites(model, find_hook_points(model, Site("attn_out")))
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    check_sites(model, find_hook_points(model, Site("attn_out")))


def test_a_nan_does_not_pass_the_check() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[5] = float("nan")
    with pytest.raises(SiteError, match="of layer 3: the block adds something else"):
        check_sites(model, find_hook_points(model, Site("mlp_out")))


def test_sites_without_algebra_are_not_checked() -> None:
    model = tiny("granite")
    check_sites(
        model, [*find_hook_points(model, Site("mlp_post")), *find_hook_points(model, Site.parse("model.layers.*.mlp"))]
    )
    check_sites(tiny("llama", device="meta"), [])
    with pytest.raises(SiteError, match="meta device"):
        check_sites(tiny("llama", device="meta"), find_hook_points(model, Site("resid_post")))
