"""Tensor parallel: transformers' own plans, parallelize_module with and without sequence parallel, uneven shards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from flexcache.errors import LayoutError
from flexcache.hooks import FlexModel, HookFunction
from tests.distributed.reference import (
    LENGTH,
    ROWS,
    Strategy,
    battery,
    close,
    edit,
    edited,
    gradient,
    logits_of,
    loss_of,
    mixing,
    read,
)
from tests.distributed.registry import check
from tests.models import FAMILIES, HIDDEN, NEURONS, tiny, token_ids

UNEVEN = {
    "hidden_size": 96,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "intermediate_size": 100,
}
"""Three ranks hold 34, 33 and 33 of the neurons."""


@contextmanager
def saved(family: str, **overrides: Any) -> Iterator[str]:
    """Give a folder with a model of a family, the same on every rank."""
    with TemporaryDirectory() as folder:
        folders: list[Any] = [folder]
        dist.broadcast_object_list(folders, 0)
        if dist.get_rank() == 0:
            tiny(family, **overrides).save_pretrained(folder)
        dist.barrier()
        yield folders[0]
        dist.barrier()


def loaded(family: str, **overrides: Any) -> nn.Module:
    """Return a model of a family, sharded by transformers while it is loaded."""
    import transformers

    with saved(family, **overrides) as folder:
        return getattr(transformers, FAMILIES[family][0]).from_pretrained(folder, tp_plan="auto").eval()


@check(2)
def transformers_llama() -> None:
    battery(Strategy(loaded("llama")), dist.get_rank())


@check(3)
def transformers_uneven() -> None:
    battery(Strategy(loaded("llama", **UNEVEN), overrides=UNEVEN), dist.get_rank())


@check(3)
def parallelize_on_three() -> None:
    """Even shards: parallelize_module itself refuses uneven ones."""
    even = UNEVEN | {"intermediate_size": 102}
    battery(Strategy(shard(tiny("llama", **even)), overrides=even), dist.get_rank())
    model = shard(tiny("llama", **even), sequence=True)
    battery(Strategy(model, call=with_positions, overrides=even), dist.get_rank())


@check(2)
def transformers_qwen3() -> None:
    battery(Strategy(loaded("qwen3"), family="qwen3"), dist.get_rank())


@check(2)
def transformers_gemma3() -> None:
    # its rotary embedding runs once per kind of layer, in an order that differs from process to process
    battery(Strategy(loaded("gemma3"), family="gemma3", skip=("rotary_emb",)), dist.get_rank())


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
    battery(Strategy(loaded("mixtral"), family="mixtral", skip=("experts.",)), dist.get_rank(), places)


def shard(model: nn.Module, sequence: bool = False, mesh: Any = None) -> nn.Module:
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
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
def parallelize_after_registration() -> None:
    """Hooks that were there before see DTensors, sums that are not added up among them."""
    ids = token_ids(ROWS, LENGTH)
    reference = read(tiny("llama"), ids)
    model, acts = tiny("llama"), {}
    flex = FlexModel(model, acts)
    names = [
        f"model.layers.1.{name}" for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.act_fn", "mlp.down_proj")
    ]
    for name in names:
        flex.register_forward_hook(HookFunction(name))
        flex.register_forward_pre_hook(HookFunction(name, key=f"{name}:in"))
        flex.register_full_backward_pre_hook(HookFunction(name, key=f"{name}:grad"))
    flex.register_trainable_module("w", mixing(HIDDEN))
    places = {"model.layers.2.self_attn.o_proj": "output"}
    flex.register_forward_hook(HookFunction(next(iter(places)), editing_function=edit))
    shard(model)
    expected = edited(tiny("llama"), ids, places, {"w": mixing(HIDDEN)})
    logits = logits_of(flex, ids)
    close(logits, expected.logits, "edited logits")
    loss_of(logits, ids).backward()
    close(flex.trainable_modules["w"].weight.grad, expected.weights["w.weight"], "gradient of the edit's weights")
    up = "model.layers.0.mlp.up_proj.weight"
    close(gradient(model, up), expected.weights[up], up)
    if dist.get_rank() == 0:
        for name in names:
            close(acts[name][0], reference.outputs[name], name)
            close(acts[f"{name}:in"][0], reference.inputs[name], f"{name}:in")
            assert acts[f"{name}:grad"][0].shape == reference.outputs[name].shape


@check(2)
def inside_parallel_experts_is_refused() -> None:
    """Rows there are sorted by expert, and each rank has those of its own experts."""
    import transformers
    from transformers.distributed import DistributedConfig

    with saved("mixtral") as folder:
        model = transformers.MixtralForCausalLM.from_pretrained(
            folder, distributed_config=DistributedConfig(tp_size=2, ep_size=2)
        ).eval()
    flex = FlexModel(model, {})
    flex.register_forward_hook(HookFunction("model.layers.1.mlp.experts.act_fn"))
    with pytest.raises(LayoutError, match="inside experts"):
        logits_of(flex, token_ids(ROWS, LENGTH))


@check(2)
def the_shards_are_real() -> None:
    """What the other checks rest on: the models are sharded, and a rank alone does not have the activation."""
    for model in (shard(tiny("llama")), loaded("llama")):
        up = model.model.layers[0].mlp.up_proj
        assert type(up.weight).__name__ == "DTensor"
        seen = []
        handle = up.register_forward_hook(lambda m, a, o, seen=seen: seen.append(o.shape[-1]))
        logits_of(model, token_ids(ROWS, LENGTH))
        handle.remove()
        assert seen == [NEURONS // 2]


@check(2)
def expected_shape_stands_in_and_is_checked() -> None:
    ids = token_ids(ROWS, LENGTH)
    reference = read(tiny("llama"), ids)
    name = "model.layers.1.mlp.act_fn"

    class Opaque(nn.Module):
        """Looks at values, so that it cannot run on the meta device."""

        def __init__(self) -> None:
            super().__init__()
            self.model = shard(tiny("llama"))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            assert ids.sum().item() > 0
            return self.model(input_ids=ids, use_cache=False).logits

    for shape, error in (((None, None, NEURONS), None), (None, "expected_shape"), ((None, None, 100), "add up")):
        acts: dict[str, list[torch.Tensor]] = {}
        flex = FlexModel(Opaque(), acts)
        flex.register_forward_hook(HookFunction(f"model.{name}", expected_shape=shape))
        with nullcontext() if error is None else pytest.raises(LayoutError, match=error):
            flex(ids)
        if error is None and dist.get_rank() == 0:
            close(acts[f"model.{name}"][0], reference.outputs[name], name)
        flex.restore()


@check(4)
def fsdp2_and_tensor() -> None:
    """transformers' own mesh of both."""
    import transformers
    from transformers.distributed import DistributedConfig

    with saved("llama") as folder:
        model = transformers.LlamaForCausalLM.from_pretrained(
            folder, distributed_config=DistributedConfig(fsdp_size=2, tp_size=2)
        ).eval()
    row = model._device_mesh["fsdp"].get_local_rank()
    battery(Strategy(model, slice(2 * row, 2 * row + 2)), dist.get_rank())


@check(4)
def ddp_and_tensor() -> None:
    """Hand-made: a mesh of two by two, copies over one axis and parallelize_module over the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = shard(tiny("llama"), mesh=mesh["tp"])
    row = mesh["dp"].get_local_rank()

    def averaged(model: nn.Module, name: str) -> torch.Tensor:
        grad = gradient(model, name).clone()
        dist.all_reduce(grad, group=mesh["dp"].get_group())
        return grad / 2

    strategy = Strategy(model, slice(2 * row, 2 * row + 2), gradient=averaged, options={"data_parallel_size": 2})
    battery(strategy, dist.get_rank())


@check(4)
def fsdp2_over_parallelize_module() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = shard(tiny("llama"), mesh=mesh["tp"])
    for block in model.model.layers:
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    row = mesh["dp"].get_local_rank()
    battery(Strategy(model, slice(2 * row, 2 * row + 2)), dist.get_rank())


@check(4)
def copies_of_a_tensor_parallel_model_stand_alone() -> None:
    """Where nothing joins two groups, each has its own rank 0."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "tp"))
    ids = token_ids(ROWS, LENGTH, seed=mesh["copy"].get_local_rank())
    reference = read(tiny("llama"), ids)
    acts: dict[str, list[torch.Tensor]] = {}
    flex = FlexModel(shard(tiny("llama"), mesh=mesh["tp"]), acts)
    flex.register_forward_hook(HookFunction("model.layers.1.mlp.act_fn"))
    logits_of(flex, ids)
    assert bool(acts) == (mesh["tp"].get_local_rank() == 0)
    for value in acts.values():
        close(value[0], reference.outputs["model.layers.1.mlp.act_fn"], "act_fn")


@check(2)
def sequence_parallel() -> None:
    battery(Strategy(shard(tiny("llama"), sequence=True), call=with_positions), dist.get_rank())
