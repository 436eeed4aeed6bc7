"""Train a small module inside a frozen model: a linear map for one MLP.   python examples/trainable_module.py"""

from __future__ import annotations

import torch
from models import model_and_ids
from torch import nn

from flexcache import FlexModel, HookFunction

model, ids = model_and_ids()
model.requires_grad_(False)
with torch.no_grad():
    wanted = model(input_ids=ids).logits.log_softmax(dim=-1)

flex = FlexModel(model, None)
hidden = model.config.hidden_size
linear = nn.Linear(hidden, hidden)
nn.init.zeros_(linear.weight)
flex.register_trainable_module("linear", linear)  # under data or tensor parallelism: the same weights on every rank


def remember(module: nn.Module, x: torch.Tensor, save_ctx: object, modules: nn.ModuleDict) -> torch.Tensor:
    save_ctx.mlp_input = x  # hook functions share a namespace
    return x


def replace(module: nn.Module, x: torch.Tensor, save_ctx: object, modules: nn.ModuleDict) -> torch.Tensor:
    return modules["linear"](save_ctx.mlp_input)


flex.register_forward_pre_hook(HookFunction("model.layers.1.mlp", editing_function=remember))
flex.register_forward_hook(HookFunction("model.layers.1.mlp", editing_function=replace))

optimizer = torch.optim.Adam([p for p in flex.parameters() if p.requires_grad], lr=1e-2)
for step in range(61):
    found = flex(input_ids=ids).logits.log_softmax(dim=-1)
    loss = nn.functional.kl_div(found, wanted, log_target=True, reduction="sum") / ids.numel()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        print(f"step {step}: KL from the whole model {loss.item():.3e} nats a token")

print("saved with the model:", [name for name in flex.state_dict() if "trainable" in name])
