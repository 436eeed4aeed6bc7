"""The hook function: which activation to read, and how to edit it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

EditingFunction = Callable[[nn.Module, torch.Tensor, Any, nn.ModuleDict], torch.Tensor]
"""``(module, activation, save_ctx, modules) -> edited activation`` of the same shape."""

Kind = Literal["forward", "forward_pre", "full_backward", "full_backward_pre", "tensor"]
KINDS: tuple[Kind, ...] = ("forward", "forward_pre", "full_backward", "full_backward_pre", "tensor")
BACKWARD: tuple[Kind, ...] = ("full_backward", "full_backward_pre", "tensor")


@dataclass(frozen=True, eq=False)
class HookFunction:
    """Reads an activation, unsharded, and may edit it. What it reads is decided by how it is registered.

    ::

        HookFunction("model.layers.7.mlp")
        HookFunction("model.layers.7.mlp", editing_function=lambda module, x, save_ctx, modules: 0 * x)

    Parameters
    ----------
    module_name
        Dotted path of a module, as the unwrapped model has it: ``module.``, ``_fsdp_wrapped_module.`` and
        ``_orig_mod.`` may be written or left out. For `FlexModel.register_hook`, the path of a parameter.
    expected_shape
        The whole shape, None for dims that may be anything. Not needed: shapes are found by themselves. Where given,
        it is checked, and it stands in where a model cannot run on the meta device.
    editing_function
        Gets the module, the whole activation (a tensor of its own, which it may change in place), the model's
        `save_ctx` and its trainable modules, and returns a tensor of the same shape, which is cast to the activation's
        dtype. It runs on every rank that holds the activation, on the same values and with the same state of torch's
        random numbers, and must do the same on each.
    unpack_idx
        Which tensor to read where a module takes or gives several, counted from 0 in the order of the pytree.
    key
        Name in the output dict; the module's name by default.
    record
        Whether the activation goes into the output dict. What is recorded is the activation before this edit.
    """

    module_name: str
    expected_shape: tuple[int | None, ...] | None = None
    editing_function: EditingFunction | None = None
    unpack_idx: int = 0
    key: str | None = None
    record: bool = True

    @property
    def name(self) -> str:
        """The name in the output dict."""
        return self.key or self.module_name
