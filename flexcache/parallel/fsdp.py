"""FSDP2 after a forward that was ended early."""

from __future__ import annotations

from typing import Any

from torch import nn


def reset_after_early_stop(model: nn.Module) -> None:
    """Make FSDP2 free the weights that it gathered, and end its state of a forward that was ended early.

    Otherwise the blocks that ran last stay whole in memory, and later forwards would use them even after the sharded
    weights have changed. Uses attributes of FSDP2 that are private in torch 2.13.
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
        module.reshard()  # type: ignore[operator]  # has no effect on a root that is still in its forward
