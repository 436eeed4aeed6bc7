"""Data parallel: DDP, accelerate, FSDP, DeepSpeed, copies without a wrapper; ragged batches; what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import accelerate
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from flexcache.errors import ConfigError, HookError, LayoutError
from flexcache.hooks import FlexModel, HookFunction
from tests.distributed.reference import ROWS, Strategy, battery, close, gradient, logits_of, loss_of, read
from tests.distributed.registry import SkipError, check
from tests.models import checkpointed, tiny, token_ids


def my_rows() -> slice:
    each = ROWS // dist.get_world_size()
    return slice(dist.get_rank() * each, (dist.get_rank() + 1) * each)


@check(2)
def ddp() -> None:
    for family in ("llama", "gpt2"):
        # positions are shared by all rows: what an edit of theirs learns is the sum of what every rank adds
        places = None if family == "llama" else {"transformer.h.1": "output", "transformer.wpe": "output"}
        battery(Strategy(DistributedDataParallel(tiny(family)), my_rows(), family), dist.get_rank(), places)


@check(2)
def accelerator() -> None:
    prepared = accelerate.Accelerator(cpu=True).prepare(tiny("llama"))
    battery(Strategy(prepared, my_rows(), options={"data_parallel_size": 2}), dist.get_rank())


@check(2, 4)
def fsdp2() -> None:
    model = tiny("llama")
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    battery(Strategy(model, my_rows()), dist.get_rank())


@check(2)
def fsdp1() -> None:
    model = tiny("llama")
    for number, block in enumerate(model.model.layers):
        model.model.layers[number] = FullyShardedDataParallel(
            block, device_id=torch.device("cpu"), use_orig_params=True
        )
    model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    whole = partial(FullyShardedDataParallel.summon_full_params, with_grads=True)
    battery(Strategy(model, my_rows(), whole=whole), dist.get_rank())


@check(2, 3)
def copies_without_a_wrapper_and_ragged_batches() -> None:
    """Rows 5 = 2 + 2 + 1 or 3 + 2: put together in order, on rank 0; each copy by itself where no size is given."""
    ids, model = token_ids(5, 6), tiny("llama")
    rank, world = dist.get_rank(), dist.get_world_size()
    reference = read(tiny("llama"), ids)
    mine = ids.tensor_split(world)[rank]
    acts: dict[str, list[torch.Tensor]] = {}
    flex = FlexModel(model, acts, data_parallel_size=world)
    names = ["model.layers.1", "model.rotary_emb", "model.layers.3.mlp.act_fn", "lm_head"]
    for name in names:
        flex.register_forward_hook(HookFunction(name))
    flex.register_forward_hook(
        HookFunction("model.layers.2", record=False, editing_function=lambda m, x, c, t: x + 0 * x.flip(0))
    )
    for _ in range(2):
        close(logits_of(flex, mine), reference.logits.tensor_split(world)[rank], "logits")
    if rank == 0:
        for name in names:
            assert len(acts[name]) == 2
            close(acts[name][1], reference.outputs[name], name)
    else:
        assert not acts
    flex.restore()

    alone: dict[str, list[torch.Tensor]] = {}
    flex = FlexModel(model, alone)
    flex.register_forward_hook(HookFunction("model.layers.1"))
    logits_of(flex, mine)
    close(alone["model.layers.1"][0], reference.outputs["model.layers.1"].tensor_split(world)[rank], "alone")
    flex.restore()


@check(2)
def sequence_first_models_follow_each_other_along_their_rows() -> None:
    torch.manual_seed(0)

    class SequenceFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = nn.GRU(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.inner(x.transpose(0, 1))[0]).transpose(0, 1)

    model, x = SequenceFirst(), torch.randn(5, 7, 8)
    reference: dict[str, torch.Tensor] = {}
    handle = model.out.register_forward_hook(lambda m, a, o: reference.__setitem__("out", o.detach()))
    model(x)
    handle.remove()
    acts: dict[str, list[torch.Tensor]] = {}
    flex = FlexModel(model, acts, data_parallel_size=2)
    flex.register_forward_hook(HookFunction("out"))
    flex(x.tensor_split(2)[dist.get_rank()])
    if dist.get_rank() == 0:
        assert reference["out"].shape == (7, 5, 8)
        close(acts["out"][0], reference["out"], "out")


@check(2)
def lengths_that_differ_are_an_error_on_every_rank() -> None:
    acts: dict[str, list[torch.Tensor]] = {}
    flex = FlexModel(DistributedDataParallel(tiny("llama")), acts)
    flex.register_forward_hook(HookFunction("model.layers.1"))
    with pytest.raises(LayoutError, match=r"\(2, 6, 64\) and \(2, 9, 64\)"):
        logits_of(flex, token_ids(2, 6 + 3 * dist.get_rank()))
    assert not acts
    logits_of(flex, token_ids(2, 6))
    assert (len(acts) == 1) == (dist.get_rank() == 0)


@check(2)
def a_hook_enabled_on_one_rank_only_is_an_error_on_every_rank() -> None:
    flex = FlexModel(DistributedDataParallel(tiny("llama")), {})
    for layer in (1, 2):
        flex.register_forward_hook(HookFunction(f"model.layers.{layer}"))
    flex.update_hook_groups("layers.2", "late")
    groups = "all" if dist.get_rank() == 0 else "late"
    with pytest.raises(LayoutError, match="fired on some ranks only"):
        flex(input_ids=token_ids(2, 6), groups=groups)


@check(2)
def every_rank_gets_what_it_asks_for() -> None:
    ids, rank = token_ids(4, 6), dist.get_rank()
    reference = read(tiny("llama"), ids)
    for ranks, keeps in (("all", True), (1, rank == 1), ([0, 1], True), ([], False)):
        acts: dict[str, list[torch.Tensor]] = {}
        flex = FlexModel(DistributedDataParallel(tiny("llama")), acts, output_ranks=ranks)
        flex.register_forward_hook(HookFunction("module.model.layers.1"))
        logits_of(flex, ids[my_rows()])
        assert bool(acts) == keeps, (ranks, rank)
        if keeps:
            close(acts["module.model.layers.1"][0], reference.outputs["model.layers.1"], str(ranks))
        flex.restore()
    flex = FlexModel(DistributedDataParallel(tiny("llama")), {}, output_ranks=2)
    flex.register_forward_hook(HookFunction("model.layers.1"))
    with pytest.raises(ConfigError, match="output_ranks"):
        logits_of(flex, ids[my_rows()])


@check(2)
def sizes_are_found_and_checked() -> None:
    wrapped = DistributedDataParallel(tiny("llama"))
    for sizes, message in (
        ({"data_parallel_size": 1}, "data_parallel_size does not fit the model"),
        ({"tensor_parallel_size": 2}, "do not fit the number of processes"),
    ):
        flex = FlexModel(wrapped, {}, **sizes)
        flex.register_forward_hook(HookFunction("model.layers.1"))
        with pytest.raises(ConfigError, match=message):
            logits_of(flex, token_ids(2, 6))
        flex.restore()


@check(2)
def gradients_of_parameters_are_the_mean_over_ranks() -> None:
    ids = token_ids(ROWS, 6)
    reference = read(tiny("llama"), ids)
    name = "model.layers.1.mlp.up_proj.weight"
    for wrap in (DistributedDataParallel, fully_shard):
        acts: dict[str, list[torch.Tensor]] = {}
        model = wrap(tiny("llama"))
        flex = FlexModel(model, acts)
        flex.register_hook(HookFunction(name, editing_function=lambda m, grad, c, t: 2 * grad))
        loss_of(logits_of(flex, ids[my_rows()]), ids[my_rows()]).backward()
        if dist.get_rank() == 0:
            close(acts[name][0], reference.weights[name], f"{name} under {wrap.__name__}")
        close(gradient(model, name), 2 * reference.weights[name], f"edited {name} under {wrap.__name__}")
        flex.restore()
    flat = FullyShardedDataParallel(tiny("llama"), device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(HookError, match="flat parameters"):
        FlexModel(flat, {}).register_hook(HookFunction(name))


@check(2)
def gradients_can_be_edited() -> None:
    """A gradient edited at a block's output gives the weights before it the gradients of the plain model edited so."""
    ids, rank = token_ids(ROWS, 6), dist.get_rank()
    plain = tiny("llama")

    def double(grad: torch.Tensor) -> torch.Tensor:
        return 3 * grad + 0.5 * grad.flip(0)

    handle = plain.model.layers[2].register_forward_hook(lambda m, a, o: o.register_hook(double) and None)
    loss_of(logits_of(plain, ids), ids).backward()
    handle.remove()
    model = DistributedDataParallel(tiny("llama"))
    flex = FlexModel(model, {})
    flex.register_full_backward_pre_hook(
        HookFunction("model.layers.2", editing_function=lambda m, grad, c, t: double(grad))
    )
    loss_of(logits_of(flex, ids[my_rows()]), ids[my_rows()]).backward()
    for name, parameter in plain.named_parameters():
        close(gradient(model, name), parameter.grad, f"{name} on rank {rank}")


@check(2)
def checkpointing_recomputes_edits() -> None:
    for reentrant in (False, True):
        model = tiny("llama")
        checkpointed(model, reentrant)
        model.train()
        strategy = Strategy(DistributedDataParallel(model), my_rows())
        battery(strategy, dist.get_rank(), {"model.layers.2.mlp.down_proj": "input"})


@check(2)
def edits_draw_the_same_random_numbers() -> None:
    """Ranks with states of their own permute the rows of one batch alike."""
    torch.manual_seed(dist.get_rank())
    flex = FlexModel(DistributedDataParallel(tiny("llama")), acts := {}, output_ranks="all")
    flex.register_forward_hook(
        HookFunction("model.layers.1", key="before", editing_function=lambda m, x, c, t: x[torch.randperm(len(x))])
    )
    flex.register_forward_hook(HookFunction("model.layers.1", key="after"))
    for _ in range(3):
        logits_of(flex, token_ids(2, 6, seed=dist.get_rank()))
    orders = []
    for before, after in zip(acts["before"], acts["after"], strict=True):
        order = [int((row == before).flatten(1).all(1).nonzero()) for row in after]
        assert sorted(order) == [0, 1, 2, 3]
        orders.append(order)
    assert len({tuple(order) for order in orders}) > 1, "a new draw in every forward"


def zero_engines() -> Iterator[Any]:
    """Give a tiny model in an engine of DeepSpeed for ZeRO 2, then for ZeRO 3."""
    try:
        import deepspeed
    except ImportError as error:
        raise SkipError(f"DeepSpeed is not installed: {error}") from error
    for stage in (2, 3):
        model = tiny("llama")
        try:
            engine, *_ = deepspeed.initialize(
                model=model,
                config={
                    "train_micro_batch_size_per_gpu": 2,
                    "zero_optimization": {"stage": stage},
                    "zero_allow_untested_optimizer": True,
                    "zero_force_ds_cpu_optimizer": False,
                },
                optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
                dist_init_required=False,
            )
        except RuntimeError as error:  # its communication kernel is compiled when it is first used
            raise SkipError(f"DeepSpeed cannot compile its kernel here: {error}") from error
        yield engine
        engine.destroy()


@check(2, slow=True)
def deepspeed_zero() -> None:
    def whole_gradient(engine: Any, name: str) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(dict(engine.module.named_parameters())[name])

    for engine in zero_engines():
        strategy = Strategy(
            engine,
            my_rows(),
            backward=lambda engine, loss: engine.backward(loss),
            gradient=whole_gradient,
            reset=lambda engine: engine.step(),  # with a learning rate of 0: it lets go of the gradients
        )
        battery(strategy, dist.get_rank())
