"""A pass through a model: its registered hooks, its step of a pipeline, and the pieces read so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from flexcache.hooks.flexmodel.hook_function import HookFunction, Kind
from flexcache.parallel.distribution import LocalPiece
from flexcache.parallel.header import ActivationKey


@dataclass
class RegisteredHook:
    """A registered hook function: its kind, its number in the order of registration, and whether it is active."""

    number: int
    function: HookFunction
    kind: Kind
    enabled: bool = True

    @cached_property
    def where(self) -> str:
        """The name of the hook in errors."""
        return f"{self.function.module_name} ({self.kind})"

    @property
    def reads_input(self) -> bool:
        """True if the hook is on the input side of its module."""
        return self.kind in ("forward_pre", "full_backward")


@dataclass
class ForwardPass:
    """One forward, one pipeline step, or one backward pass.

    Attributes
    ----------
    fired
        Numbers of the hooks that fired.
    calls
        Number of times that each hook fired, by its number, the microbatch and the root.
    alone
        True if this process has the whole model and the whole batch: activations then are in *whole*, and only those
        that are not plain tensors in *pieces*.
    root
        Identity of the root module that runs: stages may share a module, which then runs once in each.
    nested
        True for the backward pass of a block that runs again inside another backward pass (reentrant checkpointing).
    """

    pieces: list[LocalPiece] = field(default_factory=list)
    fired: set[int] = field(default_factory=set)
    calls: dict[tuple[int, int, int], int] = field(default_factory=dict)
    root: int = 0
    nested: bool = False
    alone: bool = False
    whole: dict[ActivationKey, torch.Tensor] = field(default_factory=dict)

    def next_key(self, hook: int, chunk: int) -> ActivationKey:
        """Return the key of the activation at which a hook fires, and count the call."""
        place = hook, chunk, self.root
        call = self.calls.get(place, 0)
        self.calls[place] = call + 1
        self.fired.add(hook)
        return ActivationKey(hook, call)


@dataclass
class PipelineStep:
    """A step of a pipeline schedule.

    Attributes
    ----------
    scale
        The divisor that the schedule applies to the gradients of its stages' weights at the end.
    divides_trainable
        True if trainable modules are among these weights.
    chunk
        Number of the microbatch that runs; None between microbatches.
    """

    microbatches: int
    scale: int
    divides_trainable: bool
    chunk: int | None = None

    @contextmanager
    def number_microbatches(self, stages: Sequence[Any]) -> Iterator[None]:
        """Set `chunk` while a stage of torch's pipelining runs a microbatch; restore the stages on exit."""
        before = [vars(stage).get("forward_one_chunk") for stage in stages]
        for stage in stages:
            stage.forward_one_chunk = self._numbered(stage.forward_one_chunk)
        try:
            yield
        finally:
            for stage, original in zip(stages, before, strict=True):
                if original is None:
                    del stage.forward_one_chunk
                else:
                    stage.forward_one_chunk = original

    def _numbered(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def forward_one_chunk(chunk: int, *args: Any, **kwargs: Any) -> Any:
            self.chunk = chunk
            try:
                return run(chunk, *args, **kwargs)
            finally:
                self.chunk = None

        return forward_one_chunk


def in_backward() -> bool:
    """Return True if autograd is running: modules then run again for gradient checkpointing."""
    return torch._C._current_graph_task_id() != -1


def detached_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy outside any graph; in inference mode too it is an ordinary tensor."""
    if not torch.is_inference_mode_enabled() and not tensor.is_inference():
        plain = tensor.detach() if tensor.requires_grad else tensor
        return plain.clone() if plain.is_contiguous() else plain.contiguous()
    with torch.inference_mode(False), torch.no_grad():
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
