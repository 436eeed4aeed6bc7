from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from flexcache.errors import HookError
from flexcache.hooks import FlexModel, HookFunction
from tests.models import HIDDEN, checkpointed, tiny, token_ids

BLOCK = "model.layers.1"


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(input_ids=token_ids(), use_cache=False).logits.pow(2).mean()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", BLOCK),
        ("llama", "model.layers.2.mlp"),
        ("llama", "model.layers.0.input_layernorm"),
        ("gpt2", "transformer.h.1.attn.c_proj"),
        ("gpt_neox", "gpt_neox.layers.2"),
    ],
)
def test_backward_hooks_read_the_same_gradients_as_those_of_torch(family: str, name: str) -> None:
    model = tiny(family)
    expected: dict[str, torch.Tensor] = {}
    module = model.get_submodule(name)

    def after(_: nn.Module, grad_input: Any, grad_output: Any) -> None:
        expected["input"], expected["output"] = grad_input[0].clone(), grad_output[0].clone()

    handle = module.register_full_backward_hook(after)
    loss_of(model).backward()
    handle.remove()
    plain = weights(model)

    flex = FlexModel(model, acts := {})
    flex.register_full_backward_hook(HookFunction(name, key="input"))
    flex.register_full_backward_pre_hook(HookFunction(name, key="output"))
    for count in (1, 2):
        loss_of(flex).backward()
        same(weights(model), plain)
        assert [len(found) for found in acts.values()] == [count, count]
    same({key: found[0] for key, found in acts.items()}, expected)
    same({key: found[1] for key, found in acts.items()}, expected)


def test_gradients_of_outputs_changed_in_place_are_read() -> None:
    """Falcon adds to its MLP's output: there torch's own module hook raises, and a hook on the tensor does not."""
    model = tiny("falcon_parallel")
    name = "transformer.h.1.mlp"
    expected: list[torch.Tensor] = []
    module = model.get_submodule(name)
    handle = module.register_forward_hook(
        lambda m, a, o: o.register_hook(lambda g: expected.append(g.clone())) and None
    )
    loss_of(model).backward()
    handle.remove()
    flex = FlexModel(model, acts := {})
    flex.register_full_backward_pre_hook(HookFunction(name))
    loss_of(flex).backward()
    assert torch.equal(acts[name][0], expected[0])


def test_the_gradient_of_an_input_is_the_part_that_flows_through_this_module() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.f(x)

    model = Residual()
    flex = FlexModel(model, acts := {})
    flex.register_full_backward_hook(HookFunction("f"))
    x = torch.randn(2, 3, requires_grad=True)
    flex(x).sum().backward()
    assert torch.equal(acts["f"][0], torch.ones(2, 3) @ model.f.weight)
    assert torch.equal(x.grad, acts["f"][0] + 1)


@pytest.mark.parametrize("side", ["full_backward", "full_backward_pre"])
def test_edited_gradients_reach_the_weights_of_earlier_layers(side: str) -> None:
    model = tiny("llama")
    name = f"{BLOCK}.mlp"
    module = model.get_submodule(name)
    if side == "full_backward":
        handle = module.register_full_backward_hook(lambda m, gi, go: (gi[0] * -3 + 1e-3,))
    else:
        handle = module.register_full_backward_pre_hook(lambda m, go: (go[0] * -3 + 1e-3,))
    loss_of(model).backward()
    handle.remove()
    expected = weights(model)
    flex = FlexModel(model, acts := {})
    getattr(flex, f"register_{side}_hook")(
        HookFunction(name, editing_function=lambda m, g, c, t: g.mul_(-3).add_(1e-3))
    )
    loss_of(flex).backward()
    same(weights(model), expected)
    flex.enable_hook_groups("all", complement=True)
    loss_of(flex).backward()
    assert len(acts[name]) == 1


def test_gradients_of_parameters_are_read_and_edited() -> None:
    model = tiny("llama")
    name = f"{BLOCK}.mlp.up_proj.weight"
    loss_of(model).backward()
    plain = weights(model)
    flex = FlexModel(model, acts := {})
    flex.register_hook(HookFunction(name, editing_function=lambda m, g, c, t: g * 2))
    loss_of(flex).backward()
    edited = weights(model)
    assert torch.equal(acts[name][0], plain[name])
    assert torch.equal(edited[name], 2 * plain[name])
    same({k: v for k, v in edited.items() if k != name}, {k: v for k, v in plain.items() if k != name})


def test_trainable_modules_get_the_gradients_of_the_same_edit_by_a_native_hook() -> None:
    model = tiny("llama")
    torch.manual_seed(1)
    adapter = nn.Linear(HIDDEN, HIDDEN)
    handle = model.get_submodule(BLOCK).register_forward_hook(lambda m, a, o: o + torch.tanh(adapter(o)))
    loss_of(model).backward()
    handle.remove()
    expected, own = weights(model), weights(adapter)
    flex = FlexModel(model, None)
    flex.register_trainable_module("adapter", adapter)
    flex.register_forward_hook(
        HookFunction(BLOCK, editing_function=lambda m, x, c, modules: x + torch.tanh(modules["adapter"](x)))
    )
    loss_of(flex).backward()
    same(weights(adapter), own)
    same(weights(model), expected)


def test_a_frozen_model_raises_only_if_gradients_are_read() -> None:
    model = tiny("llama").requires_grad_(False)
    flex = FlexModel(model, acts := {})
    flex.register_full_backward_pre_hook(HookFunction(BLOCK))
    with pytest.raises(
        HookError, match=r"no gradient reaches the place.*\n  where: model\.layers\.1 \(full_backward_pre\)"
    ):
        loss_of(flex)
    with torch.no_grad():
        loss_of(flex)
    model.enable_input_require_grads()
    loss_of(flex).backward()
    assert len(acts[BLOCK]) == 1


def test_a_gradient_that_never_arrives_warns() -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.b(x)
            return self.a(x)

    flex = FlexModel(Dead(), acts := {})
    for name in "ab":
        flex.register_full_backward_pre_hook(HookFunction(name))
    loss = flex(torch.ones(1, 2)).sum()
    with pytest.warns(UserWarning, match=r"no gradient reached b \(full_backward_pre\)"):
        loss.backward()
    assert list(acts) == ["a"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_are_read_once_and_edited_in_both_runs(reentrant: bool) -> None:
    plain, model = tiny("llama"), tiny("llama")
    handles = [
        plain.get_submodule(f"{BLOCK}.input_layernorm").register_forward_hook(lambda m, a, o: o * 1.5),
        plain.get_submodule("model.layers.2.mlp").register_full_backward_pre_hook(
            lambda m, go: grads.append(go[0].clone())
        ),
    ]
    grads: list[torch.Tensor] = []
    loss_of(plain).backward()
    assert len(handles) == 2
    expected = weights(plain)
    checkpointed(model, reentrant)
    model.train()
    calls = []
    flex = FlexModel(model, acts := {})

    def edit(module: nn.Module, x: torch.Tensor, save_ctx: Any, modules: Any) -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        return x * 1.5

    flex.register_forward_hook(HookFunction(f"{BLOCK}.input_layernorm", editing_function=edit))
    for name in ("model.layers.2.mlp", "lm_head", "model.embed_tokens"):  # inside, after and before what is run again
        flex.register_full_backward_pre_hook(HookFunction(name))
    loss_of(flex).backward()
    assert len(calls) == 2, "the block was run again"
    same(weights(model), expected)
    assert {name: len(found) for name, found in acts.items()} == dict.fromkeys(
        (f"{BLOCK}.input_layernorm", "model.layers.2.mlp", "lm_head", "model.embed_tokens"), 1
    )
    assert torch.equal(acts["model.layers.2.mlp"][0], grads[0])


def test_a_backward_pass_that_raises_records_nothing_and_the_next_one_is_read() -> None:
    model = tiny("llama")
    flex = FlexModel(model, acts := {})
    fail = [True]

    def edit(module: nn.Module, grad: torch.Tensor, save_ctx: Any, modules: Any) -> torch.Tensor:
        if fail[0]:
            raise ArithmeticError("no")
        return grad

    flex.register_full_backward_pre_hook(HookFunction("model.layers.2"))
    flex.register_full_backward_pre_hook(HookFunction(BLOCK, editing_function=edit))
    loss = loss_of(flex)
    with pytest.raises(ArithmeticError):
        loss.backward(retain_graph=True)
    assert not acts
    fail[0] = False
    loss.backward(retain_graph=True)
    assert {name: len(found) for name, found in acts.items()} == {"model.layers.2": 1, BLOCK: 1}
    fail[0] = True
    with pytest.raises(ArithmeticError):
        loss.backward()
    fail[0] = False
    loss_of(flex).backward()
    assert {name: len(found) for name, found in acts.items()} == {"model.layers.2": 2, BLOCK: 2}
