"""Steer the residual stream, and restore the model afterwards.   python examples/edit.py [MODEL]"""

from __future__ import annotations

import torch
from models import model_and_ids

from flexcache import FlexModel, HookFunction
from flexcache.hooks import edits

model, ids = model_and_ids()
with torch.no_grad():
    before = model(input_ids=ids).logits

    # Steer towards the least likely next token: its row of the unembedding is the direction.
    token = int(before[0, -1].argmin())
    direction = model.lm_head.weight[token]
    direction = direction / direction.norm()
    flex = FlexModel(model, None)  # None: nothing is recorded
    flex.register_forward_hook(
        HookFunction("model.layers.2", editing_function=edits.Add(direction, alpha=40.0, positions=-1))
    )
    steered = flex(input_ids=ids).logits

    def rank(logits: torch.Tensor) -> int:
        return int((logits[0, -1] > logits[0, -1, token]).sum())

    print(f"token {token}: rank {rank(before)} before, {rank(steered)} steered")

    # Any function can edit. This one removes the direction again, before the last norm.
    remove = edits.ProjectOut(direction)
    flex.register_forward_pre_hook(
        HookFunction(
            "model.norm", editing_function=lambda module, x, save_ctx, modules: remove(module, x, save_ctx, modules)
        )
    )
    print(
        f"token {token}: rank {rank(flex(input_ids=ids).logits)} with the direction projected out before the last norm"
    )

    restored = flex.restore()
    print("after restore, largest difference:", (restored(input_ids=ids).logits - before).abs().max().item())
