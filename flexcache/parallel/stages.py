"""The pipeline stages of this process, as one module that runs forward only."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from flexcache.errors import ConfigError
from flexcache.parallel.peers import exchange_tensors

MAX_DIMS = 6
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class PipelineIdentityLayer(nn.Identity):
    """A placeholder for a block of another stage; transformers' own pipelines have a module of this name there."""


class Stages(nn.Module):
    """Stages of `torch.distributed.pipelining` that a planned batch passes through one after the other.

    Every process of the pipeline calls it with the same token ids. The first stage reads them. Each stage sends its
    output to the next, and starts the next batch while that one computes. No schedule is used, since a schedule fixes
    the shape of its batches, and planned batches differ in shape.

    A stage reads token ids, or the one tensor that the stage before it returns. It receives no attention mask:
    sequences are padded on the right, where causal attention ignores padding. Blocks have their number in the whole
    model as the key in a ModuleDict: ``model.layers.17``.

    Creating it is collective in the pipeline.

    Attributes
    ----------
    path : str
        Path of the container of the blocks.
    blocks : ModuleList
        All blocks of the model, with placeholders for those of other processes.
    inputs : list of tensor
        The last input of each stage of this process.

    Raises
    ------
    ConfigError
        There are no stages, or their blocks cannot be found.
    """

    blocks: nn.ModuleList

    def __init__(self, stages: Sequence[Any]) -> None:
        super().__init__()
        if not stages or not all(hasattr(stage, "submod") and hasattr(stage, "stage_index") for stage in stages):
            raise ConfigError(
                "the model is not a pipeline stage",
                expected="a torch.distributed.pipelining.PipelineStage, or a list of them",
                found=", ".join(type(stage).__name__ for stage in stages) or "nothing",
            )
        self._stages = sorted(stages, key=lambda stage: stage.stage_index)
        self.parts = nn.ModuleList(stage.submod for stage in self._stages)
        self.group = stages[0].group if stages[0].group is not None else dist.group.WORLD
        self.inputs: list[torch.Tensor] = []
        here = {name: sorted(found) for part in self.parts for name, found in _numbered(part).items()}
        told: list[Any] = [None] * dist.get_world_size(self.group)
        vocabulary = max((m.num_embeddings for m in self.modules() if isinstance(m, nn.Embedding)), default=0)
        dist.all_gather_object(told, (here, vocabulary), group=self.group)
        depths = {
            name: 1 + max(max(numbers[name], default=-1) for numbers, _ in told if name in numbers)
            for name in sorted(set().union(*(numbers for numbers, _ in told)))
        }
        if not depths:
            raise ConfigError(
                "the blocks of the pipeline cannot be found",
                where=", ".join(type(part).__name__ for part in self.parts),
                expected="a ModuleDict whose keys are the numbers of the blocks in the whole model",
            )
        self.path = max(depths, key=lambda name: depths[name])
        own = {number: block for part in self.parts for number, block in _numbered(part).get(self.path, {}).items()}
        blocks = [own.get(number) or PipelineIdentityLayer() for number in range(depths[self.path])]
        object.__setattr__(
            self, "blocks", nn.ModuleList(blocks)
        )  # not a child of this module: names stay those of the model
        self.config = SimpleNamespace(vocab_size=max(size for _, size in told), num_hidden_layers=len(blocks))

    def forward(self, input_ids: torch.Tensor) -> Any:
        """Run this process's stages; return the output of the last stage of all, or None on other processes."""
        output, self.inputs = None, []
        for stage in self._stages:
            places, index = stage.stage_index_to_group_rank, stage.stage_index
            given = input_ids if index == 0 else self._receive(places[index - 1], input_ids.device)
            self.inputs.append(given)
            found = stage.submod(given)
            if index == stage.num_stages - 1:
                output = found
            else:
                self._send(places[index + 1], found)
        return output

    def _send(self, rank: int, tensor: Any) -> None:
        if not isinstance(tensor, torch.Tensor) or tensor.ndim > MAX_DIMS or tensor.dtype not in _DTYPES:
            raise ConfigError(
                "a stage returns something that cannot be sent to the next",
                expected=f"one tensor of up to {MAX_DIMS} dims, of a floating-point dtype",
                found=f"{tuple(tensor.shape)} of {tensor.dtype}"
                if isinstance(tensor, torch.Tensor)
                else type(tensor).__name__,
            )
        header = [_DTYPES.index(tensor.dtype), tensor.ndim, *tensor.shape, *[0] * (MAX_DIMS - tensor.ndim)]
        exchange_tensors(self.group, [(rank, torch.tensor(header, device=tensor.device))], [])
        exchange_tensors(self.group, [(rank, tensor)], [])

    def _receive(self, rank: int, device: torch.device) -> torch.Tensor:
        header = torch.zeros(2 + MAX_DIMS, dtype=torch.int64, device=device)
        exchange_tensors(self.group, [], [(rank, header)])
        dtype, ndim, *shape = header.tolist()
        tensor = torch.empty(shape[:ndim], dtype=_DTYPES[dtype], device=device)
        exchange_tensors(self.group, [], [(rank, tensor)])
        return tensor


def _numbered(part: nn.Module) -> dict[str, dict[int, nn.Module]]:
    """Return, by the path of each ModuleDict with numbers as keys, its modules by number."""
    return {
        name: {int(key): block for key, block in module.items()}
        for name, module in part.named_modules()
        if isinstance(module, nn.ModuleDict) and len(module) and all(key.isdigit() for key in module)
    }
