"""The hooks of a FlexModel on a running model, and its current forward."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from flexcache.errors import HookError
from flexcache.hooks.flexmodel.forward_pass import ForwardPass, PipelineStep, RegisteredHook, detached_copy, in_backward
from flexcache.hooks.flexmodel.gradients import Gradients
from flexcache.hooks.flexmodel.hook_function import BACKWARD, HookFunction, Kind
from flexcache.hooks.flexmodel.pytree import find_input_tensor, find_tensor
from flexcache.hooks.flexmodel.session_state import Output, SessionState
from flexcache.hooks.locate.blocks import REMOTE_BLOCK
from flexcache.parallel.discover import runs_its_pipeline
from flexcache.parallel.distribution import Distribution, LocalPiece, Sizes
from flexcache.parallel.header import ActivationKey
from flexcache.parallel.layout import Local, localize


class Session:
    """Hooks on the modules under *roots*, until `close`.

    There is one torch hook on each side of each module that a hook function names, and on the roots, whose forward
    begins and ends a pass. During the forward each rank keeps its pieces of activations; at the end the ranks exchange
    headers and assemble the pieces. A forward that fails therefore records nothing, and ranks whose forwards differ get
    an error and no deadlock.

    Parameters
    ----------
    model
        The model as the user passed it, with wrappers.
    roots
        The modules whose forward is a pass: the unwrapped model, or the pipeline stages of this rank.
    """

    def __init__(
        self,
        model: nn.Module,
        roots: Sequence[nn.Module],
        output: Output | None,
        output_ranks: Callable[[int], tuple[int, ...]],
        sizes: Sizes,
        process_group: Any,
    ) -> None:
        self.state = SessionState(lambda: Distribution(model, sizes, process_group), output, output_ranks)
        self._gradients = Gradients(self.state)
        self._at: dict[tuple[int, str], list[RegisteredHook]] = defaultdict(list)
        self._handles: list[RemovableHandle] = []
        self._pass: ForwardPass | None = None
        self._edited: ForwardPass | None = None  # the pass that an editing function belongs to, while it runs
        self._called_whole = runs_its_pipeline(model)
        self._roots = {id(root) for root in roots}
        for root in roots:
            self._attach(root, "input")
            self._attach(root, "output")

    @property
    def hooks(self) -> list[RegisteredHook]:
        """The hooks in the order of registration."""
        return self.state.hooks

    # Registration

    def register(self, function: HookFunction, kind: Kind, modules: Iterable[nn.Module]) -> None:
        """Register a hook function on the modules of one name.

        These are several if stages share the module, and none if other ranks have it.
        """
        hook = self._add(function, kind)
        side = "input" if hook.reads_input else "output"
        for module in {id(module): module for module in modules}.values():
            if type(module).__name__ == REMOTE_BLOCK:
                continue
            self.state.modules[hook.number].append(module)
            if not self._at[id(module), side] and id(module) not in self._roots:
                self._attach(module, side)
            self._at[id(module), side].append(hook)

    def register_parameter(
        self, function: HookFunction, parameter: nn.Parameter | None, modules: Sequence[nn.Module], reduced: bool
    ) -> None:
        """Register a hook function on the gradient of a parameter.

        Parameters
        ----------
        parameter, modules
            The parameter and its module; None and empty if another stage has it.
        reduced
            True if the gradient arrives averaged over data-parallel ranks (FSDP2).
        """
        hook = self._add(function, "tensor")
        self.state.modules[hook.number].extend(modules)
        gradients = self._gradients
        if parameter is None:
            return
        if reduced:

            def after(weight: torch.Tensor) -> None:
                edited = (
                    gradients.read_weight(hook, weight.grad, True) if hook.enabled and weight.grad is not None else None
                )
                weight.grad = weight.grad if edited is None else edited

            self._handles.append(parameter.register_post_accumulate_grad_hook(after))
        else:
            self._handles.append(
                parameter.register_hook(lambda grad: gradients.read_weight(hook, grad, False) if hook.enabled else None)
            )

    def abandon(self) -> None:
        """Drop the current forward after it raised."""
        if self.state.step is None:
            self._pass = None

    def close(self) -> None:
        """Remove all hooks and release the process group."""
        while self._handles:
            self._handles.pop().remove()
        self._at.clear()
        self._pass = None
        self._gradients.clear()
        self.state.close()

    def _add(self, function: HookFunction, kind: Kind) -> RegisteredHook:
        hook = RegisteredHook(len(self.hooks), function, kind)
        self.hooks.append(hook)
        return hook

    def _attach(self, module: nn.Module, side: str) -> None:
        # Outside the hooks that distribute a module, on both sides: the values that the code around it sees.
        bound = self._at[id(module), side], id(module) in self._roots
        if side == "input":
            run = partial(self._on_input, *bound)
            handle = module.register_forward_pre_hook(run, prepend=True, with_kwargs=True)
        else:
            handle = module.register_forward_hook(partial(self._on_output, *bound))
        self._handles.append(handle)

    # What torch calls

    def _on_input(
        self,
        hooks: Sequence[RegisteredHook],
        root: bool,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if root:
            self._begin(module, args, kwargs)
        changed = False
        for hook in hooks:
            if not (hook.enabled and (self.state.step is None or self._listening())):
                continue
            leaf, rebuild = find_input_tensor(args, kwargs, hook.function.unpack_idx, hook.where)
            new = self._read(hook, module, leaf) if hook.kind == "forward_pre" else self._view_input(hook, module, leaf)
            if new is not None:
                args, kwargs = rebuild(new)
                changed = True
        return (args, kwargs) if changed else None

    def _on_output(
        self, hooks: Sequence[RegisteredHook], root: bool, module: nn.Module, args: tuple[Any, ...], output: Any
    ) -> Any:
        changed = False
        for hook in hooks:
            if not (hook.enabled and (self.state.step is None or self._listening())):
                continue
            leaf, rebuild = find_tensor(output, hook.function.unpack_idx, hook.where)
            if hook.kind == "full_backward_pre":
                self._gradients.watch_tensor(hook, leaf, self._key(hook), module)
            elif (new := self._read(hook, module, leaf)) is not None:
                output = rebuild(new)
                changed = True
        if root:
            self._end()
        return output if changed else None

    def _listening(self) -> bool:
        """Return True unless a schedule runs the stage only to learn shapes from empty tensors."""
        step = self.state.step
        return step is None or step.chunk is not None or in_backward()

    def _read(self, hook: RegisteredHook, module: nn.Module, leaf: torch.Tensor) -> torch.Tensor | None:
        """Record an activation, and return the edited one if there is an edit."""
        state, function, again = self.state, hook.function, in_backward()
        done = self._pass
        if done is not None and done.alone and not again and type(leaf) is torch.Tensor:
            key = done.next_key(hook.number, 0)
            if function.expected_shape is not None:
                state.layout(hook, key, Local(leaf))
            if function.record:
                done.whole[key] = detached_copy(leaf)
            return None if function.editing_function is None else self._edit(hook, module, leaf.clone())
        key = self._key(hook)
        local = localize(leaf, hook.where)
        layout = state.layout(hook, key, local)
        if function.record and not again:
            piece = LocalPiece(key, state.chunk, detached_copy(local.tensor), layout)
            if self._pass is not None:
                self._pass.pieces.append(piece)
            else:
                self._check_alone(hook)
                state.append_activations({key: piece.tensor})
        if function.editing_function is None:
            return None
        edit, step = partial(self._edit, hook, module), state.step
        microbatches = 1 if step is None or step.divides_trainable else step.scale
        if not state.is_shared and microbatches == 1:
            return local.restore(edit(local.tensor.clone()))
        with state.distribution.edit_group(key, local.tensor, layout, hook.where, microbatches, state.chunk) as group:
            return local.restore(group.edit_piece(local.tensor, edit))

    def _edit(self, hook: RegisteredHook, module: nn.Module, whole: torch.Tensor) -> torch.Tensor:
        """Return an edited activation; a forward of the model inside the editing function is a pass of its own."""
        before = self._pass, self._edited
        self._edited = self._pass
        try:
            return self.state.edit(hook, module, whole)
        finally:
            self._pass, self._edited = before

    def _view_input(self, hook: RegisteredHook, module: nn.Module, leaf: torch.Tensor) -> torch.Tensor | None:
        """Return a view of the input, whose gradient is the part that flows through this module only."""
        view = leaf.view_as(leaf) if torch.is_grad_enabled() and leaf.requires_grad else None
        self._gradients.watch_tensor(hook, leaf if view is None else view, self._key(hook), module)
        return view

    def _key(self, hook: RegisteredHook) -> ActivationKey:
        if self._pass is None or in_backward():
            return ActivationKey(hook.number, 0)
        return self._pass.next_key(hook.number, self.state.chunk)

    def _check_alone(self, hook: RegisteredHook) -> None:
        if not self.state.distribution.is_alone:
            raise HookError(
                "a module runs outside the model's forward, where ranks do not assemble activations",
                where=hook.where,
                remedy="call the whole model, or disable the hook's group",
            )

    # A pass

    def _begin(self, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if in_backward() or not any(hook.enabled for hook in self.hooks):
            return
        step = self.state.step
        if step is None:
            self._gradients.abandon()
            self._prepare()
            if self.state.distribution.mesh.sizes.pp > 1 and not self._called_whole:
                raise HookError(
                    "a pipeline stage runs outside a pipeline step",
                    remedy="run the schedule inside: with model.pipeline(schedule): schedule.step(…)",
                )
            self._pass = ForwardPass(alone=self.state.distribution.is_alone)
        if self._pass is not None and (step is None or step.chunk is not None):
            self._pass.root = id(root)
            self.state.distribution.begin_forward(root, args, kwargs)

    def _end(self) -> None:
        if self._pass is None or self._pass is self._edited or self.state.step is not None or in_backward():
            return
        done, self._pass = self._pass, None
        self.state.distribution.end_forward()
        self._deliver(done)

    @contextmanager
    def step(self, stages: Sequence[Any], microbatches: int, scale: int) -> Iterator[None]:
        """Run microbatches of one batch on stages of torch's pipelining; on exit, assemble whole batches.

        The first step of a schedule runs each stage once on empty tensors to infer shapes; nothing is read then.
        """
        if any(hook.enabled and hook.kind == "tensor" for hook in self.hooks):
            raise HookError(
                "hooks on parameters cannot be used in a pipeline",
                found="gradients of single microbatches",
                remedy="read parameter.grad after the step",
            )
        self._prepare()
        own = {id(weight) for weight in self.state.trainable.parameters()}
        divides = any(id(weight) in own for stage in stages for weight in stage.submod.parameters())
        step = PipelineStep(microbatches, scale, divides)
        with step.number_microbatches(stages):
            self.state.step, self._pass = step, ForwardPass()
            self._gradients.begin_step()
            try:
                yield
                self._deliver(self._pass, microbatches)
                self._gradients.end_step(microbatches)
            finally:
                self.state.step = self._pass = None
                self._gradients.clear()
                self.state.distribution.end_forward()

    def _prepare(self) -> None:
        """Raise HookError if two hooks record under one name; send new trainable modules to all ranks."""
        active = [hook for hook in self.hooks if hook.enabled and hook.function.record]
        names = [hook.function.name for hook in active]
        if len({*names}) < len(names) and self.state.output is not None:
            twice = [hook for hook, name in zip(active, names, strict=True) if names.count(name) > 1]
            raise HookError(
                "two hooks record under one name",
                where=twice[0].function.name,
                found=", ".join(hook.where for hook in twice[:8]),
                remedy="give one of them another key: HookFunction(name, key=…), or set record=False",
            )
        self.state.send_trainable()

    def _deliver(self, done: ForwardPass, microbatches: int = 1) -> None:
        """Assemble the activations of a forward and append them to the output.

        Raises
        ------
        HookError
            An active hook did not fire on any rank.
        """
        active = [hook for hook in self.hooks if hook.enabled and hook.kind != "tensor"]
        reads = any(hook.function.record and hook.kind not in BACKWARD for hook in active)
        if reads or self.state.distribution.mesh.sizes.pp > 1:
            whole, fired = self.state.assemble(done, microbatches)
        else:
            whole, fired = {}, done.fired  # the other ranks need not know
        silent = [hook.where for hook in active if hook.number not in fired]
        if silent:
            raise HookError(
                "a hook did not fire in the forward",
                where=", ".join(silent[:8]) + (", …" if len(silent) > 8 else ""),
                expected="every enabled hook's module to run",
                found=f"{len(silent)} of {len(active)} that did not",
                remedy="disable the hook's group for forwards that do not run the module; the model does not use it,"
                " uses its weights without calling it, or was compiled before it was wrapped and is called without the"
                " wrapper",
            )
        self.state.append_activations(whole)
