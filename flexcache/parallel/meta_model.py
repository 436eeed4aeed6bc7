"""An unsharded twin of a model on the meta device, which tells the whole shape of every activation."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree

_ON_META = {"_experts_implementation": "batched_mm", "pad_token_id": None}
_VALUE_DEPENDENT = ("attention_mask", "position_ids", "past_key_values", "cache_position", "labels")
_REPLACED = ("forward", "_hf_hook", "_old_forward", "_compiled_call_impl")


class Size(NamedTuple):
    """The size of a dim: `times` · batch^`batch` · length^`length`."""

    times: int
    batch: int
    length: int

    def of(self, extent: Extent) -> int:
        """Return the size for a batch of that extent."""
        return self.times * extent.batch**self.batch * extent.length**self.length

    def __str__(self) -> str:
        names = ["batch"] * self.batch + ["length"] * self.length
        return "·".join(([str(self.times)] if self.times != 1 or not names else []) + names)


class Extent(NamedTuple):
    """Rows and length of a batch, as its first tensor has them."""

    batch: int
    length: int


@dataclass(frozen=True)
class ShapeProbe:
    """A place whose shape is asked for: *read* takes a module's arguments, keywords and output, and finds a tensor."""

    key: Hashable
    module: nn.Module
    read: Callable[[tuple[Any, ...], dict[str, Any], Any], torch.Tensor | None]


Shape = tuple[Size, ...]


@dataclass(frozen=True)
class Learned:
    """Shapes at probes, one for each time that a probe's module runs, and the batches that they hold for."""

    shapes: dict[Hashable, list[Shape]]
    here: Extent
    any_batch: bool
    any_length: bool

    def covers(self, extent: Extent) -> bool:
        """Whether the shapes hold for a batch of that extent."""
        rows = self.any_batch or extent.batch == self.here.batch
        return rows and (self.any_length or extent.length == self.here.length)


class MetaModel:
    """The twin of a module, and what was learned from running it.

    Its weights take no memory; it has the whole, unsharded shapes, whichever way the module's own are sharded
    (DTensor, FSDP2, ZeRO-3), and none of its hooks or replaced forwards.
    """

    def __init__(self, root: nn.Module) -> None:
        self._of: dict[int, nn.Module] = {}
        self._root = _twin(root, self._of)
        self._device: AbstractContextManager[Any] = nullcontext()

    def learn(self, probes: Iterable[ShapeProbe], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Learned:
        """Return the shape at each probe for each time that its module runs, as functions of the batch's extent.

        The twin runs twice: with inputs of the shapes given, and with more rows and a greater length. Where the
        second run is refused (a fixed length, say), only rows are varied; where that is refused too, sizes are
        taken as constant, and the answer holds for this extent alone.

        Raises
        ------
        Exception
            Whatever the module raises when it runs on the meta device: data-dependent code, for the most part.
        """
        probes = list(probes)
        here = extent_of(args, kwargs)
        error: Exception | None = None
        attempts = itertools.product(_candidates(args, kwargs), (torch.device("meta"), nullcontext()))
        for inputs, self._device in attempts:  # where the module makes tensors of its own: most belong on meta, too
            try:
                first = self._run(probes, *_on_meta(inputs, here, here))
            except Exception as raised:
                error = error or raised
                continue
            for other in (Extent(here.batch + 3, here.length + 5), Extent(here.batch + 3, here.length)):
                try:
                    second = self._run(probes, *_on_meta(inputs, here, other))
                    shapes = {key: _sizes(runs, second[key], here, other) for key, runs in first.items()}
                except Exception:
                    continue
                return Learned(shapes, here, any_batch=True, any_length=other.length != here.length)
            fixed = {key: [tuple(Size(n, 0, 0) for n in shape) for shape in runs] for key, runs in first.items()}
            return Learned(fixed, here, any_batch=False, any_length=False)
        assert error is not None
        raise error

    def _run(
        self, probes: list[ShapeProbe], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[Hashable, list[tuple[int, ...]]]:
        found: dict[Hashable, list[tuple[int, ...]]] = {probe.key: [] for probe in probes}
        handles = []
        try:
            for probe in probes:
                twin = self._of.get(id(probe.module))
                if twin is not None:
                    handles.append(twin.register_forward_hook(_recorder(probe, found[probe.key]), with_kwargs=True))
            with torch.no_grad(), without_values(self._root), self._device:
                self._root(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return found


def extent_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Extent:
    """Return rows and length of a batch: the first two dims of its first tensor, a length of 1 where there is none.

    A matrix of floating-point numbers has rows of features, and no length.
    """
    for value in pytree.tree_leaves((args, dict(kwargs))):
        if isinstance(value, torch.Tensor) and value.ndim >= 1:
            sequence = value.ndim >= 3 or (value.ndim == 2 and not value.is_floating_point())
            return Extent(value.shape[0], value.shape[1] if sequence else 1)
    return Extent(1, 1)


@contextmanager
def without_values(model: nn.Module) -> Iterator[None]:
    """Turn off in a model's configurations what makes transformers look for values of tensors, for the while.

    That is the grouped matrix product of mixtures of experts, and GPT-2's warning of padding without a mask.
    """
    held = [getattr(module, "config", None) for module in model.modules()]
    before = {
        (id(config), name): (config, getattr(config, name))
        for config in held
        for name in _ON_META
        if hasattr(config, name)
    }
    try:
        for (_, name), (config, _) in before.items():
            setattr(config, name, _ON_META[name])
        yield
    finally:
        for (_, name), (config, value) in before.items():
            setattr(config, name, value)


def _recorder(probe: ShapeProbe, found: list[tuple[int, ...]]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        tensor = probe.read(args, kwargs, output)
        found.append(tuple(tensor.shape) if tensor is not None else ())

    return hook


def _twin(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    if id(module) in made:
        return made[id(module)]
    cls = type(module)
    if any(base.__name__ == "FSDPModule" for base in cls.__mro__):
        cls = cls.__mro__[2]  # fully_shard puts a class of (FSDPModule, the original) in front
    twin = cls.__new__(cls)
    made[id(module)] = twin
    state = dict(module.__dict__)
    for name in _REPLACED:
        state.pop(name, None)
    for name in [name for name, value in state.items() if "hook" in name and isinstance(value, dict)]:
        state[name] = OrderedDict()
    state["_parameters"] = {
        name: None if value is None else nn.Parameter(_meta(value), requires_grad=False)
        for name, value in module._parameters.items()
    }
    state["_buffers"] = {name: None if value is None else _meta(value) for name, value in module._buffers.items()}
    state["_modules"] = {name: None if child is None else _twin(child, made) for name, child in module._modules.items()}
    state["training"] = False
    twin.__dict__.update(state)
    return twin


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(getattr(tensor, "ds_shape", None) or tensor.shape, dtype=tensor.dtype, device="meta")


def _candidates(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Yield inputs to try: all of them, then without those that transformers looks into, then the first tensor."""
    cache = {"use_cache": True} if "input_ids" in kwargs or "inputs_embeds" in kwargs else {}
    yield args, {k: v for k, v in kwargs.items() if k not in _VALUE_DEPENDENT} | cache
    yield args, dict(kwargs)
    yield args, {k: v for k, v in kwargs.items() if k not in _VALUE_DEPENDENT}
    if args:
        yield args[:1], {}
    for name in ("input_ids", "inputs_embeds"):
        if name in kwargs:
            yield (), {name: kwargs[name]}


def _on_meta(
    inputs: tuple[tuple[Any, ...], dict[str, Any]], here: Extent, other: Extent
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the inputs on the meta device, dims of the extent *here* resized to *other*."""

    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        shape = list(value.shape)
        if shape and shape[0] == here.batch:
            shape[0] = other.batch
        if len(shape) > 1 and shape[1] == here.length and (len(shape) > 2 or not value.is_floating_point()):
            shape[1] = other.length
        return torch.empty(shape, dtype=value.dtype, device="meta")

    args, kwargs = pytree.tree_map(move, inputs)
    return args, kwargs


def _sizes(first: list[tuple[int, ...]], second: list[tuple[int, ...]], here: Extent, other: Extent) -> list[Shape]:
    try:
        return [shape_rule(a, b, here, other) for a, b in zip(first, second, strict=False)]
    except ValueError:
        return []  # of this module nothing is known; the others' shapes hold


def shape_rule(first: tuple[int, ...], second: tuple[int, ...], here: Extent, other: Extent) -> Shape:
    """Return the rule that gives *first* for the extent *here* and *second* for the extent *other*.

    >>> tuple(map(str, shape_rule((2, 7, 64), (5, 12, 64), Extent(2, 7), Extent(5, 12))))
    ('batch', 'length', '64')

    Raises
    ------
    ValueError
        No product of a constant, the rows and the length gives both.
    """
    if len(first) != len(second):
        raise ValueError(f"a shape of {len(first)} dims becomes one of {len(second)} with another batch")
    return tuple(_size(a, b, here, other) for a, b in zip(first, second, strict=True))


def _size(first: int, second: int, here: Extent, other: Extent) -> Size:
    for batch, length in ((0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)):
        unit = Size(1, batch, length).of(here)
        if unit and first % unit == 0:
            size = Size(first // unit, batch, length)
            if size.of(other) == second:
                return size
    raise ValueError(f"a dim of {first} for {here} is {second} for {other}")
