"""Gradients of activations and weights: read and edited during the backward pass, assembled at its end."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial

import torch

from flexcache.errors import HookError
from flexcache.hooks.flexmodel.forward_pass import ForwardPass, RegisteredHook, detached_copy, in_backward
from flexcache.hooks.flexmodel.session_state import SessionState
from flexcache.parallel.distribution import LocalPiece
from flexcache.parallel.header import ActivationKey
from flexcache.parallel.layout import Layout, localize
from flexcache.parallel.shard_group import select_part


class Gradients:
    """The backward hooks of a FlexModel.

    They are hooks on tensors, registered in the forward, since backward hooks of modules raise if a tensor is changed
    in place. The gradients of a backward pass are assembled by a callback of autograd when it ends, those of a pipeline
    step when the step ends.
    """

    def __init__(self, state: SessionState) -> None:
        self._state = state
        self._passes: dict[int, ForwardPass] = {}  # by autograd's number of the backward pass
        self._step: ForwardPass | None = None
        self._watched: set[int] = set()

    def watch_tensor(
        self, hook: RegisteredHook, leaf: torch.Tensor, key: ActivationKey, module: torch.nn.Module
    ) -> None:
        """Read the gradient of a tensor in the backward pass.

        Raises
        ------
        HookError
            The forward records a graph, and the tensor is not in it.
        """
        if not torch.is_grad_enabled():
            return
        if not leaf.requires_grad:
            if in_backward():
                return
            raise HookError(
                "no gradient reaches the place that a backward hook reads",
                where=hook.where,
                expected="a tensor that requires grad",
                found=f"{tuple(leaf.shape)} of {leaf.dtype} that does not",
                remedy="require gradients of weights before this place, or of the embedding's output"
                " (model.enable_input_require_grads()), or disable the hook's group",
            )
        layout = replace(self._state.layout(hook, key, localize(leaf, hook.where)), gradient=True)
        chunk, scale = self._state.chunk, self._state.scale
        nested = in_backward()
        if not nested:
            self._watched.add(hook.number)
        leaf.register_hook(lambda grad: self._read(hook, module, grad, key, chunk, layout, scale, nested))

    def read_weight(self, hook: RegisteredHook, grad: torch.Tensor, reduced: bool) -> torch.Tensor | None:
        """Read the gradient of a parameter, and return the edited one if there is an edit.

        Parameters
        ----------
        reduced
            True if the gradient is already averaged over data-parallel ranks.
        """
        whole, mesh = grad, getattr(grad, "device_mesh", None)
        if mesh is not None:
            whole = grad.full_tensor()  # type: ignore[attr-defined]
        if not reduced and not self._state.distribution.is_alone:
            whole = self._state.distribution.average_over_copies(whole)
        current = self._current_pass(hook)
        if hook.function.record:
            key = ActivationKey(hook.number, sum(piece.key.hook == hook.number for piece in current.pieces))
            current.pieces.append(LocalPiece(key, 0, detached_copy(whole), Layout(tuple(whole.shape), None, None)))
        if hook.function.editing_function is None:
            return None
        with torch.no_grad():
            edited = self._state.edit(hook, self._state.modules[hook.number][0], whole.clone())
        if mesh is None:
            return edited
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(edited, mesh, grad.placements, src_data_rank=None)  # type: ignore[attr-defined]

    def begin_step(self) -> None:
        """Drop the state of an earlier pass, and collect gradients until `end_step`."""
        self.clear()
        self._step = ForwardPass()

    def end_step(self, microbatches: int) -> None:
        """Assemble the gradients of a pipeline step. Collective."""
        done = self._step
        assert done is not None
        told = self._state.distribution.gather_objects((sorted(self._watched), bool(done.fired)))
        if any(fired for _, fired in told):  # else the schedule has run no backward pass
            self._deliver(done, {number for numbers, _ in told for number in numbers}, microbatches)

    def abandon(self) -> None:
        """Drop backward passes that raised and never ended."""
        self._passes.clear()

    def clear(self) -> None:
        """Drop all passes that have not ended."""
        self.abandon()
        self._step, self._watched = None, set()

    def _read(
        self,
        hook: RegisteredHook,
        module: torch.nn.Module,
        grad: torch.Tensor,
        key: ActivationKey,
        chunk: int,
        layout: Layout,
        scale: int,
        nested: bool,
    ) -> torch.Tensor | None:
        if not hook.enabled:
            return None
        local = localize(grad, hook.where)
        if local.known:
            layout = replace(layout, shape=local.shape, sharded=local.sharded)
        current = self._current_pass(hook)
        current.nested |= nested
        if hook.function.record:
            mine = detached_copy(local.tensor)
            current.pieces.append(LocalPiece(key, chunk, mine.div_(scale) if scale > 1 else mine, layout))
        if hook.function.editing_function is None:
            return None
        edit = partial(self._state.edit, hook, module)
        with torch.no_grad():
            if not self._state.is_shared:
                return local.restore(edit(local.tensor / scale) * scale)
            distribution = self._state.distribution
            microbatches = scale // distribution.mesh.sizes.dp
            with distribution.edit_group(key, local.tensor, layout, hook.where, microbatches, chunk) as group:
                whole = edit(group.gather_pieces(local.tensor, gradient=True) / scale)
                return local.restore((select_part(whole, group.own) * group.gradient_weight).contiguous())

    def _current_pass(self, hook: RegisteredHook) -> ForwardPass:
        number = torch._C._current_graph_task_id()
        current = self._step or self._passes.get(number)
        if current is None:
            current = self._passes[number] = ForwardPass()
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._end(number))
        current.fired.add(hook.number)
        return current

    def _end(self, number: int) -> None:
        done = self._passes.pop(number, None)
        if done is not None:
            # a pass inside another, of a checkpointed block, tells nothing about hooks outside the block
            watched, self._watched = (set(), self._watched - done.fired) if done.nested else (self._watched, set())
            self._deliver(done, watched)

    def _deliver(self, done: ForwardPass, watched: set[int], microbatches: int = 1) -> None:
        whole, fired = self._state.assemble(done, microbatches)
        self._state.append_activations(whole)
        silent = [self._state.hooks[number].where for number in sorted(watched - fired)]
        if silent:
            warnings.warn(
                f"no gradient reached {', '.join(silent[:8])} in this backward pass: the loss does not depend on it",
                stacklevel=2,
            )
