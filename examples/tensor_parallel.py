"""Tensor parallel: whole activations of a model that no process holds whole.

torchrun --nproc-per-node 2 examples/tensor_parallel.py
"""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from models import model_and_ids
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from flexcache import FlexModel, HookFunction

dist.init_process_group("gloo")
torch.set_num_threads(1)
rank = dist.get_rank()
model, ids = model_and_ids()
whole = copy.deepcopy(model)  # to compare with, since this model is small

plan = {"lm_head": ColwiseParallel(output_layouts=Replicate())}
for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
    plan[f"model.layers.*.{name}"] = ColwiseParallel()
for name in ("self_attn.o_proj", "mlp.down_proj"):
    plan[f"model.layers.*.{name}"] = RowwiseParallel()
parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",)), plan)


def edit(module: torch.nn.Module, x: torch.Tensor, save_ctx: object, modules: object) -> torch.Tensor:
    """Sort the neurons of each token, which no shard could do by itself. It runs on every rank alike."""
    return x.sort(dim=-1).values


NEURONS = "model.layers.1.mlp.act_fn"  # each rank has its share of them
results = []
for model_ in (whole, model):  # the same code for both: sizes and shards are found
    acts: dict[str, list[torch.Tensor]] = {}
    flex = FlexModel(model_, acts)
    flex.register_forward_hook(HookFunction(NEURONS, editing_function=edit))
    with torch.no_grad():
        logits = flex(input_ids=ids).logits
    results.append((acts.get(NEURONS, [None])[0], logits))
    flex.restore()

(plain, plain_logits), (gathered, logits) = results
print(f"rank {rank}: largest difference of edited logits {(logits - plain_logits).abs().max().item():.1e}", flush=True)
if rank == 0:  # whole activations are kept there, unless output_ranks says otherwise
    print(f"rank 0: neurons {tuple(gathered.shape)}, largest difference {(gathered - plain).abs().max().item():.1e}")
else:
    print(f"rank {rank}: keeps {gathered}")
dist.destroy_process_group()
