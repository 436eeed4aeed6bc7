"""FSDP2 after forwards that were left before their end."""

from __future__ import annotations

from typing import Any

from torch import nn


def settle(model: nn.Module) -> None:
    """Let FSDP2 drop the weights that it gathered for a forward that was left early, and forget that it was under way.

    Otherwise the blocks that ran last stay whole in memory, and a later forward would use them even after the sharded
    weights have changed. Touches attributes of FSDP2 that are private in torch 2.13.
    """
    for module in model.modules():
        state: Any = getattr(module, "_get_fsdp_state", lambda: None)()
        if state is None:
            continue
        state._training_state = type(state._training_state).IDLE
        state._state_ctx.iter_forward_root = None
        state._modules_to_run_forward.clear()
        for group in getattr(state, "_fsdp_param_groups", ()):
            group._training_state = type(group._training_state).IDLE
        module.reshard()  # type: ignore[operator]  # does nothing on a root that is still in its forward
