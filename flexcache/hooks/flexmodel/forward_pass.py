"""A pass through a model: what is registered, what runs, and what was read in it so far."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch

from flexcache.hooks.flexmodel.hook_function import HookFunction, Kind
from flexcache.parallel.distribution import Piece


@dataclass
class Hook:
    """A hook function as registered: its kind, its number in the order of registration, and whether it is on."""

    number: int
    function: HookFunction
    kind: Kind
    enabled: bool = True

    @property
    def where(self) -> str:
        """The hook's name in errors."""
        return f"{self.function.module_name} ({self.kind})"

    @property
    def reads_input(self) -> bool:
        """Whether it is on the input side of its module."""
        return self.kind in ("forward_pre", "full_backward")


@dataclass
class ForwardPass:
    """One forward, one pipeline step, or one backward pass.

    Attributes
    ----------
    fired
        Numbers of the hooks that fired.
    calls
        How many times each hook fired, by its number, the microbatch and the root that ran.
    root
        Identity of the root module that runs: stages may share a module, which runs once in each.
    nested
        It is the backward pass of a block that was run again within another backward pass (reentrant checkpointing).
    """

    pieces: list[Piece] = field(default_factory=list)
    fired: set[int] = field(default_factory=set)
    calls: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    root: int = 0
    nested: bool = False


@dataclass
class Step:
    """A step of a pipeline schedule.

    Attributes
    ----------
    scale
        By how much the schedule divides the gradients of its stages' weights at the end.
    divides_trainable
        Trainable modules are among these.
    chunk
        Number of the microbatch that runs; None between them.
    """

    microbatches: int
    scale: int
    divides_trainable: bool
    chunk: int | None = None


def in_backward() -> bool:
    """Whether autograd is running: a module that runs then is run again, by gradient checkpointing."""
    return torch._C._current_graph_task_id() != -1


def own_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy outside of any graph, in contiguous memory; an ordinary tensor also in inference mode."""
    if not torch.is_inference_mode_enabled() and not tensor.is_inference():
        return tensor.detach().clone(memory_format=torch.contiguous_format)
    with torch.inference_mode(False), torch.no_grad():
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
