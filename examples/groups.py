"""Groups: switch sets of hooks on and off from forward to forward.   python examples/groups.py [MODEL]"""

from __future__ import annotations

import torch
from models import model_and_ids

from flexcache import FlexModel
from flexcache.hooks import edits

model, ids = model_and_ids()
acts: dict[str, list[torch.Tensor]] = {}
flex = FlexModel(model, acts)
flex.create_hook_group("attention", "model.layers.*.self_attn.o_proj", editing_function=edits.Zero())
flex.create_hook_group("mlp", "model.layers.*.mlp", editing_function=edits.Zero())
flex.update_hook_groups("layers.0.", "first")  # by a part of the names; a hook may be in any number of groups


def loss(**groups: object) -> float:
    with torch.no_grad():
        return flex(input_ids=ids, labels=ids, **groups).loss.item()


print(f"nothing ablated: {loss(groups='all', complement=True):.6f}")
for group in ("attention", "mlp", "first"):
    print(f"{group} ablated: {loss(groups=group):.6f}")
print(f"all but the first block ablated: {loss(groups='first', complement=True):.6f}")

flex.enable_hook_groups("first")  # from now on, also inside generate()
print([entry["name"] for entry in flex.hooked() if entry["active"]])
