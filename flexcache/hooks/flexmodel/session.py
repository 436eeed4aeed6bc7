"""The running part of a FlexModel: torch hooks on its modules, and the forward under way."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from flexcache.errors import HookError
from flexcache.hooks.flexmodel.forward_pass import ForwardPass, Hook, Step, in_backward, own_copy
from flexcache.hooks.flexmodel.gradients import Gradients
from flexcache.hooks.flexmodel.hook_function import BACKWARD, HookFunction, Kind
from flexcache.hooks.flexmodel.pytree import input_leaf, tensor_leaf
from flexcache.hooks.flexmodel.session_state import Output, SessionState
from flexcache.hooks.locate.blocks import NOT_OWNED
from flexcache.parallel.assembly import Key
from flexcache.parallel.discover import runs_its_pipeline
from flexcache.parallel.distribution import Distribution, Piece, Sizes
from flexcache.parallel.layout import localize


class Session:
    """Hooks on the modules under *roots*, until it is closed.

    A torch hook sits on each side of each module that a hook function names, and on the roots, whose forward begins
    and ends a pass: activations are kept as this rank has them while the model runs, and put together at the end, when
    all ranks have told each other what they hold. So a forward that fails leaves nothing half recorded, and ranks that
    went different ways get an error and no deadlock.

    Parameters
    ----------
    model
        As the user gave it, wrappers included.
    roots
        The modules whose forward is a pass: the unwrapped model, or the stages of a pipeline that are on this rank.
    """

    def __init__(
        self,
        model: nn.Module,
        roots: Sequence[nn.Module],
        output: Output | None,
        keepers: Callable[[int], tuple[int, ...]],
        sizes: Sizes,
        process_group: Any,
    ) -> None:
        self.shared = SessionState(lambda: Distribution(model, sizes, process_group), output, keepers)
        self._gradients = Gradients(self.shared)
        self._at: dict[tuple[int, str], list[Hook]] = defaultdict(list)
        self._handles: list[RemovableHandle] = []
        self._pass: ForwardPass | None = None
        self._called_whole = runs_its_pipeline(model)
        self._roots = {id(root) for root in roots}
        for root in roots:
            self._attach(root, "input")
            self._attach(root, "output")

    @property
    def hooks(self) -> list[Hook]:
        """The hooks in the order of their registration."""
        return self.shared.hooks

    # Registration

    def register(self, function: HookFunction, kind: Kind, modules: Iterable[nn.Module]) -> None:
        """Put a hook function on the modules of one name: several if stages share it, none if other ranks have it."""
        hook = self._add(function, kind)
        side = "input" if hook.reads_input else "output"
        for module in {id(module): module for module in modules}.values():
            if type(module).__name__ == NOT_OWNED:
                continue
            self.shared.modules[hook.number].append(module)
            if not self._at[id(module), side] and id(module) not in self._roots:
                self._attach(module, side)
            self._at[id(module), side].append(hook)

    def register_parameter(
        self, function: HookFunction, parameter: nn.Parameter | None, modules: Sequence[nn.Module], reduced: bool
    ) -> None:
        """Put a hook function on the gradient of a parameter.

        Parameters
        ----------
        parameter, modules
            The parameter and the module that has it; none where another stage has it.
        reduced
            The gradient that arrives is the mean over data-parallel ranks already (FSDP2).
        """
        hook = self._add(function, "tensor")
        self.shared.modules[hook.number].extend(modules)
        gradients = self._gradients
        if parameter is None:
            return
        if reduced:

            def after(weight: torch.Tensor) -> None:
                edited = gradients.weight(hook, weight.grad, True) if hook.enabled and weight.grad is not None else None
                weight.grad = weight.grad if edited is None else edited

            self._handles.append(parameter.register_post_accumulate_grad_hook(after))
        else:
            self._handles.append(
                parameter.register_hook(lambda grad: gradients.weight(hook, grad, False) if hook.enabled else None)
            )

    def abandon(self) -> None:
        """Forget the forward under way, since something in it raised."""
        if self.shared.step is None:
            self._pass = None

    def close(self) -> None:
        """Take every hook off and give back what was held."""
        while self._handles:
            self._handles.pop().remove()
        self._at.clear()
        self._pass = None
        self._gradients.clear()
        self.shared.close()

    def _add(self, function: HookFunction, kind: Kind) -> Hook:
        hook = Hook(len(self.hooks), function, kind)
        self.hooks.append(hook)
        return hook

    def _attach(self, module: nn.Module, side: str) -> None:
        # Outside of the hooks that distribute a module, on both sides: what the code around it passes and gets.
        if side == "input":
            handle = module.register_forward_pre_hook(self._on_input, prepend=True, with_kwargs=True)
        else:
            handle = module.register_forward_hook(self._on_output)
        self._handles.append(handle)

    # What torch calls

    def _on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if id(module) in self._roots:
            self._begin(module, args, kwargs)
        changed = False
        for hook in self._at.get((id(module), "input"), ()):
            if not (hook.enabled and self._listening()):
                continue
            leaf, rebuild = input_leaf(args, kwargs, hook.function.unpack_idx, hook.where)
            new = self._read(hook, module, leaf) if hook.kind == "forward_pre" else self._mark(hook, module, leaf)
            if new is not None:
                args, kwargs = rebuild(new)
                changed = True
        return (args, kwargs) if changed else None

    def _on_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        changed = False
        for hook in self._at.get((id(module), "output"), ()):
            if not (hook.enabled and self._listening()):
                continue
            leaf, rebuild = tensor_leaf(output, hook.function.unpack_idx, hook.where)
            if hook.kind == "full_backward_pre":
                self._gradients.watch(hook, leaf, self._key(hook), module)
            elif (new := self._read(hook, module, leaf)) is not None:
                output = rebuild(new)
                changed = True
        if id(module) in self._roots:
            self._end()
        return output if changed else None

    def _listening(self) -> bool:
        """Whether what runs is the model's forward, and not a schedule that learns shapes from empty tensors."""
        step = self.shared.step
        return step is None or step.chunk is not None or in_backward()

    def _read(self, hook: Hook, module: nn.Module, leaf: torch.Tensor) -> torch.Tensor | None:
        """Record an activation, and return what the model goes on with if it is edited."""
        shared, function, again = self.shared, hook.function, in_backward()
        key = self._key(hook)
        local = localize(leaf, hook.where)
        layout = shared.layout(hook, key, local)
        if function.record and not again:
            piece = Piece(key, shared.chunk, own_copy(local.tensor), layout)
            if self._pass is not None:
                self._pass.pieces.append(piece)
            else:
                self._outside(hook)
                shared.append({key: piece.tensor})
        if function.editing_function is None:
            return None
        edit, step = shared.edit(hook, module), shared.step
        microbatches = 1 if step is None or step.divides_trainable else step.scale
        if not shared.spread and microbatches == 1:
            return local.restore(edit(local.tensor.clone()))
        with shared.distribution.editing(key, local.tensor, layout, hook.where, microbatches, shared.chunk) as plane:
            return local.restore(plane.edit(local.tensor, edit))

    def _mark(self, hook: Hook, module: nn.Module, leaf: torch.Tensor) -> torch.Tensor | None:
        """Return the input as a view, so that the gradient read there is what flows through this module alone."""
        view = leaf.view_as(leaf) if torch.is_grad_enabled() and leaf.requires_grad else None
        self._gradients.watch(hook, leaf if view is None else view, self._key(hook), module)
        return view

    def _key(self, hook: Hook) -> Key:
        if self._pass is None or in_backward():
            return Key(hook.number, 0)
        self._pass.fired.add(hook.number)
        place = hook.number, self.shared.chunk, self._pass.root
        self._pass.calls[place] += 1
        return Key(hook.number, self._pass.calls[place] - 1)

    def _outside(self, hook: Hook) -> None:
        if not self.shared.distribution.alone:
            raise HookError(
                "a module runs outside of the model's forward, where ranks do not put activations together",
                where=hook.where,
                remedy="call the whole model, or disable the hook's group",
            )

    # A pass

    def _begin(self, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if in_backward() or not any(hook.enabled for hook in self.hooks):
            return
        step = self.shared.step
        if step is None:
            self._gradients.abandon()
            self._prepare()
            if self.shared.distribution.mesh.sizes.pp > 1 and not self._called_whole:
                raise HookError(
                    "a stage of a pipeline runs outside of a pipeline step",
                    remedy="run the schedule inside: with model.pipeline(schedule): schedule.step(…)",
                )
            self._pass = ForwardPass()
        if self._pass is not None and (step is None or step.chunk is not None):
            self._pass.root = id(root)
            self.shared.distribution.begin(root, args, kwargs)

    def _end(self) -> None:
        if self._pass is None or self.shared.step is not None or in_backward():
            return
        done, self._pass = self._pass, None
        self.shared.distribution.end()
        self._deliver(done)

    @contextmanager
    def step(self, stages: Sequence[Any], microbatches: int, scale: int) -> Iterator[None]:
        """While open, stages of torch's pipelining run microbatches of one batch; at the end, batches are put together.

        A schedule's first step runs each stage once more, to learn shapes from tensors that hold nothing: what is
        read then is left out.
        """
        if any(hook.enabled and hook.kind == "tensor" for hook in self.hooks):
            raise HookError(
                "hooks on parameters cannot be used in a pipeline",
                found="gradients of single microbatches",
                remedy="read parameter.grad after the step",
            )
        self._prepare()
        own = {id(weight) for weight in self.shared.trainable.parameters()}
        divides = any(id(weight) in own for stage in stages for weight in stage.submod.parameters())
        step = Step(microbatches, scale, divides)
        before = [vars(stage).get("forward_one_chunk") for stage in stages]
        for stage in stages:
            stage.forward_one_chunk = _numbered(stage.forward_one_chunk, step)
        self.shared.step, self._pass = step, ForwardPass()
        self._gradients.begin_step()
        try:
            yield
            self._deliver(self._pass, microbatches)
            self._gradients.end_step(microbatches)
        finally:
            self.shared.step = self._pass = None
            self._gradients.clear()
            self.shared.distribution.end()
            for stage, original in zip(stages, before, strict=True):
                if original is None:
                    del stage.forward_one_chunk
                else:
                    stage.forward_one_chunk = original

    def _prepare(self) -> None:
        """Check that no two hooks record under one name, and send trainable modules to all ranks."""
        active = [hook for hook in self.hooks if hook.enabled and hook.function.record]
        names = Counter(hook.function.name for hook in active)
        twice = [hook for hook in active if names[hook.function.name] > 1]
        if twice and self.shared.output is not None:
            raise HookError(
                "two hooks record under one name",
                where=twice[0].function.name,
                found=", ".join(hook.where for hook in twice[:8]),
                remedy="give one of them another key, as in HookFunction(name, key=…), or record=False",
            )
        self.shared.send_trainable()

    def _deliver(self, done: ForwardPass, microbatches: int = 1) -> None:
        """Put the activations of a forward together and append them to the output, or say which hook never fired."""
        active = [hook for hook in self.hooks if hook.enabled and hook.kind != "tensor"]
        reads = any(hook.function.record and hook.kind not in BACKWARD for hook in active)
        if reads or self.shared.distribution.mesh.sizes.pp > 1:
            whole, fired = self.shared.join(done, microbatches)
        else:
            whole, fired = {}, done.fired  # nothing that the others need to know
        silent = [hook.where for hook in active if hook.number not in fired]
        if silent:
            raise HookError(
                "a hook did not fire in the forward",
                where=", ".join(silent[:8]) + (", …" if len(silent) > 8 else ""),
                expected="every enabled hook's module to run",
                found=f"{len(silent)} of {len(active)} that did not",
                remedy="the model does not use the module in this forward, uses its weights without calling it, or was"
                " compiled before it was wrapped and called past the wrapper; disable the hook's group for forwards"
                " that leave the module out",
            )
        self.shared.append(whole)


def _numbered(run: Callable[..., Any], step: Step) -> Callable[..., Any]:
    def forward_one_chunk(chunk: int, *args: Any, **kwargs: Any) -> Any:
        step.chunk = chunk
        try:
            return run(chunk, *args, **kwargs)
        finally:
            step.chunk = None

    return forward_one_chunk
