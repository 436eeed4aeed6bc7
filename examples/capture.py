"""Capture: what every block and one MLP's neurons do, in memory.   python examples/capture.py [MODEL]"""

from __future__ import annotations

import torch
from models import model_and_ids

from flexcache import FlexModel, HookFunction

model, ids = model_and_ids()
acts: dict[str, list[torch.Tensor]] = {}
flex = FlexModel(model, acts)  # adds hooks, nothing else
flex.create_hook_group("blocks", "model.layers.*")  # every block's output: the residual stream after it
flex.register_forward_pre_hook(HookFunction("model.layers.1.mlp.down_proj"))  # a module's input: here its neurons

with torch.no_grad():
    flex(input_ids=ids)
    for name, tensors in acts.items():
        print(f"{name}: {tuple(tensors[0].shape)}, mean norm {tensors[0].norm(dim=-1).mean():.3f}")

    # the model's own methods are reachable, and every decoding step is a forward
    flex.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
print("tokens per forward:", [x.shape[1] for x in acts["model.layers.1"]])

assert flex.restore() is model  # the hooks are gone
