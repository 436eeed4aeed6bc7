"""The running part of a FlexModel: torch hooks on its modules, and the activations of the forward under way."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from flexcache.errors import HookError, LayoutError
from flexcache.hooks.hook_function import BACKWARD, HookFunction, Kind
from flexcache.hooks.leaves import input_leaf, tensor_leaf
from flexcache.parallel.assembly import Key
from flexcache.parallel.discover import runs_its_pipeline
from flexcache.parallel.distribution import Distribution, Piece, Sizes
from flexcache.parallel.layout import Layout, localize
from flexcache.parallel.plane import Plane, cut
from flexcache.parallel.twin import Probe

NOT_OWNED = "PipelineIdentityLayer"
"""What transformers puts in place of modules that another pipeline stage has; it passes its input on."""


@dataclass
class Hook:
    """A hook function as registered: its kind, its number in the order of registration, and whether it is on."""

    number: int
    function: HookFunction
    kind: Kind
    where: str
    enabled: bool = True


@dataclass
class Pass:
    """One forward, one pipeline step, or one backward pass, and what was read in it so far."""

    pieces: list[Piece] = field(default_factory=list)
    fired: set[int] = field(default_factory=set)
    calls: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    root: int = 0


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
        output: dict[str, list[torch.Tensor]] | None,
        keepers: Callable[[int], tuple[int, ...]],
        sizes: Sizes,
        process_group: Any,
    ) -> None:
        self.save_ctx = SimpleNamespace()
        self.trainable = nn.ModuleDict()
        self.hooks: list[Hook] = []
        self._output = output
        self._keepers = keepers
        self._distribute: Callable[[], Distribution] | None = lambda: Distribution(model, sizes, process_group)
        self._distribution: Distribution | None = None
        self._at: dict[tuple[int, str], list[Hook]] = defaultdict(list)
        self._modules: dict[int, list[nn.Module]] = defaultdict(list)
        self._handles: list[RemovableHandle] = []
        self._pass: Pass | None = None
        self._backward: Pass | None = None
        self._watched: set[int] = set()
        self._step: Step | None = None
        self._shared: set[str] = set()
        self._called_whole = runs_its_pipeline(model)
        self._roots = {id(root) for root in roots}
        for root in roots:
            self._attach(root, "input")
            self._attach(root, "output")

    # Registration

    @property
    def distribution(self) -> Distribution:
        """How the model is distributed; found when it is first asked for, by all ranks together."""
        if self._distribution is None:
            assert self._distribute is not None
            self._distribution, self._distribute = self._distribute(), None
        return self._distribution

    def register(self, function: HookFunction, kind: Kind, modules: Iterable[nn.Module]) -> Hook:
        """Put a hook function on the modules of one name: several if stages share it, none if other ranks have it."""
        hook = Hook(len(self.hooks), function, kind, _where(function, kind))
        self.hooks.append(hook)
        side = "input" if kind in ("forward_pre", "full_backward") else "output"
        for module in {id(module): module for module in modules}.values():
            if type(module).__name__ == NOT_OWNED:
                continue
            self._modules[hook.number].append(module)
            if not self._at[id(module), side] and id(module) not in self._roots:
                self._attach(module, side)
            self._at[id(module), side].append(hook)
        return hook

    def register_parameter(
        self, function: HookFunction, parameter: nn.Parameter | None, modules: Sequence[nn.Module], reduced: bool
    ) -> Hook:
        """Put a hook function on the gradient of a parameter.

        Parameters
        ----------
        parameter, modules
            The parameter and the module that has it; none where another stage has it.
        reduced
            The gradient that arrives is the mean over data-parallel ranks already (FSDP2).
        """
        hook = Hook(len(self.hooks), function, "tensor", _where(function, "tensor"))
        self.hooks.append(hook)
        self._modules[hook.number].extend(modules)
        if parameter is None:
            return hook
        if reduced:

            def after(weight: torch.Tensor) -> None:
                if weight.grad is not None and hook.enabled:
                    edited = self._weight_gradient(hook, weight.grad, True)
                    weight.grad = weight.grad if edited is None else edited

            self._handles.append(parameter.register_post_accumulate_grad_hook(after))
        else:
            self._handles.append(
                parameter.register_hook(lambda grad: self._weight_gradient(hook, grad, False) if hook.enabled else None)
            )
        return hook

    def close(self) -> None:
        """Take every hook off and give back what was held."""
        while self._handles:
            self._handles.pop().remove()
        for hook in self.hooks:
            hook.enabled = False
        self._at.clear()
        self._modules.clear()
        self._pass = self._backward = None
        if self._distribution is not None:
            self._distribution.close()

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
            if hook.enabled and self._listening(hook):
                index = hook.function.unpack_idx
                leaf, rebuild = input_leaf(args, kwargs, index, hook.where)
                new = self._read(hook, module, leaf) if hook.kind == "forward_pre" else self._mark(hook, module, leaf)
                if new is not None:
                    args, kwargs = rebuild(new)
                    changed = True
        return (args, kwargs) if changed else None

    def _on_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        changed = False
        for hook in self._at.get((id(module), "output"), ()):
            if hook.enabled and self._listening(hook):
                leaf, rebuild = tensor_leaf(output, hook.function.unpack_idx, hook.where)
                if hook.kind == "forward":
                    new = self._read(hook, module, leaf)
                    if new is not None:
                        output = rebuild(new)
                        changed = True
                else:
                    self._watch(hook, module, leaf)
        if id(module) in self._roots:
            self._end()
        return output if changed else None

    # A pass

    def _begin(self, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if _in_backward() or not any(hook.enabled for hook in self.hooks):
            return
        if self._step is None:
            self._check_keys()
            self._share()
            self._pass = Pass()
            if self.distribution.mesh.sizes.pp > 1 and not self._called_whole:
                raise HookError(
                    "a stage of a pipeline runs outside of a pipeline step",
                    remedy="run the schedule inside: with model.pipeline(schedule): schedule.step(…)",
                )
        if self._pass is not None and (self._step is None or self._step.chunk is not None):
            self._pass.root = id(root)  # stages may share a module: it runs once in each, as on ranks of their own
            self.distribution.begin(root, args, kwargs)

    def _end(self) -> None:
        if self._pass is None or self._step is not None or _in_backward():
            return
        done, self._pass = self._pass, None
        self.distribution.end()
        self._deliver(done, [hook for hook in self.hooks if hook.enabled and hook.kind != "tensor"])

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
        self._check_keys()
        self._share()
        own = {id(weight) for weight in self.trainable.parameters()}
        divides = any(id(weight) in own for stage in stages for weight in stage.submod.parameters())
        step = Step(microbatches, scale, divides)
        wrapped = []
        for stage in stages:
            wrapped.append((stage, "forward_one_chunk" in vars(stage), stage.forward_one_chunk))
            stage.forward_one_chunk = _chunked(stage.forward_one_chunk, step)
        self._step, self._pass, self._backward = step, Pass(), Pass()
        self._watched.clear()
        try:
            yield
            done, grads = self._pass, self._backward
            active = [hook for hook in self.hooks if hook.enabled]
            self._deliver(done, active, microbatches)
            watched = self.distribution.gathered(sorted(self._watched))
            numbers = {number for told in watched for number in told}
            if any(self.distribution.gathered(bool(grads.fired))):
                self._deliver_gradients(grads, numbers, microbatches)
        finally:
            self._step = self._pass = self._backward = None
            self._watched.clear()
            self.distribution.end()
            for stage, own, original in wrapped:
                if own:
                    stage.forward_one_chunk = original
                else:
                    del stage.forward_one_chunk

    def _deliver(self, done: Pass, active: Sequence[Hook], microbatches: int = 1) -> None:
        """Put the activations of a forward together and append them to the output, or say which hook never fired."""
        distribution, fired = self.distribution, done.fired
        whole = {piece.key: piece.tensor for piece in done.pieces}
        if not distribution.alone:
            reads = any(hook.function.record and hook.kind not in BACKWARD for hook in active)
            if reads or distribution.mesh.sizes.pp > 1:
                whole, fired = distribution.exchange(done.pieces, self._keep(), self._names(), done.fired, microbatches)
        silent = [hook for hook in active if hook.number not in fired and hook.kind != "tensor"]
        if silent:
            raise HookError(
                "a hook did not fire in the forward",
                where=", ".join(hook.where for hook in silent[:8]) + (", …" if len(silent) > 8 else ""),
                expected="every enabled hook's module to run",
                found=f"{len(silent)} of {len(active)} that did not",
                remedy="the model does not use the module in this forward, uses its weights without calling it, or was"
                " compiled before it was wrapped and called past the wrapper; disable the hook's group for forwards"
                " that leave the module out",
            )
        self._append(whole)

    def _append(self, whole: Mapping[Key, torch.Tensor]) -> None:
        if self._output is None:
            return
        for key in sorted(whole):
            tensor = whole[key]
            kept = tensor if tensor.device.type == "cpu" else tensor.to("cpu")
            self._output.setdefault(self.hooks[key.hook].function.name, []).append(kept)

    # One activation

    def _listening(self, hook: Hook) -> bool:
        return self._step is None or self._step.chunk is not None or _in_backward()

    def _key(self, hook: Hook) -> Key:
        if self._pass is None or _in_backward():
            return Key(hook.number, 0)
        self._pass.fired.add(hook.number)
        place = hook.number, self._chunk(), self._pass.root
        self._pass.calls[place] += 1
        return Key(hook.number, self._pass.calls[place] - 1)

    def _read(self, hook: Hook, module: nn.Module, leaf: torch.Tensor) -> torch.Tensor | None:
        """Record an activation, and return what the model goes on with if it is edited."""
        function, again = hook.function, _in_backward()
        key = self._key(hook)
        local = localize(leaf, hook.where)
        layout = self._layout(hook, key, local)
        if function.record and not again:
            piece = Piece(key, self._chunk(), _own(local.tensor), layout)
            if self._pass is not None:
                self._pass.pieces.append(piece)
            else:
                self._outside(hook)
                self._append({key: piece.tensor})
        if function.editing_function is None:
            return None
        edit = self._edit(hook, module)
        scale = 1 if self._step is not None and self._step.divides_trainable else self._scale()
        if self._spread() or scale > 1:
            with self.distribution.editing(key, local.tensor, layout, hook.where, scale, self._chunk()) as plane:
                return local.restore(plane.edit(local.tensor, edit))
        return local.restore(edit(local.tensor.clone()))

    def _mark(self, hook: Hook, module: nn.Module, leaf: torch.Tensor) -> torch.Tensor | None:
        """Return the input as a view, so that the gradient read there is what flows through this module alone."""
        if not (torch.is_grad_enabled() and leaf.requires_grad):
            self._watch(hook, module, leaf)
            return None
        view = leaf.view_as(leaf)
        self._watch(hook, module, view)
        return view

    def _watch(self, hook: Hook, module: nn.Module, leaf: torch.Tensor) -> None:
        """Read the gradient of a tensor when it is there."""
        key = self._key(hook)
        if not torch.is_grad_enabled():
            return
        if not leaf.requires_grad:
            if _in_backward():
                return
            raise HookError(
                "no gradient flows to where a backward hook reads it",
                where=hook.where,
                expected="a tensor that requires grad",
                found=f"{tuple(leaf.shape)} of {leaf.dtype} that does not",
                remedy="require grad of weights before this place or of the embedding's output"
                " (model.enable_input_require_grads()), or disable the hook's group",
            )
        layout = replace(self._layout(hook, key, localize(leaf, hook.where)), gradient=True)
        chunk, scale = self._chunk(), self._scale() * self._copies()
        if not _in_backward():
            self._watched.add(hook.number)
        leaf.register_hook(lambda grad: self._gradient(hook, module, grad, key, chunk, layout, scale))

    # One gradient

    def _gradient(
        self, hook: Hook, module: nn.Module, grad: torch.Tensor, key: Key, chunk: int, layout: Layout, scale: int
    ) -> torch.Tensor | None:
        if not hook.enabled:
            return None
        function = hook.function
        local = localize(grad, hook.where)
        if local.known:
            layout = replace(layout, shape=local.shape, sharded=local.sharded)
        passed = self._backward_pass()
        passed.fired.add(hook.number)
        mine = _own(local.tensor)
        if function.record:
            passed.pieces.append(Piece(key, chunk, mine / scale if scale > 1 else mine, layout))
        if function.editing_function is None:
            return None
        edit = self._edit(hook, module)
        with torch.no_grad():
            if not self._spread():
                edited = edit(local.tensor / scale) * scale if scale > 1 else edit(local.tensor.clone())
                return local.restore(edited)
            microbatches = scale // self._copies()
            with self.distribution.editing(key, local.tensor, layout, hook.where, microbatches, chunk) as plane:
                whole = edit(plane.gather(local.tensor, gradient=True) / scale)
                return local.restore(_part(whole * plane.weight, plane))

    def _weight_gradient(self, hook: Hook, grad: torch.Tensor, reduced: bool) -> torch.Tensor | None:
        whole, mesh = grad, getattr(grad, "device_mesh", None)
        if mesh is not None:
            whole = grad.full_tensor()  # type: ignore[attr-defined]
        if not reduced and not self.distribution.alone:
            whole = self.distribution.mean(whole)
        passed = self._backward_pass()
        passed.fired.add(hook.number)
        if hook.function.record:
            key = Key(hook.number, sum(piece.key.hook == hook.number for piece in passed.pieces))
            passed.pieces.append(Piece(key, 0, _own(whole), Layout(tuple(whole.shape), None, None)))
        if hook.function.editing_function is None:
            return None
        with torch.no_grad():
            edited = self._edit(hook, self._modules[hook.number][0])(whole.clone())
        if mesh is None:
            return edited
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(edited, mesh, grad.placements, src_data_rank=None)  # type: ignore[attr-defined]

    def _backward_pass(self) -> Pass:
        if self._backward is None:
            self._backward = Pass()
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)
        return self._backward

    def _end_backward(self) -> None:
        if self._backward is None or self._step is not None:
            return
        done, self._backward = self._backward, None
        watched, self._watched = self._watched, set()
        self._deliver_gradients(done, watched)

    def _deliver_gradients(self, done: Pass, watched: set[int], microbatches: int = 1) -> None:
        whole, fired = {piece.key: piece.tensor for piece in done.pieces}, done.fired
        if not self.distribution.alone:
            whole, fired = self.distribution.exchange(
                done.pieces, self._keep(), self._names(), done.fired, microbatches
            )
        self._append(whole)
        silent = [self.hooks[number].where for number in sorted(watched - fired)]
        if silent:
            warnings.warn(
                f"no gradient reached {', '.join(silent[:8])} in this backward pass: the loss does not depend on it",
                stacklevel=2,
            )

    # The pieces of the above

    def _edit(self, hook: Hook, module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        function = hook.function.editing_function
        assert function is not None

        def edit(whole: torch.Tensor) -> torch.Tensor:
            shape, dtype = whole.shape, whole.dtype
            edited = function(module, whole, self.save_ctx, self.trainable)
            if not isinstance(edited, torch.Tensor) or edited.shape != shape:
                raise HookError(
                    "an editing function did not return an activation",
                    where=hook.where,
                    expected=f"a tensor of shape {tuple(shape)}",
                    found=f"shape {tuple(edited.shape)}" if isinstance(edited, torch.Tensor) else repr(edited)[:80],
                    remedy="return a tensor of the shape that the function was given",
                )
            return edited if edited.dtype == dtype else edited.to(dtype)

        return edit

    def _layout(self, hook: Hook, key: Key, local: Any) -> Layout:
        if not self.distribution.alone and "experts" in hook.function.module_name.split(".")[:-1]:
            raise LayoutError(
                "activations inside experts cannot be put together",
                where=hook.where,
                expected="a module that sees every token once and in order",
                found="rows of (token, expert) pairs sorted by expert, those of its own experts or rows on each rank",
                remedy="hook the experts module as a whole, its router, or the MLP around it",
            )
        microbatches = 1 if self._step is None else self._step.microbatches
        return self.distribution.layout(
            key, local, hook.where, hook.function.expected_shape, self._probes, microbatches
        )

    def _probes(self) -> list[Probe]:
        return [
            Probe(hook.number, module, _reader(hook))
            for hook in self.hooks
            if hook.kind != "tensor"
            for module in self._modules[hook.number]
        ]

    def _chunk(self) -> int:
        return 0 if self._step is None or self._step.chunk is None else self._step.chunk

    def _scale(self) -> int:
        """Over how many microbatches gradients are averaged."""
        return 1 if self._step is None else self._step.scale

    def _copies(self) -> int:
        return self.distribution.mesh.sizes.dp

    def _spread(self) -> bool:
        """Whether this rank shares activations with others."""
        return len(self.distribution.mesh.plane) > 1

    def _keep(self) -> tuple[int, ...]:
        return self._keepers(len(self.distribution.mesh.ranks)) if self._output is not None else ()

    def _names(self) -> list[str]:
        return [hook.where for hook in self.hooks]

    def _outside(self, hook: Hook) -> None:
        if not self.distribution.alone:
            raise HookError(
                "a module runs outside of the model's forward, where ranks do not put activations together",
                where=hook.where,
                remedy="call the whole model, or disable the hook's group",
            )

    def _share(self) -> None:
        """Give trainable modules the same weights on every rank, once."""
        for name, module in self.trainable.items():
            if name not in self._shared:
                self.distribution.share(module)
                self._shared.add(name)

    def _check_keys(self) -> None:
        names = Counter(hook.function.name for hook in self.hooks if hook.enabled and hook.function.record)
        twice = [name for name, count in names.items() if count > 1]
        if twice and self._output is not None:
            kinds = [
                f"{hook.kind} of {hook.function.module_name}" for hook in self.hooks if hook.function.name in twice
            ]
            raise HookError(
                "two hooks record under one name",
                where=", ".join(twice[:8]),
                found=", ".join(kinds[:8]),
                remedy="give one of them another key, as in HookFunction(name, key=…), or record=False",
            )


def _where(function: HookFunction, kind: Kind) -> str:
    return f"{function.module_name} ({kind})"


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy in ordinary, contiguous memory, also of tensors made in inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor.detach())


def _part(whole: torch.Tensor, plane: Plane) -> torch.Tensor:
    return cut(whole, plane.own).contiguous()


def _in_backward() -> bool:
    """Whether autograd is running: a module that runs then is run again, by gradient checkpointing."""
    return torch._C._current_graph_task_id() != -1


def _chunked(run: Callable[..., Any], step: Step) -> Callable[..., Any]:
    def forward_one_chunk(chunk: int, *args: Any, **kwargs: Any) -> Any:
        step.chunk = chunk
        try:
            return run(chunk, *args, **kwargs)
        finally:
            step.chunk = None

    return forward_one_chunk


def _reader(hook: Hook) -> Callable[[tuple[Any, ...], dict[str, Any], Any], torch.Tensor | None]:
    def read(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> torch.Tensor | None:
        try:
            if hook.kind in ("forward_pre", "full_backward"):
                return input_leaf(args, kwargs, hook.function.unpack_idx, hook.where)[0]
            return tensor_leaf(output, hook.function.unpack_idx, hook.where)[0]
        except HookError:
            return None

    return read
