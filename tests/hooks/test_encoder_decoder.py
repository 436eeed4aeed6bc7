"""Sites of a decoder that attends to an encoder, compared with plain hooks on the whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from flexcache.errors import SiteError
from flexcache.hooks import ActivationHooks, HookPoint, check_sites, find_hook_points
from flexcache.site import ONCE, STANDARD, Site
from tests.models import DEPTH, tiny, token_ids

T5 = {
    "resid_pre": ("", "input"),
    "resid_mid": (".layer.1.layer_norm", "input"),
    "resid_post": ("", "output"),
    "attn_out": (".layer.0.SelfAttention.o", "output"),
    "z": (".layer.0.SelfAttention.o", "input"),
    "cross_attn_out": (".layer.1.EncDecAttention.o", "output"),
    "mlp_out": (".layer.2.DenseReluDense.wo", "output"),
    "mlp_post": (".layer.2.DenseReluDense.wo", "input"),
    "mlp_pre": (".layer.2.DenseReluDense.act", "input"),
    **{name: (f".layer.0.SelfAttention.{name}", "output") for name in "qkv"},
}
BART = {
    "resid_pre": ("", "input"),
    "resid_post": ("", "output"),
    "resid_mid": (".self_attn_layer_norm", "output"),
    "attn_out": (".self_attn.out_proj", "output"),
    "z": (".self_attn.out_proj", "input"),
    "cross_attn_out": (".encoder_attn.out_proj", "output"),
    "mlp_out": (".fc2", "output"),
    "mlp_post": (".fc2", "input"),
    "mlp_pre": (".activation_fn", "input"),
    **{name: (f".self_attn.{name}_proj", "output") for name in "qkv"},
}
NORM_FIRST = BART | {"resid_mid": (".encoder_attn_layer_norm", "input")}
ORACLE = {
    "t5": ("decoder.block", T5),
    "umt5": ("decoder.block", T5),
    "bart": ("model.decoder.layers", BART),
    "marian": ("model.decoder.layers", BART),
    "mbart": ("model.decoder.layers", NORM_FIRST),
    "pegasus": ("model.decoder.layers", NORM_FIRST),
}


def inputs() -> dict[str, torch.Tensor]:
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[1, 6:] = 0
    own = torch.ones(3, 7, dtype=torch.int64)
    own[2, 3:] = 0
    return {
        "input_ids": token_ids(3, 9),
        "attention_mask": mask,
        "decoder_input_ids": token_ids(3, 7, seed=1),
        "decoder_attention_mask": own,
    }


def by_hand(model: nn.Module, places: dict[str, tuple[str, str]], path: str) -> dict[tuple[str, int], torch.Tensor]:
    """Run the whole model with plain hooks on the modules that a person wrote down."""
    found: dict[tuple[str, int], torch.Tensor] = {}
    handles = []
    for site, (module, side) in places.items():
        for layer in range(DEPTH):

            def keep(_: Any, args: Any, output: Any, key: Any = (site, layer), side: str = side) -> None:
                value = args if side == "input" else output
                found[key] = (value[0] if isinstance(value, tuple) else value).clone()

            handles.append(model.get_submodule(f"{path}.{layer}{module}").register_forward_hook(keep))
    with torch.no_grad():
        model(**inputs(), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", ORACLE)
def test_sites_of_the_decoder_equal_those_in_a_forward_of_the_whole_model(family: str) -> None:
    model, (path, places) = tiny(family), ORACLE[family]
    truth = by_hand(model, places, path)
    points = [point for site in (*STANDARD, *ONCE) for point in _found(model, site)]
    assert {(point.array, point.layer) for point in points if point.layer is not None} == truth.keys()
    check_sites(model, points)
    read: dict[HookPoint, torch.Tensor] = {}
    with ActivationHooks(model, points, lambda point, tensor: read.__setitem__(point, tensor.clone())) as opened:
        opened.forward(**inputs())
    for point in points:
        if point.layer is not None:
            expected = truth[point.array, point.layer]
            assert torch.equal(read[point], expected.reshape(read[point].shape)), point


def test_the_residual_identity_includes_cross_attention() -> None:
    model = tiny("mbart")
    block = model.model.decoder.layers[1]
    block.encoder_attn_layer_norm.register_forward_hook(lambda _, args, output: output + 1)
    check_sites(model, find_hook_points(model, Site("attn_out")))  # another input is no other algebra
    block.encoder_attn.register_forward_hook(lambda _, args, output: (output[0] * 1.5, *output[1:]))
    with pytest.raises(SiteError, match="adds something else") as error:
        check_sites(model, find_hook_points(model, Site("mlp_out")))
    assert "attn_out + cross_attn_out + mlp_out" in str(error.value)


def _found(model: nn.Module, site: str) -> tuple[HookPoint, ...]:
    try:
        return find_hook_points(model, Site(site))
    except SiteError:
        return ()
