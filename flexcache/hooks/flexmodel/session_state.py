"""The state that all hooks of one FlexModel share: distribution, output and edits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from flexcache.errors import HookError, LayoutError
from flexcache.hooks.flexmodel.forward_pass import ForwardPass, PipelineStep, RegisteredHook
from flexcache.hooks.flexmodel.pytree import find_input_tensor, find_tensor
from flexcache.parallel.distribution import Distribution
from flexcache.parallel.header import ActivationKey
from flexcache.parallel.layout import Layout, Local
from flexcache.parallel.meta_model import ShapeProbe

Output = dict[str, list[torch.Tensor]]


class SessionState:
    """The state of a FlexModel's hooks, without that of the current pass.

    Attributes
    ----------
    hooks
        By number.
    modules
        The modules of each hook, by its number: several if pipeline stages share a module, none if another rank has it.
    step
        The current step of a pipeline schedule, or None.
    """

    def __init__(
        self,
        distribute: Callable[[], Distribution],
        output: Output | None,
        output_ranks: Callable[[int], tuple[int, ...]],
    ) -> None:
        self.hooks: list[RegisteredHook] = []
        self.modules: dict[int, list[nn.Module]] = defaultdict(list)
        self.save_ctx = SimpleNamespace()
        self.trainable = nn.ModuleDict()
        self.step: PipelineStep | None = None
        self.output = output
        self._output_ranks = output_ranks
        self._distribute = distribute
        self._distribution: Distribution | None = None
        self._sent: set[str] = set()

    @property
    def distribution(self) -> Distribution:
        """The distribution of the model; found on first use, by all ranks together."""
        if self._distribution is None:
            self._distribution = self._distribute()
        return self._distribution

    def close(self) -> None:
        """Deactivate all hooks and release the process group."""
        for hook in self.hooks:
            hook.enabled = False
        self.modules.clear()
        if self._distribution is not None:
            self._distribution.close()

    # Where and how much

    @property
    def chunk(self) -> int:
        """Number of the microbatch that runs; 0 outside pipelines."""
        return 0 if self.step is None or self.step.chunk is None else self.step.chunk

    @property
    def scale(self) -> int:
        """Number of data-parallel ranks times microbatches over which gradients are averaged."""
        return self.distribution.mesh.sizes.dp * (1 if self.step is None else self.step.scale)

    @property
    def is_shared(self) -> bool:
        """True if this rank shares activations with others."""
        return len(self.distribution.mesh.stage_ranks) > 1

    def layout(self, hook: RegisteredHook, key: ActivationKey, local: Local) -> Layout:
        """Return the layout of this rank's piece in the whole activation.

        Raises
        ------
        LayoutError
            The layout is not known, or the piece is inside experts, where rows are not tokens in order.
        HookError
            The whole does not have the shape that the hook function expects.
        """
        alone = self.distribution.is_alone
        if not alone and "experts" in hook.function.module_name.split(".")[:-1]:
            raise LayoutError(
                "activations inside experts cannot be assembled",
                where=hook.where,
                expected="a module that sees every token once and in order",
                found="rows of (token, expert) pairs sorted by expert, on each rank only its own experts or rows",
                remedy="hook the experts module as a whole, its router, or the MLP around it",
            )
        microbatches = 1 if self.step is None else self.step.microbatches
        expected = hook.function.expected_shape
        return self.distribution.layout(key, local, hook.where, expected, self._probes, microbatches)

    def edit(self, hook: RegisteredHook, module: nn.Module, whole: torch.Tensor) -> torch.Tensor:
        """Return the result of the hook's editing function on a whole activation, which it may change in place.

        Raises
        ------
        HookError
            The result is not a tensor of the activation's shape.
        """
        function = hook.function.editing_function
        assert function is not None
        shape, dtype = whole.shape, whole.dtype
        result = function(module, whole, self.save_ctx, self.trainable)
        if not isinstance(result, torch.Tensor) or result.shape != shape:
            raise HookError(
                "an editing function did not return an activation",
                where=hook.where,
                expected=f"a tensor of shape {tuple(shape)}",
                found=f"shape {tuple(result.shape)}" if isinstance(result, torch.Tensor) else repr(result)[:80],
                remedy="return a tensor of the shape that the function was given",
            )
        return result if result.dtype == dtype else result.to(dtype)

    # Between ranks

    def send_trainable(self) -> None:
        """Send rank 0's weights of trainable modules to all ranks, once for each module. Collective."""
        for name, module in self.trainable.items():
            if name not in self._sent:
                self.distribution.broadcast_module(module)
                self._sent.add(name)

    def assemble(
        self, done: ForwardPass, microbatches: int = 1
    ) -> tuple[Mapping[ActivationKey, torch.Tensor], set[int]]:
        """Assemble the activations of a pass; return them and the numbers of hooks that fired on any rank.

        Collective, except in a single process.
        """
        if self.distribution.is_alone:
            return done.whole | {piece.key: piece.tensor for piece in done.pieces}, done.fired
        output_ranks = self._output_ranks(len(self.distribution.mesh.ranks)) if self.output is not None else ()
        names = [hook.where for hook in self.hooks]
        return self.distribution.assemble_activations(done.pieces, output_ranks, names, done.fired, microbatches)

    def append_activations(self, whole: Mapping[ActivationKey, torch.Tensor]) -> None:
        """Append activations to the output, on the CPU."""
        if self.output is None:
            return
        for key in sorted(whole):
            tensor = whole[key]
            self.output.setdefault(self.hooks[key.hook].function.name, []).append(
                tensor if tensor.is_cpu else tensor.cpu()
            )

    def _probes(self) -> Sequence[ShapeProbe]:
        return [
            ShapeProbe(hook.number, module, _reader(hook))
            for hook in self.hooks
            if hook.kind != "tensor"
            for module in self.modules[hook.number]
        ]


def _reader(hook: RegisteredHook) -> Callable[[tuple[Any, ...], dict[str, Any], Any], torch.Tensor | None]:
    def read(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> torch.Tensor | None:
        try:
            if hook.reads_input:
                return find_input_tensor(args, kwargs, hook.function.unpack_idx, hook.where)[0]
            return find_tensor(output, hook.function.unpack_idx, hook.where)[0]
        except HookError:
            return None

    return read
