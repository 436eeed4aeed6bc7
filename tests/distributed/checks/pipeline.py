"""Pipelines: torch's schedules alone, with tensor parallel and with FSDP2, and transformers' own for inference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from flexcache.errors import HookError, SiteError
from flexcache.hooks import FlexModel, HookFunction
from tests.distributed.checks.tensor import saved, shard
from tests.distributed.reference import (
    LENGTH,
    ROWS,
    assert_no_trace,
    close,
    edit_rows,
    edited,
    full,
    logits_of,
    loss_of,
    mixing,
    read,
)
from tests.distributed.registry import check
from tests.models import DEPTH, HIDDEN, NEURONS, tiny, token_ids

MICROBATCHES = 2
PLACES = {"model.layers.1": "output", "model.layers.2.mlp.down_proj": "input"}


class LlamaStage(nn.Module):
    """Blocks *lo* to *hi* of a Llama, under the names that they have in the whole model."""

    def __init__(self, whole: nn.Module, lo: int, hi: int) -> None:
        super().__init__()
        self.first, self.last = lo == 0, hi == DEPTH
        self.model = nn.Module()
        self.model.layers = nn.ModuleDict({str(i): whole.model.layers[i] for i in range(lo, hi)})
        self.model.rotary_emb = whole.model.rotary_emb
        if self.first:
            self.model.embed_tokens = whole.model.embed_tokens
        if self.last:
            self.model.norm = whole.model.norm
            self.lm_head = whole.lm_head

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        if self.first:
            h = self.model.embed_tokens(h)
        positions = torch.arange(h.shape[1])[None]
        rotary = self.model.rotary_emb(h, positions)
        for block in self.model.layers.values():
            h = block(h, attention_mask=None, position_ids=positions, position_embeddings=rotary)
        return self.lm_head(self.model.norm(h)) if self.last else h


def halves(model: nn.Module, stages: int, stage: int) -> LlamaStage:
    each = DEPTH // stages
    return LlamaStage(model, stage * each, (stage + 1) * each)


def study(
    name: str,
    modules: list[nn.Module],
    schedule_of: Any,
    group: Any,
    rows: slice = slice(None),
    sizes: dict[str, int] | None = None,
    tolerance: float = 1e-5,
) -> None:
    """Hold stages under a schedule against the single process: forward, gradients, edits, weights' gradients."""
    ids = token_ids(ROWS, LENGTH)
    plain = tiny("llama")
    reference = read(plain, ids)
    mine = ids[rows]
    here, stages = dist.get_rank(group), dist.get_world_size(group) * len(modules)
    last = here == dist.get_world_size(group) - 1

    def run(schedule: Any, losses: list[torch.Tensor]) -> torch.Tensor | None:
        return schedule.step(*([mine] if here == 0 else []), target=mine if last else None, losses=losses)

    # what is read
    acts: dict[str, list[torch.Tensor]] = {}
    flex = FlexModel(
        modules if len(modules) > 1 else modules[0],
        acts,
        pipeline_parallel_size=dist.get_world_size(group),
        **(sizes or {}),
    )
    expected: dict[str, torch.Tensor] = {}
    for kind, found in (
        ("forward", reference.outputs),
        ("forward_pre", reference.inputs),
        ("full_backward_pre", reference.output_grads),
        ("full_backward", reference.input_grads),
    ):
        for site, value in found.items():
            if site == "model" or (site.endswith("rotary_emb") and kind != "forward"):
                continue
            getattr(flex, f"register_{kind}_hook")(HookFunction(site, key=f"{site}:{kind}"))
            expected[f"{site}:{kind}"] = value
    schedule = schedule_of(modules, stages)
    for step in range(2):
        losses: list[torch.Tensor] = []
        with flex.pipeline(schedule):
            out = run(schedule, losses)
        if last:
            close(out, reference.logits[rows], f"{name}: logits", tolerance)
        for module in modules:
            for path, parameter in module.named_parameters():
                close(full(parameter.grad), reference.weights[path], f"{name}: gradient of {path}", tolerance)
            module.zero_grad()
        if dist.get_rank() == 0:
            assert set(acts) == set(expected), set(acts) ^ set(expected)
            for site, value in expected.items():
                assert len(acts[site]) == step + 1, f"{name}: {site} {len(acts[site])}"
                close(acts[site][step], value, f"{name}: {site}", tolerance)
        else:
            assert not acts
    assert flex.restore() is (flex.module)
    for module in modules:
        assert_no_trace(module)
    assert all("forward_one_chunk" not in vars(stage) for stage in getattr(schedule, "_stages", [None]) if stage)

    # what is edited
    widths = {"w64": HIDDEN, "w112": NEURONS}
    want = edited(plain, ids, PLACES, {key: mixing(width) for key, width in widths.items()}, function=edit_rows)
    flex = FlexModel(
        modules if len(modules) > 1 else modules[0],
        {},
        pipeline_parallel_size=dist.get_world_size(group),
        **(sizes or {}),
    )
    for key, width in widths.items():
        flex.register_trainable_module(key, mixing(width, seed=5 + dist.get_rank()))
    for site, side in PLACES.items():
        register = flex.register_forward_hook if side == "output" else flex.register_forward_pre_hook
        register(HookFunction(site, editing_function=edit_rows))
    losses = []
    with flex.pipeline(schedule):
        out = run(schedule, losses)
    if last:
        close(out, want.logits[rows], f"{name}: edited logits", tolerance)
    for module in modules:
        for path, parameter in module.named_parameters():
            close(full(parameter.grad), want.weights[path], f"{name}: gradient of {path} under edits", tolerance)
        module.zero_grad()
    owned = {name for module in modules for name, _ in module.named_modules()}
    for path, parameter in flex.trainable_modules.named_parameters():
        site = next(iter(PLACES)) if path.startswith("w64") else list(PLACES)[1]
        if site in owned:
            close(parameter.grad, want.weights[path], f"{name}: gradient of {path}", tolerance)
        else:
            assert parameter.grad is None
    flex.restore()


def one_stage(schedule: Any, group: Any = None) -> Any:
    def make(modules: list[nn.Module], stages: int) -> Any:
        stage = PipelineStage(modules[0], dist.get_rank(group), stages, torch.device("cpu"), group=group)
        return schedule(stage, MICROBATCHES, loss_fn=loss_of)

    return make


@check(2)
def gpipe() -> None:
    study("GPipe", [halves(tiny("llama"), 2, dist.get_rank())], one_stage(ScheduleGPipe), dist.group.WORLD)


@check(2)
def one_forward_one_backward() -> None:
    study("1F1B", [halves(tiny("llama"), 2, dist.get_rank())], one_stage(Schedule1F1B), dist.group.WORLD)


@check(2)
def interleaved() -> None:
    whole, rank = tiny("llama"), dist.get_rank()

    def make(modules: list[nn.Module], stages: int) -> Any:
        made = [
            PipelineStage(module, rank + 2 * number, stages, torch.device("cpu"))
            for number, module in enumerate(modules)
        ]
        return ScheduleInterleaved1F1B(made, MICROBATCHES, loss_fn=loss_of)

    study("interleaved", [halves(whole, 4, rank), halves(whole, 4, rank + 2)], make, dist.group.WORLD)


@check(2)
def the_wrapper_itself_can_be_the_stage() -> None:
    """Then the schedule divides the gradients of trainable modules too, and they must not be divided twice."""
    ids, rank = token_ids(ROWS, LENGTH), dist.get_rank()
    want = edited(tiny("llama"), ids, {"model.layers.1": "output"}, {"w": mixing(HIDDEN)}, function=edit_rows)
    flex = FlexModel(halves(tiny("llama"), 2, rank), {}, pipeline_parallel_size=2)
    flex.register_trainable_module("w", mixing(HIDDEN))
    flex.register_forward_hook(HookFunction("model.layers.1", editing_function=edit_rows))
    schedule = one_stage(ScheduleGPipe)([flex], 2)
    with flex.pipeline(schedule):
        schedule.step(*([ids] if rank == 0 else []), target=ids if rank else None, losses=[])
    if rank == 0:
        close(flex.trainable_modules["w"].weight.grad, want.weights["w.weight"], "w")


@check(2)
def mistakes_are_named() -> None:
    ids, rank = token_ids(ROWS, LENGTH), dist.get_rank()
    flex = FlexModel(halves(tiny("llama"), 2, rank), {}, pipeline_parallel_size=2)
    with pytest.raises(SiteError, match=r"did you mean model\.layers\.3\.mlp"):
        flex.register_forward_hook(HookFunction("model.layers.3.mpl"))
    flex.register_forward_hook(HookFunction("model.layers.3.mlp"))
    schedule = one_stage(ScheduleGPipe)([flex.module], 2)
    if rank == 0:
        with pytest.raises(HookError, match="outside a pipeline step"):
            flex(ids)
    flex.restore()
    dist.barrier()
    flex = FlexModel(halves(tiny("llama"), 2, rank), {}, pipeline_parallel_size=2)
    flex.register_hook(HookFunction("model.layers.0.mlp.up_proj.weight"))
    with pytest.raises(HookError, match="parameters cannot be used in a pipeline"), flex.pipeline(schedule):
        pass


@check(4)
def pipeline_and_tensor() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "tp"))
    model = shard(tiny("llama"), mesh=mesh["tp"])
    group = mesh["pp"].get_group()
    stage = halves(model, 2, mesh["pp"].get_local_rank())
    study("PP × TP", [stage], one_stage(Schedule1F1B, group), group)


@check(4)
def pipeline_and_fsdp2() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    group = mesh["pp"].get_group()
    stage = halves(tiny("llama"), 2, mesh["pp"].get_local_rank())
    for block in stage.model.layers.values():
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(stage, mesh=mesh["dp"])
    row = mesh["dp"].get_local_rank()
    study("PP × FSDP2", [stage], one_stage(ScheduleGPipe, group), group, slice(2 * row, 2 * row + 2))


@check(2)
def transformers_pipeline() -> None:
    """Every rank calls the whole model, and modules of other stages pass their input on."""
    import transformers
    from transformers.distributed import DistributedConfig

    with saved("llama") as folder:
        model = transformers.LlamaForCausalLM.from_pretrained(
            folder, distributed_config=DistributedConfig(pp_size=2)
        ).eval()
    ids, rank = token_ids(ROWS, LENGTH), dist.get_rank()
    plain = tiny("llama")
    reference = read(plain, ids)
    acts: dict[str, list[torch.Tensor]] = {}
    flex = FlexModel(model, acts)
    names = [name for name in reference.outputs if name != "model"]
    for name in names:
        flex.register_forward_hook(HookFunction(name))
    with torch.no_grad():
        close(logits_of(flex, ids), reference.logits, "logits")
    if rank == 0:
        assert set(acts) == set(names)
        for name in names:
            close(acts[name][0], reference.outputs[name], name)
    flex.restore()
    want = edited(plain, ids, PLACES, {"w64": mixing(HIDDEN), "w112": mixing(NEURONS)}, function=edit_rows)
    flex = FlexModel(model, None)
    for key, width in (("w64", HIDDEN), ("w112", NEURONS)):
        flex.register_trainable_module(key, mixing(width))
    flex.register_forward_hook(HookFunction("model.layers.1", editing_function=edit_rows))
    flex.register_forward_pre_hook(HookFunction("model.layers.2.mlp.down_proj", editing_function=edit_rows))
    with torch.no_grad():
        close(logits_of(flex, ids), want.logits, "edited logits")
