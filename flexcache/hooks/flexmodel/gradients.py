"""Gradients of activations and of weights, read and edited while autograd runs, and put together at its end."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch

from flexcache.errors import HookError
from flexcache.hooks.flexmodel.forward_pass import ForwardPass, Hook, in_backward, own_copy
from flexcache.hooks.flexmodel.session_state import SessionState
from flexcache.parallel.assembly import Key
from flexcache.parallel.distribution import Piece
from flexcache.parallel.layout import Layout, localize
from flexcache.parallel.shard_group import cut


class Gradients:
    """The backward hooks of a FlexModel.

    They are hooks on tensors, set in the forward: modules' own backward hooks refuse what is changed in place. The
    gradients of one backward pass are put together by a callback of autograd when it ends; those of a pipeline step
    when the step ends.
    """

    def __init__(self, shared: SessionState) -> None:
        self._shared = shared
        self._passes: dict[int, ForwardPass] = {}  # by autograd's number of the backward pass
        self._step: ForwardPass | None = None
        self._watched: set[int] = set()

    def watch(self, hook: Hook, leaf: torch.Tensor, key: Key, module: torch.nn.Module) -> None:
        """Read the gradient of a tensor when it is there.

        Raises
        ------
        HookError
            In a forward that records a graph: the tensor is not in it.
        """
        if not torch.is_grad_enabled():
            return
        if not leaf.requires_grad:
            if in_backward():
                return
            raise HookError(
                "no gradient flows to where a backward hook reads it",
                where=hook.where,
                expected="a tensor that requires grad",
                found=f"{tuple(leaf.shape)} of {leaf.dtype} that does not",
                remedy="require grad of weights before this place or of the embedding's output"
                " (model.enable_input_require_grads()), or disable the hook's group",
            )
        layout = replace(self._shared.layout(hook, key, localize(leaf, hook.where)), gradient=True)
        chunk, scale = self._shared.chunk, self._shared.scale
        nested = in_backward()
        if not nested:
            self._watched.add(hook.number)
        leaf.register_hook(lambda grad: self._read(hook, module, grad, key, chunk, layout, scale, nested))

    def weight(self, hook: Hook, grad: torch.Tensor, reduced: bool) -> torch.Tensor | None:
        """Read the gradient of a parameter, and return the edited one if there is an edit.

        Parameters
        ----------
        reduced
            It is the mean over data-parallel ranks already.
        """
        whole, mesh = grad, getattr(grad, "device_mesh", None)
        if mesh is not None:
            whole = grad.full_tensor()  # type: ignore[attr-defined]
        if not reduced and not self._shared.distribution.alone:
            whole = self._shared.distribution.mean(whole)
        under_way = self._under_way(hook)
        if hook.function.record:
            key = Key(hook.number, sum(piece.key.hook == hook.number for piece in under_way.pieces))
            under_way.pieces.append(Piece(key, 0, own_copy(whole), Layout(tuple(whole.shape), None, None)))
        if hook.function.editing_function is None:
            return None
        with torch.no_grad():
            edited = self._shared.edit(hook, self._shared.modules[hook.number][0])(whole.clone())
        if mesh is None:
            return edited
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(edited, mesh, grad.placements, src_data_rank=None)  # type: ignore[attr-defined]

    def begin_step(self) -> None:
        """Forget what an earlier pass left, and take gradients until `end_step`."""
        self.clear()
        self._step = ForwardPass()

    def end_step(self, microbatches: int) -> None:
        """Put the gradients of a pipeline step together. Collective."""
        done = self._step
        assert done is not None
        told = self._shared.distribution.gathered((sorted(self._watched), bool(done.fired)))
        if any(fired for _, fired in told):  # else the schedule has run no backward pass
            self._deliver(done, {number for numbers, _ in told for number in numbers}, microbatches)

    def abandon(self) -> None:
        """Forget backward passes that never ended, since something in them raised."""
        self._passes.clear()

    def clear(self) -> None:
        """Forget what is under way."""
        self.abandon()
        self._step, self._watched = None, set()

    def _read(
        self,
        hook: Hook,
        module: torch.nn.Module,
        grad: torch.Tensor,
        key: Key,
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
        under_way = self._under_way(hook)
        under_way.nested |= nested
        if hook.function.record:
            mine = own_copy(local.tensor)
            under_way.pieces.append(Piece(key, chunk, mine.div_(scale) if scale > 1 else mine, layout))
        if hook.function.editing_function is None:
            return None
        edit = self._shared.edit(hook, module)
        with torch.no_grad():
            if not self._shared.spread:
                return local.restore(edit(local.tensor / scale) * scale)
            distribution = self._shared.distribution
            microbatches = scale // distribution.mesh.sizes.dp
            with distribution.editing(key, local.tensor, layout, hook.where, microbatches, chunk) as plane:
                whole = edit(plane.gather(local.tensor, gradient=True) / scale)
                return local.restore((cut(whole, plane.own) * plane.weight).contiguous())

    def _under_way(self, hook: Hook) -> ForwardPass:
        number = torch._C._current_graph_task_id()
        under_way = self._step or self._passes.get(number)
        if under_way is None:
            under_way = self._passes[number] = ForwardPass()
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._end(number))
        under_way.fired.add(hook.number)
        return under_way

    def _end(self, number: int) -> None:
        done = self._passes.pop(number, None)
        if done is not None:
            # a pass within another, of a checkpointed block, says nothing of hooks outside of the block
            watched, self._watched = (set(), self._watched - done.fired) if done.nested else (self._watched, set())
            self._deliver(done, watched)

    def _deliver(self, done: ForwardPass, watched: set[int], microbatches: int = 1) -> None:
        whole, fired = self._shared.join(done, microbatches)
        self._shared.append(whole)
        silent = [self._shared.hooks[number].where for number in sorted(watched - fired)]
        if silent:
            warnings.warn(
                f"no gradient reached {', '.join(silent[:8])} in this backward pass: the loss does not depend on it",
                stacklevel=2,
            )
