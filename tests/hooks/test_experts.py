"""Sites of experts, compared with a loop over tokens and experts that is written here from the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import flexcache
from flexcache.errors import ConfigError, SiteError
from flexcache.hooks import ActivationHooks, HookPoint, check_sites, find_hook_points
from flexcache.site import Site
from tests.hooks.sites_table import cell
from tests.models import MIXTURES, tiny, token_ids

SITES = ("expert_out", "expert_index", "expert_weight", "mlp_post")
REFUSED = ("cohere2_moe", "axk1", "llama4", "jetmoe")
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
DOCUMENTS = [{"id": str(n), "tokens": token_ids(1, 9 + n, n)[0].tolist()} for n in range(4)]


def points_of(model: nn.Module, *sites: str) -> list[HookPoint]:
    """Return the points of sites at experts, in all layers that have them."""
    found = [point for site in sites or SITES for point in cell(model, site)[1]]
    return [point for point in found if point.of_experts]


def read(model: nn.Module, points: list[HookPoint], **inputs: Any) -> dict[HookPoint, torch.Tensor]:
    values: dict[HookPoint, torch.Tensor] = {}
    with ActivationHooks(model, points, lambda point, tensor: values.update({point: tensor.clone()})) as hooks:
        hooks.forward(**inputs)
    return values


def given_to_experts(model: nn.Module, paths: list[str], **inputs: Any) -> dict[str, tuple[torch.Tensor, ...]]:
    """Return what each experts module is given in one plain forward: tokens, numbers, weights."""
    given: dict[str, tuple[torch.Tensor, ...]] = {}
    handles = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: given.update({path: tuple(value.clone() for value in args)})
        )
        for path in paths
    ]
    with torch.no_grad():
        model(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    return given


def neurons_of(family: str, experts: nn.Module, expert: int, x: torch.Tensor) -> torch.Tensor:
    if family == "nemotron_h":
        return functional.relu(experts.up_proj[expert].double() @ x) ** 2
    weight = experts.gate_up_proj[expert].double()
    if family == "gpt_oss":
        both = x @ weight + experts.gate_up_proj_bias[expert].double()
        gate, up = both[::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    gate, up = (x @ weight if family == "aria" else weight @ x).chunk(2)
    return functional.silu(gate) * up


def output_of(family: str, experts: nn.Module, expert: int, neurons: torch.Tensor) -> torch.Tensor:
    weight = experts.down_proj[expert].double()
    if family == "gpt_oss":
        return neurons @ weight + experts.down_proj_bias[expert].double()
    return neurons @ weight if family == "aria" else weight @ neurons


def by_hand(family: str, experts: nn.Module, given: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """Return the sites of one experts module for its tokens, in float64, by a loop over tokens and experts."""
    tokens = []
    for x, index, weights in zip(given[0].flatten(0, -2).double(), given[1].tolist(), given[2].double(), strict=True):
        pairs = sorted(zip(index, weights, strict=True), key=lambda pair: pair[0])
        neurons = [neurons_of(family, experts, expert, x) for expert, _ in pairs]
        made = [w * output_of(family, experts, e, n) for (e, w), n in zip(pairs, neurons, strict=True)]
        tokens.append(
            {
                "expert_out": torch.stack(made),
                "expert_index": torch.tensor([float(expert) for expert, _ in pairs]),
                "expert_weight": torch.stack([weight for _, weight in pairs]),
                "mlp_post": torch.stack(neurons),
            }
        )
    return {site: torch.stack([token[site] for token in tokens]) for site in SITES}


@pytest.mark.parametrize("family", [family for family in MIXTURES if family not in REFUSED])
def test_the_sites_of_experts_are_those_of_a_loop_over_tokens_and_experts(family: str) -> None:
    model = tiny(family)
    inputs = {"input_ids": token_ids(2, 5)}
    points = points_of(model)
    assert {point.array for point in points} == set(SITES)
    given = given_to_experts(model, [point.module for point in points_of(model, "expert_out")], **inputs)
    for implementation in IMPLEMENTATIONS:
        model.set_experts_implementation(implementation)
        check_sites(model, points)
        found = read(model, points, **inputs)
        for path, call in given.items():
            expected = by_hand(family, model.get_submodule(path), call)
            for point in points:
                if point.module == path:
                    values, right = found[point].flatten(0, 1).double(), expected[point.array]
                    assert values.shape == right.shape
                    if point.side == "choice":
                        assert torch.equal(values, right.double())
                    assert (values - right).norm(dim=-1).max() <= 2e-5 * right.norm(dim=-1).max()


def test_the_order_of_experts_is_that_of_their_numbers_and_follows_the_router() -> None:
    model = tiny("mixtral", num_local_experts=8, num_experts_per_tok=3)
    logits, index, weight = (find_hook_points(model, Site(site))[1] for site in ("router_logits", *SITES[1:3]))
    found = read(model, [logits, index, weight], input_ids=token_ids())
    best = found[logits].softmax(-1).topk(3)
    order = best.indices.argsort(-1)
    assert torch.equal(found[index].long(), best.indices.gather(-1, order))
    right = (best.values / best.values.sum(-1, keepdim=True)).gather(-1, order)
    assert torch.allclose(found[weight], right, rtol=1e-6)
    assert not torch.equal(order.sort().values, order)  # the router itself sorts by weight


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "qwen2_moe"])
def test_the_sites_of_experts_pass_their_checks_in_half_precision(family: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = tiny(family, dtype)
        for implementation in ("eager", "batched_mm"):
            model.set_experts_implementation(implementation)
            check_sites(model, points_of(model))


@pytest.mark.parametrize("family", ["cohere2_moe", "axk1"])
def test_a_model_that_scales_or_norms_the_sum_is_refused(family: str) -> None:
    model = tiny(family)
    with pytest.raises(SiteError, match=r"expert_out of layer \d is not what its name says") as error:
        check_sites(model, points_of(model, "expert_out"))
    assert "summands of the MLP's output" in str(error.value)
    check_sites(model, points_of(model, "expert_index", "mlp_post"))  # these say nothing of the sum


@pytest.mark.parametrize("family", ["llama4", "jetmoe"])
def test_experts_that_are_not_told_the_choice_have_no_such_sites(family: str) -> None:
    for site in SITES:
        with pytest.raises(SiteError, match=f"no {site}"):
            find_hook_points(tiny(family), Site(site))


def test_experts_that_add_something_else_are_refused() -> None:
    model = tiny("mixtral")
    experts = model.model.layers[2].mlp.experts
    handle = experts.register_forward_hook(lambda _, args, output: output * 1.001)
    with pytest.raises(SiteError, match="expert_out of layer 2") as error:
        check_sites(model, points_of(model, "expert_out"))
    assert "summands of the experts' output" in str(error.value)
    handle.remove()
    check_sites(model, points_of(model, "expert_out"))


def test_neurons_that_do_not_give_the_output_are_refused() -> None:
    model = tiny("qwen3_moe")
    model.set_experts_implementation("eager")  # whose code has the gate inside
    model.model.layers[1].mlp.experts._apply_gate = lambda both: both.chunk(2, -1)[0]
    check_sites(model, points_of(model, "expert_out"))
    with pytest.raises(SiteError, match="mlp_post of layer 1 is not what its name says"):
        check_sites(model, points_of(model, "mlp_post"))


def test_experts_that_are_called_with_something_else_are_refused() -> None:
    model = tiny("mixtral")
    experts = model.model.layers[0].mlp.experts
    handle = experts.register_forward_pre_hook(lambda _, args: (args[0], args[1].float(), args[2]))
    point = find_hook_points(model, Site("expert_weight"), 0)
    with pytest.raises(SiteError, match="not called with the choice of the router") as error:
        read(model, list(point), input_ids=token_ids())
    assert "torch.float32" in str(error.value)
    handle.remove()


def test_experts_have_no_gradients() -> None:
    for site in ("expert_out.grad", "mlp_post.grad"):
        with pytest.raises(SiteError, match="has no gradient"):
            find_hook_points(tiny("mixtral"), Site.parse(site))
    assert find_hook_points(tiny("llama"), Site.parse("mlp_post.grad"))


def test_a_store_of_experts_adds_up_to_its_mlp_out(tmp_path: Path) -> None:
    sites = [*SITES, "mlp_out"]
    store = flexcache.capture(tiny("mixtral"), None, DOCUMENTS, tmp_path / "run.zarr", sites=sites, progress=False)
    slots = {site: store.read(site, 1).reshape(store.n_rows, 2, -1) for site in SITES}
    assert [slots[site].shape[2] for site in SITES] == [64, 1, 1, 112]
    assert np.allclose(slots["expert_out"].sum(axis=1), store.read("mlp_out", 1), atol=1e-7)
    dims = [array.feature_dim for array in store.arrays.values()]
    assert dims == ["expert_hidden", "slot", "slot", "expert_neuron", "hidden"]
    assert store.dataset()["expert_out"].dims == ("layer", "token", "expert_hidden")
    assert flexcache.verify(tmp_path / "run.zarr").sound
    path = tmp_path / "later.zarr"
    flexcache.capture(tiny("mixtral"), None, DOCUMENTS, path, layers=[1], progress=False)
    later = flexcache.extend(tiny("mixtral"), None, path, sites=["expert_out"], layers=[1], progress=False)
    assert np.allclose(later.read("expert_out", 1), store.read("expert_out", 1), atol=1e-7)


def test_numbers_of_experts_are_stored_exactly_whatever_the_dtype(tmp_path: Path) -> None:
    model = tiny("qwen2_moe", torch.bfloat16, num_experts=300)
    sites = ["expert_index", "router_logits"]
    store = flexcache.capture(
        model, None, DOCUMENTS, tmp_path / "run.zarr", sites=sites, dtype="bfloat16", progress=False
    )
    index = store.read("expert_index", 1)
    assert index.dtype == np.float32
    assert (index[index > 256] % 2 == 1).any()  # bfloat16 has no odd numbers above 256
    assert np.array_equal(index, index.round())
    top = np.argsort(-store.read("router_logits", 1).astype(np.float64), axis=-1)[:, :2]
    assert (np.sort(top) == index).mean() > 0.9  # some scores are equal in bfloat16


def test_numbers_of_experts_have_no_mean(tmp_path: Path) -> None:
    model = tiny("mixtral")
    with pytest.raises(ConfigError, match="no mean"):
        flexcache.capture(model, None, DOCUMENTS, tmp_path / "run.zarr", sites=["expert_index"], rows="mean")
    assert not (tmp_path / "run.zarr").exists()
