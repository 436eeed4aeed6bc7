from __future__ import annotations

from types import MethodType

import accelerate
import torch

import flexcache.hooks
from flexcache.hooks import ActivationHooks, find_hook_points, user_hooks
from flexcache.site import Site
from tests.models import tiny, token_ids


def test_modules_with_hooks_of_the_user_are_listed() -> None:
    model = tiny("llama")
    assert user_hooks(model) == []
    model.register_forward_pre_hook(lambda _, args: None)
    handle = model.model.layers[2].mlp.register_forward_hook(lambda _, args, output: output * 2)
    assert user_hooks(torch.compile(model, backend="aot_eager")) == ["(model)", "model.layers.2.mlp"]
    handle.remove()
    assert user_hooks(model) == ["(model)"]


def test_a_replaced_forward_counts() -> None:
    model = tiny("llama")
    model.lm_head.forward = MethodType(lambda self, x: x, model.lm_head)
    assert user_hooks(model) == ["lm_head"]


def test_hooks_of_libraries_and_of_activation_hooks_do_not_count() -> None:
    model = tiny("llama")
    model(input_ids=token_ids(), output_hidden_states=True)
    assert any(module._forward_hooks for module in model.modules()), "transformers leaves hooks behind"
    with ActivationHooks(model, find_hook_points(model, Site("resid_pre")), lambda point, tensor: None):
        assert user_hooks(model) == []
    assert user_hooks(accelerate.cpu_offload(model, execution_device=torch.device("cpu"))) == []
    assert user_hooks(torch.compile(tiny("gpt2"), backend="aot_eager")) == []


def test_hooks_of_accelerate_on_a_users_module_do_not_count() -> None:
    class Mine(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    assert user_hooks(accelerate.cpu_offload(Mine(2, 2), execution_device=torch.device("cpu"))) == []


def test_the_public_names_are_these() -> None:
    assert flexcache.hooks.__all__ == [
        "Activation",
        "ActivationHooks",
        "FlexModel",
        "HookFunction",
        "HookPoint",
        "check_sites",
        "edits",
        "find_blocks",
        "find_hook_points",
        "measure",
        "user_hooks",
    ]
