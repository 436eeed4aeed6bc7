"""What all hooks of one FlexModel share: how the model is distributed, where activations go, what edits are given."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from flexcache.errors import HookError, LayoutError
from flexcache.hooks.flexmodel.forward_pass import ForwardPass, Hook, Step
from flexcache.hooks.flexmodel.pytree import input_leaf, tensor_leaf
from flexcache.parallel.assembly import Key
from flexcache.parallel.distribution import Distribution
from flexcache.parallel.layout import Layout, Local
from flexcache.parallel.meta_model import ShapeProbe

Output = dict[str, list[torch.Tensor]]


class SessionState:
    """The state of a FlexModel's hooks, apart from the pass under way.

    Attributes
    ----------
    hooks
        By number.
    modules
        Of each hook, by its number: several where pipeline stages share a module, none where another rank has it.
    step
        The step of a pipeline schedule under way, if any.
    """

    def __init__(
        self,
        distribute: Callable[[], Distribution],
        output: Output | None,
        keepers: Callable[[int], tuple[int, ...]],
    ) -> None:
        self.hooks: list[Hook] = []
        self.modules: dict[int, list[nn.Module]] = defaultdict(list)
        self.save_ctx = SimpleNamespace()
        self.trainable = nn.ModuleDict()
        self.step: Step | None = None
        self.output = output
        self._keepers = keepers
        self._distribute = distribute
        self._distribution: Distribution | None = None
        self._sent: set[str] = set()

    @property
    def distribution(self) -> Distribution:
        """How the model is distributed; found when it is first asked for, by all ranks together."""
        if self._distribution is None:
            self._distribution = self._distribute()
        return self._distribution

    def close(self) -> None:
        """Switch every hook off and give back what was held."""
        for hook in self.hooks:
            hook.enabled = False
        self.modules.clear()
        if self._distribution is not None:
            self._distribution.close()

    # Where and how much

    @property
    def chunk(self) -> int:
        """Number of the microbatch that runs; 0 outside of pipelines."""
        return 0 if self.step is None or self.step.chunk is None else self.step.chunk

    @property
    def scale(self) -> int:
        """Over how many data-parallel ranks and microbatches gradients are averaged."""
        return self.distribution.mesh.sizes.dp * (1 if self.step is None else self.step.scale)

    @property
    def spread(self) -> bool:
        """Whether this rank shares activations with others."""
        return len(self.distribution.mesh.plane) > 1

    def layout(self, hook: Hook, key: Key, local: Local) -> Layout:
        """Return how this rank's piece of an activation lies in the whole.

        Raises
        ------
        LayoutError
            It cannot be told, or the piece is inside experts, where rows are not tokens in order.
        HookError
            The whole is not of the shape that the hook function expects.
        """
        alone = self.distribution.alone
        if not alone and "experts" in hook.function.module_name.split(".")[:-1]:
            raise LayoutError(
                "activations inside experts cannot be put together",
                where=hook.where,
                expected="a module that sees every token once and in order",
                found="rows of (token, expert) pairs sorted by expert, those of its own experts or rows on each rank",
                remedy="hook the experts module as a whole, its router, or the MLP around it",
            )
        microbatches = 1 if self.step is None else self.step.microbatches
        expected = hook.function.expected_shape
        return self.distribution.layout(key, local, hook.where, expected, self._probes, microbatches)

    def edit(self, hook: Hook, module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the hook's editing function as a function of the whole activation, its result checked.

        Raises
        ------
        HookError
            When it is called: the result is not a tensor of the activation's shape.
        """
        function = hook.function.editing_function
        assert function is not None

        def edited(whole: torch.Tensor) -> torch.Tensor:
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

        return edited

    # Between ranks

    def send_trainable(self) -> None:
        """Give trainable modules rank 0's weights on every rank, once each. Collective."""
        for name, module in self.trainable.items():
            if name not in self._sent:
                self.distribution.share(module)
                self._sent.add(name)

    def join(self, done: ForwardPass, microbatches: int = 1) -> tuple[Mapping[Key, torch.Tensor], set[int]]:
        """Put the activations of a pass together, and return them with the numbers of hooks that fired on any rank.

        Collective, except in a single process.
        """
        if self.distribution.alone:
            return {piece.key: piece.tensor for piece in done.pieces}, done.fired
        keepers = self._keepers(len(self.distribution.mesh.ranks)) if self.output is not None else ()
        names = [hook.where for hook in self.hooks]
        return self.distribution.exchange(done.pieces, keepers, names, done.fired, microbatches)

    def append(self, whole: Mapping[Key, torch.Tensor]) -> None:
        """Append activations to the output, on the CPU."""
        if self.output is None:
            return
        for key in sorted(whole):
            tensor = whole[key]
            kept = tensor if tensor.device.type == "cpu" else tensor.to("cpu")
            self.output.setdefault(self.hooks[key.hook].function.name, []).append(kept)

    def _probes(self) -> Sequence[ShapeProbe]:
        return [
            ShapeProbe(hook.number, module, _reader(hook))
            for hook in self.hooks
            if hook.kind != "tensor"
            for module in self.modules[hook.number]
        ]


def _reader(hook: Hook) -> Callable[[tuple[Any, ...], dict[str, Any], Any], torch.Tensor | None]:
    def read(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> torch.Tensor | None:
        try:
            if hook.reads_input:
                return input_leaf(args, kwargs, hook.function.unpack_idx, hook.where)[0]
            return tensor_leaf(output, hook.function.unpack_idx, hook.where)[0]
        except HookError:
            return None

    return read
