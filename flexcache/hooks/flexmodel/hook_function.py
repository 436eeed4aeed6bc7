"""The hook function: the activation to read, and the edit."""

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
    """Read the whole activation of a module, and optionally edit it; the way of registration selects input or output.

    >>> mlp = HookFunction("model.layers.7.mlp")
    >>> mlp.name
    'model.layers.7.mlp'
    >>> ablate = HookFunction("model.layers.7.mlp", editing_function=lambda module, x, save_ctx, modules: 0 * x)

    Parameters
    ----------
    module_name
        Dotted path of a module in the unwrapped model: ``module.``, ``_fsdp_wrapped_module.`` and ``_orig_mod.`` may be
        written or left out. For `FlexModel.register_hook`, the path of a parameter.
    expected_shape
        The whole shape, None for dims of any size. Optional, since shapes are found automatically: it is checked if
        given, and replaces the shape found if a model cannot run on the meta device.
    editing_function
        Receives the module, the whole activation (a separate tensor, which it may change in place), the model's
        `save_ctx` and its trainable modules. It returns a tensor of the same shape, which is cast to the activation's
        dtype. It runs on every rank that holds the activation, with the same values and the same state of torch's
        random numbers, and must do the same on each.
    unpack_idx
        The tensor to read if a module has several inputs or outputs, counted from 0 in the order of the pytree.
    key
        Name in the output dict; by default the module's name.
    record
        Put the activation into the output dict. It is recorded before this edit.
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
