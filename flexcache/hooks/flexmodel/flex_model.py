"""FlexModel: a model, however it is distributed, whose unsharded activations can be read and edited."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import nn

from flexcache.errors import ConfigError, HookError, SiteError, nearest
from flexcache.hooks.flexmodel.batch_groups import ALL, Groups, matches
from flexcache.hooks.flexmodel.hook_function import KINDS, EditingFunction, HookFunction, Kind
from flexcache.hooks.flexmodel.session import Session
from flexcache.hooks.locate.names import WRAPPERS, modules, unwrap
from flexcache.hooks.locate.search import is_container, runnable
from flexcache.hooks.read.activation_hooks import eager
from flexcache.parallel.discover import runs_its_pipeline

TRAINABLE = "trainable_modules"


class FlexModel(nn.Module):
    """Wraps a model so that hook functions read and edit its activations, whole on whatever number of processes.

    ::

        acts = {}
        model = FlexModel(accelerator.prepare(model), acts)
        model.register_forward_hook(HookFunction("model.layers.7.mlp", editing_function=edit))
        model(**batch)                       # acts["model.layers.7.mlp"] == [the whole activation], one per forward
        model = model.restore()              # the model as it was

    Wrapping adds hooks and nothing else. Attributes of the model (``generate``, ``config``) are reachable through the
    wrapper; `parameters` and `state_dict` are the model's own, with `trainable_modules` beside them.

    On several processes every rank wraps, registers and calls alike. Activations are put together along sharded dims
    and in the order of the unsplit batch; those of a pipeline's microbatches too. Gradients are of the loss averaged
    over data-parallel ranks and microbatches, as the gradients of weights are under DDP, FSDP and torch's pipelining.

    Parameters
    ----------
    module
        The model, after it was distributed. In a pipeline of torch, this rank's stage module, or a list of them.
    output_dict
        Filled with ``{name: [tensor, …]}``, one tensor per forward, on the CPU, on the ranks of *output_ranks*: copies
        that nothing changes afterwards. None to record nothing.
    tensor_parallel_size, pipeline_parallel_size, data_parallel_size
        Found in the model where its wrappers or weights tell; checked where given. Copies of a model without a wrapper
        must be given as data parallel, or each stands for itself; so must torch's pipelines.
    process_group
        The ranks that are meant; all by default.
    output_ranks
        Ranks within the group that get activations: the first by default, several, or ``"all"``.

    Raises
    ------
    ConfigError
        Sizes do not fit the model or the number of processes: now in a pipeline, else in the first forward, since a
        model may still be distributed after it was wrapped.

    Notes
    -----
    One thread uses it. The design is that of FlexModel (Choi et al. 2023, arXiv 2312.03140).
    """

    def __init__(
        self,
        module: nn.Module | Sequence[nn.Module],
        output_dict: dict[str, list[torch.Tensor]] | None,
        tensor_parallel_size: int | None = None,
        pipeline_parallel_size: int | None = None,
        data_parallel_size: int | None = None,
        process_group: Any = None,
        *,
        output_ranks: Literal["all"] | int | Sequence[int] = 0,
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            module = nn.ModuleList(module)
        self.module = module
        stages = list(module) if isinstance(module, nn.ModuleList) else [module]
        self._named: dict[str, list[nn.Module]] = {}
        for stage in stages:
            for name, part in modules(stage).items():
                self._named.setdefault(name, []).append(part)
        sizes = {"pp": pipeline_parallel_size, "dp": data_parallel_size, "tp": tensor_parallel_size}
        self._session = Session(
            module,
            [unwrap(stage) for stage in stages],
            output_dict,
            lambda world: _keepers(output_ranks, world),
            sizes,
            process_group,
        )
        self.trainable_modules = self._session.shared.trainable
        self._groups = Groups()
        self._elsewhere: set[str] = set()
        self._finalizer = weakref.finalize(self, self._session.close)
        self._finalizer.atexit = False
        self._setting: tuple[tuple[str, ...], bool] = ((ALL,), False)
        if (pipeline_parallel_size or 1) > 1 or runs_its_pipeline(module):
            owned = [name for name in self._named if name]
            self._elsewhere = set().union(*self._session.shared.distribution.gathered(owned)) - set(owned)

    # Running

    def forward(
        self, *args: Any, groups: str | Sequence[str] | None = None, complement: bool = False, **kwargs: Any
    ) -> Any:
        """Run the model; hook functions of *groups* are active, or with *complement* all others.

        Without *groups*, those that `enable_hook_groups` has set, at first all. A compiled model runs uncompiled
        while hooks are active: compiled code would not call those that came after it.

        Raises
        ------
        HookError
            There is no such group; a hook's module did not run; an activation cannot be read or an edit not used.
        LayoutError
            An activation cannot be put together from what the ranks hold.
        """
        before = self._setting
        if groups is not None:
            self.enable_hook_groups(groups, complement)
        try:
            active = any(hook.enabled for hook in self._session.hooks)
            with eager(self.module) if active else nullcontext():
                return self.module(*args, **kwargs)
        except BaseException:
            self._session.abandon()
            raise
        finally:
            if groups is not None:
                self.enable_hook_groups(*before)

    @contextmanager
    def pipeline(self, schedule: Any) -> Iterator[None]:
        """While open, one step of a schedule of `torch.distributed.pipelining` is one forward.

        ::

            with model.pipeline(schedule):
                schedule.step(input_ids, target=labels)

        Activations and gradients of its microbatches are put together when it closes. Editing functions get one
        microbatch at a time.

        Raises
        ------
        ConfigError
            *schedule* has no stages.
        HookError, LayoutError
            As for `forward`.
        """
        stages = getattr(schedule, "_stages", None) or [
            stage for stage in [getattr(schedule, "_stage", None)] if stage is not None
        ]
        if not stages or not hasattr(stages[0], "forward_one_chunk"):
            raise ConfigError(
                "this is no pipeline schedule",
                expected="a schedule of torch.distributed.pipelining, such as ScheduleGPipe",
                found=type(schedule).__name__,
            )
        microbatches = int(schedule._n_microbatches)
        with self._session.step(stages, microbatches, microbatches if schedule.scale_grads else 1):
            yield

    # Registration. Hooks that are no HookFunctions go onto the wrapper itself, as onto any module of torch.

    def register_forward_hook(self, hook: Any, *args: Any, **kwargs: Any) -> Any:
        """Read, and edit, what a module returns."""
        if not isinstance(hook, HookFunction):
            return super().register_forward_hook(hook, *args, **kwargs)
        return self._register(hook, "forward")

    def register_forward_pre_hook(self, hook: Any, *args: Any, **kwargs: Any) -> Any:
        """Read, and edit, what a module is given, positionally or by keyword."""
        if not isinstance(hook, HookFunction):
            return super().register_forward_pre_hook(hook, *args, **kwargs)
        return self._register(hook, "forward_pre")

    def register_full_backward_hook(self, hook: Any, *args: Any, **kwargs: Any) -> Any:
        """Read, and edit, the gradient with respect to a module's input, as far as it flows through this module."""
        if not isinstance(hook, HookFunction):
            return super().register_full_backward_hook(hook, *args, **kwargs)
        return self._register(hook, "full_backward")

    def register_full_backward_pre_hook(self, hook: Any, *args: Any, **kwargs: Any) -> Any:
        """Read, and edit, the gradient with respect to a module's output."""
        if not isinstance(hook, HookFunction):
            return super().register_full_backward_pre_hook(hook, *args, **kwargs)
        return self._register(hook, "full_backward_pre")

    def register_hook(self, hook_function: HookFunction) -> None:
        """Read, and edit, the whole gradient of a parameter, the mean over data-parallel ranks.

        Under FSDP2 what is read is the gradient as accumulated so far.

        Raises
        ------
        HookError
            The parameter is in a flat one, as FSDP1's and DeepSpeed's are.
        """
        self._register(hook_function, "tensor")

    def register_trainable_module(self, name: str, module: nn.Module) -> None:
        """Add a module that editing functions find as ``modules[name]``, trained along with the model.

        Before the first forward, every rank gets the weights that rank 0 has. Its gradients are the same on every rank
        that runs the edit, without further reduction.

        Raises
        ------
        ConfigError
            There is one of that name.
        """
        if name in self.trainable_modules:
            raise ConfigError(f"there is a trainable module {name!r} already", remedy="choose another name")
        self.trainable_modules[name] = module

    def _register(self, function: HookFunction, kind: Kind) -> None:
        if any(hook.function is function for hook in self._session.hooks):
            raise HookError(
                "the hook function is registered already",
                where=function.module_name,
                remedy="make another HookFunction",
            )
        if not self._finalizer.alive:
            raise HookError("the model was restored", remedy="wrap it again")
        if kind == "tensor":
            self._register_weight(function)
        else:
            self._register_module(function, kind)
        self._groups.update([function], ALL)
        self._switch()

    def _register_module(self, function: HookFunction, kind: Kind) -> None:
        found = self._find(function.module_name)
        if any(is_container(module) for module in found):
            raise SiteError(
                f"{function.module_name} only holds modules and never runs itself",
                remedy=f"hook the modules in it: {function.module_name}.0",
            )
        self._session.register(function, kind, found)

    def _register_weight(self, function: HookFunction) -> None:
        path, _, name = function.module_name.rpartition(".")
        found = self._find(path, function.module_name)
        parameter = found[0]._parameters.get(name) if found else None
        if found and parameter is None and function.module_name not in self._elsewhere:
            known = [name for name, value in found[0]._parameters.items() if value is not None]
            raise SiteError(
                f"{path or 'the model'} has no parameter {name!r}",
                remedy="FSDP1 keeps flat parameters; use fully_shard" if not known else nearest(name, known),
            )
        kinds = {type(module).__name__ for module in self.module.modules()}
        flat = kinds & {"FullyShardedDataParallel", "DeepSpeedEngine"}
        if flat:
            raise HookError(
                "gradients of single parameters cannot be read",
                where=function.module_name,
                found=f"flat parameters of {', '.join(flat)}",
                remedy="shard with fully_shard (FSDP2), or read parameter.grad after the step",
            )
        reduced = "DTensor" in type(parameter).__name__ and any(
            hasattr(module, "_get_fsdp_state") for module in self.module.modules()
        )
        self._session.register_parameter(function, parameter, found, reduced)

    def _find(self, name: str, said: str | None = None) -> list[nn.Module]:
        """Return the modules of a name as the user writes it; none if only another stage has it."""
        path = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        for candidate in (path, path.removeprefix("module."), "" if path == "module" else path):
            if candidate in self._named:
                return self._named[candidate]
            if candidate in self._elsewhere:
                return []
        known = [*runnable({name: found[0] for name, found in self._named.items()}), *sorted(self._elsewhere)]
        raise SiteError(f"the model has no module {said or name!r}", remedy=nearest(path, known))

    # Groups

    def create_hook_group(
        self,
        group_name: str,
        group_constructor: str,
        expected_shape: tuple[int | None, ...] | None = None,
        editing_function: EditingFunction | None = None,
        unpack_idx: int = 0,
        hook_type: Kind = "forward",
    ) -> list[HookFunction]:
        """Register a hook function on every module that a pattern matches, as a group.

        Parameters
        ----------
        group_constructor
            A part of the names, or a glob: ``"mlp"`` is in the name of every MLP and of every module in one,
            ``"model.layers.*.mlp"`` matches the MLPs alone. Of parameters where *hook_type* is ``"tensor"``.

        Returns
        -------
        list of HookFunction

        Raises
        ------
        SiteError
            Nothing matches.
        """
        if hook_type not in KINDS:
            raise ConfigError(f"there is no hook type {hook_type!r}", remedy=nearest(hook_type, KINDS))
        known = {name for name, found in self._named.items() if name and not is_container(found[0])}
        if hook_type == "tensor":
            named = [
                f"{name}.{weight}" if name else weight
                for name, found in self._named.items()
                for weight, value in found[0]._parameters.items()
                if value is not None
            ]
        else:
            named = [*(name for name in self._named if name in known), *sorted(self._elsewhere)]
        if self._elsewhere:
            named = sorted(named)  # the same order on every stage
        chosen = [name for name in named if matches(group_constructor, name)]
        if not chosen:
            raise SiteError(f"no name matches {group_constructor!r}", remedy=nearest(group_constructor, named))
        functions = [HookFunction(name, expected_shape, editing_function, unpack_idx) for name in chosen]
        for function in functions:
            self._register(function, hook_type)
        self._groups.update(functions, group_name)
        self._switch()
        return functions

    def update_hook_groups(
        self, group_constructor: Iterable[HookFunction] | HookFunction | str, group_name: str
    ) -> None:
        """Add registered hook functions, given as such or by a pattern of their module names, to a group."""
        self._groups.update(self._chosen(group_constructor), group_name)
        self._switch()

    def remove_hook_groups(
        self, group_constructor: Iterable[HookFunction] | HookFunction | str, group_name: str
    ) -> None:
        """Take hook functions out of a group; they stay registered."""
        chosen = self._chosen(group_constructor)
        if isinstance(group_constructor, str):
            members = self._groups.members(group_name)
            chosen = [function for function in chosen if function in members]
        self._groups.remove(chosen, group_name)
        self._switch()

    def enable_hook_groups(self, groups: str | Sequence[str] = ALL, complement: bool = False) -> None:
        """Activate the hook functions of *groups* alone, or with *complement* all others, from now on.

        Raises
        ------
        HookError
            There is no such group.
        """
        names = (groups,) if isinstance(groups, str) else tuple(groups)
        self._groups.members(names)
        self._setting = names, complement
        self._switch()

    def get_hook_function_groups(self, hook_function: HookFunction) -> set[str]:
        """Return the names of the groups that a hook function is in."""
        return self._groups.of(hook_function)

    def get_group_hook_functions(self, group_name: str) -> list[HookFunction]:
        """Return the hook functions of a group."""
        return self._groups.members(group_name)

    @property
    def hook_groups(self) -> list[str]:
        """The names of the groups."""
        return list(self._groups)

    def hooked(self) -> list[dict[str, Any]]:
        """Return what is hooked, in the order of registration: name, kind, groups, whether it is active and edits."""
        return [
            {
                "name": hook.function.module_name,
                "key": hook.function.name,
                "kind": hook.kind,
                "groups": sorted(self._groups.of(hook.function)),
                "active": hook.enabled,
                "edits": hook.function.editing_function is not None,
            }
            for hook in self._session.hooks
        ]

    def _chosen(self, constructor: Iterable[HookFunction] | HookFunction | str) -> list[HookFunction]:
        if isinstance(constructor, str):
            return self._groups.named(constructor)
        functions = [constructor] if isinstance(constructor, HookFunction) else list(constructor)
        registered = {hook.function for hook in self._session.hooks}
        for function in functions:
            if function not in registered:
                raise HookError("the hook function is not registered", where=function.module_name)
        return functions

    def _switch(self) -> None:
        names, complement = self._setting
        names = tuple(name for name in names if name in set(self._groups))
        members = set(self._groups.members(names))
        for hook in self._session.hooks:
            hook.enabled = (hook.function in members) != complement

    # The model's own

    @property
    def save_ctx(self) -> Any:
        """A namespace for editing functions to keep things in, from forward to forward; one per rank."""
        return self._session.shared.save_ctx

    @property
    def wrapped_module_names(self) -> list[str]:
        """The names of the modules that can be hooked, those of other pipeline stages included."""
        return [*runnable({name: found[0] for name, found in self._named.items()}), *sorted(self._elsewhere)]

    def restore(self) -> nn.Module:
        """Take everything off and return the model that was wrapped. Harmless when called again."""
        self._finalizer()
        module: nn.Module = self.module
        return module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("module", "_session") or name.startswith("__"):
                raise
            module = self._modules.get("module")
            for holder in (module, unwrap(module)) if module is not None else ():
                try:
                    return getattr(holder, name)
                except AttributeError:
                    continue
            raise

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the model's parameters by its own names, then those of trainable modules."""
        if recurse:
            yield from self.module.named_parameters(prefix, recurse, remove_duplicate)
            yield from self.trainable_modules.named_parameters(_join(prefix, TRAINABLE), recurse, remove_duplicate)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the model's buffers by its own names, then those of trainable modules."""
        if recurse:
            yield from self.module.named_buffers(prefix, recurse, remove_duplicate)
            yield from self.trainable_modules.named_buffers(_join(prefix, TRAINABLE), recurse, remove_duplicate)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Return the model's state by its own names, and that of trainable modules under ``trainable_modules.``."""
        state = self.module.state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        return self.trainable_modules.state_dict(destination=state, prefix=f"{prefix}{TRAINABLE}.", keep_vars=keep_vars)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` gives, or the state of the model alone where there are no trainable modules."""
        head = f"{TRAINABLE}."
        added = {name.removeprefix(head): value for name, value in state_dict.items() if name.startswith(head)}
        own = {name: value for name, value in state_dict.items() if not name.startswith(head)}
        first = self.module.load_state_dict(own, strict=strict, assign=assign)
        second = self.trainable_modules.load_state_dict(added, strict=strict, assign=assign)
        return type(first)(
            [*first.missing_keys, *(head + name for name in second.missing_keys)],
            [*first.unexpected_keys, *(head + name for name in second.unexpected_keys)],
        )

    def extra_repr(self) -> str:
        """List what is hooked."""
        lines = [
            f"{'●' if entry['active'] else '○'} {entry['name']} ({entry['kind']})"
            + (" edited" if entry["edits"] else "")
            + f" in {', '.join(entry['groups'])}"
            for entry in self.hooked()
        ]
        return "\n".join(lines[:40] + ([f"… {len(lines) - 40} more"] if len(lines) > 40 else []))


def _keepers(ranks: Literal["all"] | int | Sequence[int], world: int) -> tuple[int, ...]:
    chosen = tuple(range(world)) if ranks == "all" else (ranks,) if isinstance(ranks, int) else tuple(ranks)
    bad = [rank for rank in chosen if not isinstance(rank, int) or not 0 <= rank < world]
    if bad:
        raise ConfigError("output_ranks names ranks that there are not", expected=f"0 to {world - 1}", found=str(bad))
    return chosen


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
