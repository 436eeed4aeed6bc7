from __future__ import annotations

import pytest
import torch
from torch import nn

from flexcache.errors import SiteError
from flexcache.hooks import find_hook_points, measure
from flexcache.site import Site
from tests.models import NEURONS, tiny


def test_feature_dims_beyond_one_are_kept() -> None:
    model = tiny("qwen3")
    points = (
        *find_hook_points(model, Site("mlp_post"), 1),
        *find_hook_points(model, Site.parse("model.layers.1.self_attn.q_norm")),
    )
    assert [activation.shape for activation in measure(model, points).values()] == [(NEURONS,), (4, 16)]


def test_a_tensor_with_heads_before_tokens_raises() -> None:
    model = tiny("gemma3")
    with pytest.raises(SiteError, match="not one for each token") as error:
        measure(model, find_hook_points(model, Site.parse("model.layers.1.self_attn.q_norm")))
    assert error.value.found == "(3, 4, 11, 16)"


def test_measuring_finds_a_module_that_runs_twice() -> None:
    model = tiny("llama")
    model.model.layers[3].mlp = model.model.layers[0].mlp
    with pytest.raises(SiteError, match="more than once"):
        measure(model, find_hook_points(model, Site.parse("model.layers.0.mlp")))


@pytest.mark.parametrize("family", ["mixtral", "gpt2"])
def test_measuring_without_weights_leaves_the_configuration_as_it_was(family: str) -> None:
    model = tiny(family, device="meta")
    before = model.config.to_dict(), getattr(model.config, "_experts_implementation", None)
    measure(model, find_hook_points(model, Site("mlp_out")))
    assert (model.config.to_dict(), getattr(model.config, "_experts_implementation", None)) == before


def test_layers_of_one_array_that_differ_raise() -> None:
    model = tiny("llama")
    mlp = model.model.layers[2].mlp
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = nn.Linear(64, 8), nn.Linear(64, 8), nn.Linear(8, 64)
    with pytest.raises(SiteError, match="layers of mlp_post differ") as error:
        measure(model, find_hook_points(model, Site("mlp_post")))
    assert "shape (8,)" in str(error.value.found)
    measure(model, find_hook_points(model, Site("mlp_post"), [0, 1, 3]))


def test_a_model_without_token_ids_is_measured_with_an_example() -> None:
    net = nn.Sequential(nn.Linear(5, 3), nn.ReLU())
    points = find_hook_points(net, Site.parse("0"))
    expected = {points[0]: ((3,), torch.float32)}
    assert measure(net, points, example=lambda batch, length: torch.zeros(batch, length, 5)) == expected
    assert measure(net, points, example=lambda batch, length: {"input": torch.zeros(batch, length, 5)}) == expected
    with pytest.raises(SiteError, match="no vocabulary"):
        measure(net, points)
    with pytest.raises(SiteError, match="cannot run a small example") as error:
        measure(net, points, example=lambda batch, length: torch.zeros(batch, length, 4))
    assert "RuntimeError" in str(error.value.found)


@pytest.mark.parametrize(
    ("path", "why"),
    [("encoder.block.0", "did not run"), ("decoder.block.0.layer.1.EncDecAttention.k", "not one for each token")],
)
def test_modules_that_read_the_encoders_tokens_raise(path: str, why: str) -> None:
    model = tiny("t5")
    with pytest.raises(SiteError, match=why):
        measure(model, find_hook_points(model, Site.parse(path)))


def test_the_example_has_no_special_tokens() -> None:
    model, seen = tiny("roberta"), []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    points = find_hook_points(model, Site("resid_pre"))
    measure(model, points)
    drawn = int(seen[0][1, 4])
    model.config.pad_token_id = drawn
    measure(model, points)
    assert drawn not in seen[1]
    assert torch.equal(seen[0][seen[0] != drawn], seen[1][seen[0] != drawn])


def test_a_model_offloaded_by_accelerate_is_measured() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = tiny("llama")
    points = find_hook_points(model, Site("mlp_post"))
    expected = measure(model, points)
    offloaded = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(offloaded.parameters()).is_meta
    assert measure(offloaded, points) == expected
