"""FlexModel: read and edit the unsharded activations of a model, however it is distributed."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import nn

from flexcache.errors import ConfigError, HookError, SiteError, nearest
from flexcache.hooks.flexmodel.hook_function import KINDS, EditingFunction, HookFunction, Kind
from flexcache.hooks.flexmodel.hook_groups import ALL, HookGroups
from flexcache.hooks.flexmodel.model_wrapper import ModelWrapper
from flexcache.hooks.flexmodel.module_index import ModuleIndex
from flexcache.hooks.flexmodel.session import Session
from flexcache.hooks.locate.names import is_container, unwrap_model
from flexcache.hooks.read.activation_hooks import uncompiled
from flexcache.parallel.discover import runs_its_pipeline


class FlexModel(ModelWrapper):
    """Wrap a model so that hook functions read and edit whole activations, on any number of processes.

    Wrapping adds hooks and nothing else. Attributes of the model (``generate``, ``config``) can be used through the
    wrapper; `parameters` and `state_dict` are those of the model, plus those of `trainable_modules`.

    >>> layers, activations = nn.Sequential(nn.Linear(4, 8), nn.ReLU()), {}
    >>> model = FlexModel(layers, activations)
    >>> model.register_forward_hook(HookFunction("0", editing_function=lambda module, x, save_ctx, modules: 0 * x))
    >>> bool(model(torch.ones(2, 4)).any())
    False
    >>> activations["0"][0].shape  # one whole activation for each forward
    torch.Size([2, 8])
    >>> model.restore() is layers  # the model without hooks
    True

    On several processes every rank makes the same calls: it wraps, registers hooks and runs the model. Activations are
    gathered along sharded dims, in the order of the unsplit batch, over the microbatches of a pipeline too. Gradients
    are those of the loss averaged over data-parallel ranks and microbatches, as DDP, FSDP and torch's pipelining
    average the gradients of weights.

    Parameters
    ----------
    module
        The model, after it was distributed. In a pipeline of torch, the stage module of this rank, or a list of them.
    output_dict
        Filled with ``{name: [tensor, …]}`` on the ranks of *output_ranks*: one tensor for each forward, on the CPU,
        which nothing changes afterwards. None to record nothing.
    tensor_parallel_size, pipeline_parallel_size, data_parallel_size
        Found in the model's wrappers or weights if possible; checked if given. Copies of a model without a wrapper,
        and torch's pipelines, must be given; copies that are not given are independent of each other.
    process_group
        The ranks that share the model; by default all.
    output_ranks
        Ranks within the group that receive activations: the first by default, several, or ``"all"``.

    Raises
    ------
    ConfigError
        The sizes do not fit the model or the number of processes. Raised here for a pipeline, else in the first
        forward, since a model may be distributed after it was wrapped.

    Notes
    -----
    Not thread-safe. The design is that of FlexModel (Choi et al. 2023, arXiv 2312.03140).
    """

    _own_attributes = ("module", "_session")

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
        model = module if isinstance(module, nn.Module) else nn.ModuleList(module)
        stages = list(model) if isinstance(model, nn.ModuleList) else [model]
        session = Session(
            model,
            [unwrap_model(stage) for stage in stages],
            output_dict,
            lambda world: _check_output_ranks(output_ranks, world),
            {"pp": pipeline_parallel_size, "dp": data_parallel_size, "tp": tensor_parallel_size},
            process_group,
        )
        super().__init__(model, session.state.trainable)
        self._session = session
        self._index = ModuleIndex(stages)
        self._groups = HookGroups()
        self._finalizer = weakref.finalize(self, session.close)
        self._finalizer.atexit = False
        self._active_groups: tuple[tuple[str, ...], bool] = ((ALL,), False)
        if (pipeline_parallel_size or 1) > 1 or runs_its_pipeline(model):
            local = self._index.local_paths
            told = session.state.distribution.gather_objects(local)
            self._index.remote_paths = set().union(*told) - set(local)

    # Running

    def forward(
        self, *args: Any, groups: str | Sequence[str] | None = None, complement: bool = False, **kwargs: Any
    ) -> Any:
        """Run the model with the hook functions of *groups* active, or with all others if *complement* is True.

        Without *groups*, the groups set by `enable_hook_groups` are active; at first these are all. A compiled model
        runs uncompiled while hooks are active, since compiled code does not call hooks that were added later.

        Raises
        ------
        HookError
            There is no such group, the module of a hook did not run, an activation cannot be read, or an edit cannot
            be used.
        LayoutError
            An activation cannot be assembled from the pieces on the ranks.
        """
        before = self._active_groups
        if groups is not None:
            self.enable_hook_groups(groups, complement)
        try:
            active = any(hook.enabled for hook in self._session.hooks)
            with uncompiled(self.module) if active else nullcontext():
                return self.module(*args, **kwargs)
        except BaseException:
            self._session.abandon()
            raise
        finally:
            if groups is not None:
                self.enable_hook_groups(*before)

    @contextmanager
    def pipeline(self, schedule: Any) -> Iterator[None]:
        """Treat one step of a schedule of `torch.distributed.pipelining` as one forward.

        ::

            with model.pipeline(schedule):
                schedule.step(input_ids, target=labels)

        On exit the activations and gradients of all microbatches are assembled. Editing functions receive one
        microbatch at a time.

        Raises
        ------
        ConfigError
            *schedule* has no stages.
        HookError, LayoutError
            See `forward`.
        """
        stages = getattr(schedule, "_stages", None) or [
            stage for stage in [getattr(schedule, "_stage", None)] if stage is not None
        ]
        if not stages or not hasattr(stages[0], "forward_one_chunk"):
            raise ConfigError(
                "the schedule is not a pipeline schedule",
                expected="a schedule of torch.distributed.pipelining, such as ScheduleGPipe",
                found=type(schedule).__name__,
            )
        microbatches = int(schedule._n_microbatches)
        with self._session.step(stages, microbatches, microbatches if schedule.scale_grads else 1):
            yield

    # Registration. Hooks that are not HookFunctions are registered on the wrapper itself, as on any module.

    def register_forward_hook(self, hook: Any, *args: Any, **kwargs: Any) -> Any:
        """Read, and optionally edit, the output of a module."""
        if not isinstance(hook, HookFunction):
            return super().register_forward_hook(hook, *args, **kwargs)
        return self._register(hook, "forward")

    def register_forward_pre_hook(self, hook: Any, *args: Any, **kwargs: Any) -> Any:
        """Read, and optionally edit, an input of a module, positional or by keyword."""
        if not isinstance(hook, HookFunction):
            return super().register_forward_pre_hook(hook, *args, **kwargs)
        return self._register(hook, "forward_pre")

    def register_full_backward_hook(self, hook: Any, *args: Any, **kwargs: Any) -> Any:
        """Read, and optionally edit, the gradient of a module's input that flows through this module."""
        if not isinstance(hook, HookFunction):
            return super().register_full_backward_hook(hook, *args, **kwargs)
        return self._register(hook, "full_backward")

    def register_full_backward_pre_hook(self, hook: Any, *args: Any, **kwargs: Any) -> Any:
        """Read, and optionally edit, the gradient of a module's output."""
        if not isinstance(hook, HookFunction):
            return super().register_full_backward_pre_hook(hook, *args, **kwargs)
        return self._register(hook, "full_backward_pre")

    def register_hook(self, hook_function: HookFunction) -> None:
        """Read, and optionally edit, the whole gradient of a parameter, averaged over data-parallel ranks.

        Under FSDP2 it is the gradient accumulated so far.

        Raises
        ------
        HookError
            The parameter is part of a flat parameter of FSDP1 or DeepSpeed.
        """
        self._register(hook_function, "tensor")

    def register_trainable_module(self, name: str, module: nn.Module) -> None:
        """Add a module that editing functions receive as ``modules[name]``, and that is trained with the model.

        Before the next forward, all ranks receive the weights of rank 0. Its gradients are equal on all ranks that run
        the edit, so that they need no reduction.

        Raises
        ------
        ConfigError
            A trainable module of that name exists.
        """
        if name in self.trainable_modules:
            raise ConfigError(f"a trainable module {name!r} exists already", remedy="choose another name")
        self.trainable_modules[name] = module

    def _register(self, function: HookFunction, kind: Kind) -> None:
        if any(hook.function is function for hook in self._session.hooks):
            raise HookError(
                "the hook function is already registered",
                where=function.module_name,
                remedy="make another HookFunction",
            )
        if not self._finalizer.alive:
            raise HookError("the model was restored", remedy="wrap it again")
        if kind == "tensor":
            self._register_parameter(function)
        else:
            self._register_module(function, kind)
        self._groups.add_functions([function], ALL)
        self._switch_hooks()

    def _register_module(self, function: HookFunction, kind: Kind) -> None:
        found = self._index.find_modules(function.module_name)
        if any(is_container(module) for module in found):
            raise SiteError(
                f"{function.module_name} only holds modules and never runs itself",
                remedy=f"hook the modules in it: {function.module_name}.0",
            )
        self._session.register(function, kind, found)

    def _register_parameter(self, function: HookFunction) -> None:
        parameter, holders = self._index.find_parameter(function.module_name)
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
        self._session.register_parameter(function, parameter, holders, reduced)

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
        """Register a hook function on each module that a pattern matches, and make them a group.

        Parameters
        ----------
        group_constructor
            Part of a name, or a glob: ``"mlp"`` matches every MLP and every module in it, ``"model.layers.*.mlp"``
            only the MLPs. Names of parameters if *hook_type* is ``"tensor"``.

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
        chosen = self._index.match_names(group_constructor, parameters=hook_type == "tensor")
        functions = [HookFunction(name, expected_shape, editing_function, unpack_idx) for name in chosen]
        for function in functions:
            self._register(function, hook_type)
        self._groups.add_functions(functions, group_name)
        self._switch_hooks()
        return functions

    def update_hook_groups(
        self, group_constructor: Iterable[HookFunction] | HookFunction | str, group_name: str
    ) -> None:
        """Add registered hook functions to a group; *group_constructor* may be a pattern of module names."""
        self._groups.add_functions(self._registered_functions(group_constructor), group_name)
        self._switch_hooks()

    def remove_hook_groups(
        self, group_constructor: Iterable[HookFunction] | HookFunction | str, group_name: str
    ) -> None:
        """Remove hook functions from a group; they stay registered."""
        chosen = self._registered_functions(group_constructor)
        if isinstance(group_constructor, str):
            members = self._groups.functions_in(group_name)
            chosen = [function for function in chosen if function in members]
        self._groups.remove_functions(chosen, group_name)
        self._switch_hooks()

    def enable_hook_groups(self, groups: str | Sequence[str] = ALL, complement: bool = False) -> None:
        """Activate only the hook functions of *groups*, or all others if *complement* is True, in later forwards.

        Raises
        ------
        HookError
            There is no such group.
        """
        names = (groups,) if isinstance(groups, str) else tuple(groups)
        self._groups.functions_in(names)
        self._active_groups = names, complement
        self._switch_hooks()

    def get_hook_function_groups(self, hook_function: HookFunction) -> set[str]:
        """Return the names of the groups of a hook function."""
        return self._groups.groups_of(hook_function)

    def get_group_hook_functions(self, group_name: str) -> list[HookFunction]:
        """Return the hook functions of a group."""
        return self._groups.functions_in(group_name)

    @property
    def hook_groups(self) -> list[str]:
        """The names of the groups."""
        return list(self._groups)

    def hooked(self) -> list[dict[str, Any]]:
        """Return name, kind, groups, activity and editing of each hook function, in the order of registration."""
        return [
            {
                "name": hook.function.module_name,
                "key": hook.function.name,
                "kind": hook.kind,
                "groups": sorted(self._groups.groups_of(hook.function)),
                "active": hook.enabled,
                "edits": hook.function.editing_function is not None,
            }
            for hook in self._session.hooks
        ]

    def _registered_functions(self, constructor: Iterable[HookFunction] | HookFunction | str) -> list[HookFunction]:
        if isinstance(constructor, str):
            return self._groups.match_functions(constructor)
        functions = [constructor] if isinstance(constructor, HookFunction) else list(constructor)
        registered = {hook.function for hook in self._session.hooks}
        for function in functions:
            if function not in registered:
                raise HookError("the hook function is not registered", where=function.module_name)
        return functions

    def _switch_hooks(self) -> None:
        names, complement = self._active_groups
        names = tuple(name for name in names if name in set(self._groups))
        members = set(self._groups.functions_in(names))
        for hook in self._session.hooks:
            hook.enabled = (hook.function in members) != complement

    # The model's own

    @property
    def save_ctx(self) -> Any:
        """A namespace in which editing functions keep values between forwards; each rank has its own."""
        return self._session.state.save_ctx

    @property
    def wrapped_module_names(self) -> list[str]:
        """The names of the modules that can be hooked, those of other pipeline stages included."""
        return self._index.hookable_paths

    def restore(self) -> nn.Module:
        """Remove all hooks and return the wrapped model; later calls have no effect."""
        self._finalizer()
        module: nn.Module = self.module
        return module

    def extra_repr(self) -> str:
        """Return one line for each hook function."""
        lines = [
            f"{'●' if entry['active'] else '○'} {entry['name']} ({entry['kind']})"
            + (" edited" if entry["edits"] else "")
            + f" in {', '.join(entry['groups'])}"
            for entry in self.hooked()
        ]
        return "\n".join(lines[:40] + ([f"… {len(lines) - 40} more"] if len(lines) > 40 else []))


def _check_output_ranks(ranks: Literal["all"] | int | Sequence[int], world: int) -> tuple[int, ...]:
    chosen = tuple(range(world)) if ranks == "all" else (ranks,) if isinstance(ranks, int) else tuple(ranks)
    bad = [rank for rank in chosen if not isinstance(rank, int) or not 0 <= rank < world]
    if bad:
        raise ConfigError("output_ranks names ranks that do not exist", expected=f"0 to {world - 1}", found=str(bad))
    return chosen
