"""Tensor parallel: transformers' own plans, parallelize_module with and without sequence parallel, uneven shards."""

from __future__ import annotations

import os
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from tests.distributed.reference import Strategy, battery
from tests.distributed.registry import check
from tests.models import FAMILIES, tiny

HEADS = {2: {}, 3: {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 100}}


def loaded(family: str, plan: Any = "auto", **overrides: Any) -> nn.Module:
    """Return a model of a family, sharded by transformers while it is loaded."""
    import transformers

    folders: list[Any] = [None]
    if dist.get_rank() == 0:
        folder = TemporaryDirectory()
        tiny(family, **overrides).save_pretrained(folder.name)
        folders = [folder.name]
    dist.broadcast_object_list(folders, 0)
    cls = getattr(transformers, FAMILIES[family][0])
    os.environ["LOCAL_RANK"] = os.environ["RANK"]
    model = cls.from_pretrained(folders[0], tp_plan=plan)
    dist.barrier()
    return model.eval()


@check(2)
def transformers_llama() -> None:
    battery(Strategy(loaded("llama")), dist.get_rank())


@check(3)
def transformers_uneven() -> None:
    sizes = HEADS[3]
    battery(Strategy(loaded("llama", **sizes), overrides=sizes), dist.get_rank())


@check(2)
def transformers_qwen3() -> None:
    battery(Strategy(loaded("qwen3"), family="qwen3"), dist.get_rank())


@check(2)
def transformers_gemma3() -> None:
    battery(Strategy(loaded("gemma3"), family="gemma3"), dist.get_rank())


@check(2)
def transformers_gpt_neox() -> None:
    places = {
        "gpt_neox.layers.1": "output",
        "gpt_neox.layers.2.mlp.dense_4h_to_h": "input",
        "gpt_neox.layers.0.attention.dense": "input",
    }
    battery(Strategy(loaded("gpt_neox"), family="gpt_neox"), dist.get_rank(), places)


@check(2)
def transformers_phi3() -> None:
    places = {"model.layers.1": "output", "model.layers.2.mlp.down_proj": "input"}
    battery(Strategy(loaded("phi3"), family="phi3"), dist.get_rank(), places)


@check(2)
def transformers_mixtral() -> None:
    places = {"model.layers.1": "output", "model.layers.2.mlp": "output"}
    battery(Strategy(loaded("mixtral"), family="mixtral", skip=("experts",)), dist.get_rank(), places)


def shard(model: nn.Module, sequence: bool = False) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    rows: dict[str, Any] = {"output_layouts": Shard(1), "use_local_output": True} if sequence else {}
    block: dict[str, Any] = {
        **{f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
        "self_attn.o_proj": RowwiseParallel(**rows),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(**rows),
    }
    if sequence:
        block |= {
            "input_layernorm": SequenceParallel(),
            "post_attention_layernorm": SequenceParallel(),
            "self_attn": PrepareModuleInput(
                input_kwarg_layouts={"hidden_states": Shard(1)},
                desired_input_kwarg_layouts={"hidden_states": Replicate()},
            ),
            "mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        }
        outer: dict[str, Any] = {
            "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "model.norm": SequenceParallel(),
            "lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
        }
    else:
        outer = {"lm_head": ColwiseParallel(output_layouts=Replicate())}
    parallelize_module(model, mesh, {**outer, **{f"model.layers.*.{name}": style for name, style in block.items()}})
    return model


@check(2)
def parallelize() -> None:
    battery(Strategy(shard(tiny("llama"))), dist.get_rank())


def with_positions(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Call with positions: Llama would count them on the shard of the sequence that it sees."""
    return model(input_ids=ids, position_ids=torch.arange(ids.shape[1])[None], use_cache=False).logits


@check(2)
def sequence_parallel() -> None:
    battery(Strategy(shard(tiny("llama"), sequence=True), call=with_positions), dist.get_rank())
