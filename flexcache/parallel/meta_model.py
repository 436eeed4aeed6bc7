"""An unsharded copy of a model on the meta device, from which the whole shape of every activation is learned."""

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


class DimSize(NamedTuple):
    """The size of a dim: `times` · batch^`batch` · length^`length`.

    >>> str(DimSize(64, 0, 0)), str(DimSize(2, 1, 1)), DimSize(2, 1, 1).of(BatchExtent(3, 5))
    ('64', '2·batch·length', 30)
    """

    times: int
    batch: int
    length: int

    def of(self, extent: BatchExtent) -> int:
        """Return the size for a batch of the given extent."""
        return self.times * extent.batch**self.batch * extent.length**self.length

    def __str__(self) -> str:
        names = ["batch"] * self.batch + ["length"] * self.length
        return "·".join(([str(self.times)] if self.times != 1 or not names else []) + names)


class BatchExtent(NamedTuple):
    """Rows and length of a batch, from its first tensor."""

    batch: int
    length: int


@dataclass(frozen=True)
class ShapeProbe:
    """A place whose shape is wanted: *read* finds a tensor in a module's arguments, keywords and output."""

    key: Hashable
    module: nn.Module
    read: Callable[[tuple[Any, ...], dict[str, Any], Any], torch.Tensor | None]


Shape = tuple[DimSize, ...]


@dataclass(frozen=True)
class LearnedShapes:
    """Shapes at probes, one for each run of a probe's module, and the batches for which they hold."""

    shapes: dict[Hashable, list[Shape]]
    here: BatchExtent
    any_batch: bool
    any_length: bool

    def covers(self, extent: BatchExtent) -> bool:
        """Return True if the shapes hold for a batch of the given extent."""
        rows = self.any_batch or extent.batch == self.here.batch
        return rows and (self.any_length or extent.length == self.here.length)


class MetaModel:
    """A copy of a module on the meta device.

    Its weights use no memory. It has the whole, unsharded shapes, however the module is sharded (DTensor, FSDP2,
    ZeRO-3), and none of the module's hooks or replaced forwards.
    """

    def __init__(self, root: nn.Module) -> None:
        self._of: dict[int, nn.Module] = {}
        self._root = _meta_copy(root, self._of)
        self._device: AbstractContextManager[Any] = nullcontext()

    def learn_shapes(
        self, probes: Iterable[ShapeProbe], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> LearnedShapes:
        """Return the shape at each probe for each run of its module, as functions of the batch's extent.

        The copy runs twice: with inputs of the given shapes, and with more rows and a greater length. If the second
        run fails (because of a fixed length, for example), only the rows are varied. If that fails too, sizes are
        assumed to be constant, and the result holds for this extent only.

        Raises
        ------
        Exception
            Any error of the module on the meta device, most often because of data-dependent code.
        """
        probes = list(probes)
        here = batch_extent(args, kwargs)
        error: Exception | None = None
        attempts = itertools.product(_candidates(args, kwargs), (torch.device("meta"), nullcontext()))
        for inputs, self._device in attempts:  # the device of tensors that the module makes: mostly meta
            try:
                first = self._run(probes, *_on_meta(inputs, here, here))
            except Exception as raised:
                error = error or raised
                continue
            for other in (BatchExtent(here.batch + 3, here.length + 5), BatchExtent(here.batch + 3, here.length)):
                try:
                    second = self._run(probes, *_on_meta(inputs, here, other))
                    shapes = {key: _sizes(runs, second[key], here, other) for key, runs in first.items()}
                except Exception:
                    continue
                return LearnedShapes(shapes, here, any_batch=True, any_length=other.length != here.length)
            fixed = {key: [tuple(DimSize(n, 0, 0) for n in shape) for shape in runs] for key, runs in first.items()}
            return LearnedShapes(fixed, here, any_batch=False, any_length=False)
        assert error is not None
        raise error

    def _run(
        self, probes: list[ShapeProbe], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[Hashable, list[tuple[int, ...]]]:
        found: dict[Hashable, list[tuple[int, ...]]] = {probe.key: [] for probe in probes}
        handles = []
        try:
            for probe in probes:
                copied = self._of.get(id(probe.module))
                if copied is not None:
                    handles.append(copied.register_forward_hook(_recorder(probe, found[probe.key]), with_kwargs=True))
            with torch.no_grad(), without_values(self._root), self._device:
                self._root(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return found


def batch_extent(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> BatchExtent:
    """Return rows and length of a batch: the first two dims of its first tensor, or a length of 1 without a second.

    A matrix of floating-point numbers has rows of features, and no length.
    """
    for value in pytree.tree_leaves((args, dict(kwargs))):
        if isinstance(value, torch.Tensor) and value.ndim >= 1:
            sequence = value.ndim >= 3 or (value.ndim == 2 and not value.is_floating_point())
            return BatchExtent(value.shape[0], value.shape[1] if sequence else 1)
    return BatchExtent(1, 1)


@contextmanager
def without_values(model: nn.Module) -> Iterator[None]:
    """Turn off the settings of a model's configurations that make transformers inspect values of tensors.

    These are the grouped matrix product of mixtures of experts, and GPT-2's warning about padding without a mask.
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


def _meta_copy(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    if id(module) in made:
        return made[id(module)]
    cls = type(module)
    if any(base.__name__ == "FSDPModule" for base in cls.__mro__):
        cls = cls.__mro__[2]  # fully_shard puts a class of (FSDPModule, the original) in front
    copied = cls.__new__(cls)
    made[id(module)] = copied
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
    state["_modules"] = {
        name: None if child is None else _meta_copy(child, made) for name, child in module._modules.items()
    }
    state["training"] = False
    copied.__dict__.update(state)
    return copied


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(getattr(tensor, "ds_shape", None) or tensor.shape, dtype=tensor.dtype, device="meta")


def _candidates(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Yield inputs to try: all, then those that transformers does not inspect, then only the first tensor."""
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
    inputs: tuple[tuple[Any, ...], dict[str, Any]], here: BatchExtent, other: BatchExtent
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the inputs on the meta device, with dims of the extent *here* resized to *other*."""

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


def _sizes(
    first: list[tuple[int, ...]], second: list[tuple[int, ...]], here: BatchExtent, other: BatchExtent
) -> list[Shape]:
    try:
        return [shape_rule(a, b, here, other) for a, b in zip(first, second, strict=False)]
    except ValueError:
        return []  # nothing is known about this module; the shapes of the others hold


def shape_rule(first: tuple[int, ...], second: tuple[int, ...], here: BatchExtent, other: BatchExtent) -> Shape:
    """Return the rule that gives *first* for the extent *here* and *second* for the extent *other*.

    >>> tuple(map(str, shape_rule((2, 7, 64), (5, 12, 64), BatchExtent(2, 7), BatchExtent(5, 12))))
    ('batch', 'length', '64')

    Raises
    ------
    ValueError
        No product of a constant, the rows and the length gives both.
    """
    if len(first) != len(second):
        raise ValueError(f"a shape of {len(first)} dims becomes one of {len(second)} with another batch")
    return tuple(_size(a, b, here, other) for a, b in zip(first, second, strict=True))


def _size(first: int, second: int, here: BatchExtent, other: BatchExtent) -> DimSize:
    for batch, length in ((0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)):
        unit = DimSize(1, batch, length).of(here)
        if unit and first % unit == 0:
            size = DimSize(first // unit, batch, length)
            if size.of(other) == second:
                return size
    raise ValueError(f"a dim of {first} for {here} is {second} for {other}")
