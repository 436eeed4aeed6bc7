"""Checks of the sites of experts: their sum, their share in the MLP's output, and their down-projections."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from flexcache.errors import SiteError
from flexcache.hooks.locate.hook_point import HookPoint
from flexcache.hooks.locate.hook_scope import hook_scope
from flexcache.hooks.locate.names import modules_by_path
from flexcache.hooks.read.measure import Example, ExampleReader, read_example, run_example
from flexcache.site import EXPERT_SIDES

ROUNDINGS = 4
"""The bound on a difference, in units of eps · (sum of the norms of the summands), token by token."""

SUM = "summands of the MLP's output"


def check_experts(
    model: nn.Module,
    points: Sequence[HookPoint],
    *,
    example: Example | None = None,
    reader: ExampleReader = read_example,
    alone: bool = True,
) -> None:
    """Check the sites of experts among *points*, by one forward of a small batch.

    - The sum of ``expert_out`` over the chosen experts is the output of the experts module.
    - Without the output of the experts, the output of the MLP around them is smaller by this sum, whatever shared
      experts and gates it has. This is left out unless *alone*: it runs each MLP once more.
    - The down-projection of ``mlp_post`` by an expert, times its ``expert_weight``, is its ``expert_out``.

    Raises
    ------
    SiteError
        A site is not what its name says. The error gives the site, the layer and the size of the deviation.
    """
    asked = [point for point in points if point.of_experts and point.array in EXPERT_SIDES]
    if not asked:
        return
    places = {point.module: _Places(point) for point in asked}
    neurons = [point for point in asked if point.side == "neurons"]
    wanted = [point for place in places.values() for point in (place.output, place.summands)]
    wanted += [places[point.module].projections for point in neurons]
    read = reader(model, tuple(dict.fromkeys(wanted)), example).values
    for place in places.values():
        summands = read[place.summands].double()
        size = summands.norm(dim=-1).sum(-1)
        _compare(place.summands, "summands of the experts' output", read[place.output], summands.sum(-2), size)
    for point in neurons:
        place = places[point.module]
        summands, (made, terms) = read[place.summands], read[place.projections].double().unbind(-2)
        rounding = torch.finfo(torch.float32).eps / torch.finfo(summands.dtype).eps  # of the terms of a product
        size = summands.double().norm(dim=-1) + rounding * terms.norm(dim=-1)
        _compare(point, "the input of the experts' down-projections", summands, made, size)
    added = {point.module: places[point.module] for point in asked if point.side == "summands"}
    if alone and added:
        _check_share(model, added, read, example)


class _Places:
    """The points of one experts module that the checks read."""

    def __init__(self, point: HookPoint) -> None:
        self.summands = replace(point, array="expert_out", side="summands")
        self.projections = replace(point, array="projections", side="projections")
        self.output = replace(point, array="experts", side="output")


def _check_share(
    model: nn.Module,
    places: Mapping[str, _Places],
    read: Mapping[HookPoint, torch.Tensor],
    example: Example | None,
) -> None:
    """Check that the MLP around experts adds what they return to the rest of its output."""
    named = modules_by_path(model)
    runs: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def note(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        copied = [value.clone() if isinstance(value, torch.Tensor) else value for value in (*args, *kwargs.values())]
        runs[path] = tuple(copied[: len(args)]), dict(zip(kwargs, copied[len(args) :], strict=True))

    def note_inputs() -> Iterator[RemovableHandle]:
        for path in places:
            yield named[_around(path)].register_forward_pre_hook(
                lambda _, args, kwargs, path=path: note(path, args, kwargs), with_kwargs=True
            )

    with hook_scope(note_inputs()):
        run_example(model, (), lambda point, tensor: None, example)
    for path, place in places.items():
        around, (args, kwargs) = named[_around(path)], runs[path]
        with torch.no_grad():
            whole = _first(around(*args, **kwargs))
            silence = named[path].register_forward_hook(lambda _, args, output: torch.zeros_like(output))
            with hook_scope([silence]):
                rest = _first(around(*args, **kwargs))
        summands = read[place.summands].double()
        if whole.shape[-1] != summands.shape[-1]:
            raise _wrong(place.summands, SUM, f"summands of {summands.shape[-1]} features, and {whole.shape[-1]}")
        terms = torch.cat([summands, rest.double().view_as(summands[:, :, 0]).unsqueeze(-2)], dim=-2)
        size = terms.norm(dim=-1).sum(-1)
        _compare(place.summands, SUM, whole, terms.sum(-2), size)


def _around(experts: str) -> str:
    return experts.rpartition(".")[0]


def _first(output: Any) -> torch.Tensor:
    """Return a copy of the tensor that a module returns, or of the first of several."""
    tensor = output if isinstance(output, torch.Tensor) else output[0]
    return tensor.clone()


def _compare(point: HookPoint, law: str, target: torch.Tensor, made: torch.Tensor, size: torch.Tensor) -> None:
    """Raise SiteError unless *made* is *target* to rounding; *size* is the sum of the norms of what was added up."""
    difference = (target.double().view_as(made) - made).norm(dim=-1)
    bound = ROUNDINGS * torch.finfo(target.dtype).eps * size
    ratio = float(torch.where(difference == 0, 0.0, difference / bound).max())
    if not ratio <= 1:
        raise _wrong(point, law, f"a deviation of {ratio:.3g} times the bound")


def _wrong(point: HookPoint, law: str, found: str) -> SiteError:
    return SiteError(
        f"{point.array} of layer {point.layer} is not what its name says",
        where=str(point),
        expected=f"{law}, to rounding",
        found=found,
        remedy=f"store {point.module} instead: the model may scale or norm what its experts return",
    )
