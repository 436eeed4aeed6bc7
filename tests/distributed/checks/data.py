"""Data parallel: DDP, accelerate, FSDP, copies without a wrapper; ragged batches."""

from __future__ import annotations

import accelerate
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.reference import ROWS, Strategy, battery
from tests.distributed.registry import check
from tests.models import tiny


def my_rows() -> slice:
    each = ROWS // dist.get_world_size()
    return slice(dist.get_rank() * each, (dist.get_rank() + 1) * each)


@check(2)
def ddp() -> None:
    for family in ("llama", "gpt2"):
        places = None if family == "llama" else {"transformer.h.1": "output"}
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
    battery(Strategy(model, my_rows(), weights=False), dist.get_rank())
