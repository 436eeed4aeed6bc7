"""A survey of how the ranks of a model share each activation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

from flexcache.errors import LayoutError
from flexcache.hooks.checks.survey import SIDES, ModuleSide, SurveyedModule, first_input_tensor, first_output_tensor
from flexcache.hooks.locate.hook_scope import hook_scope
from flexcache.hooks.locate.names import is_container, modules_by_path
from flexcache.hooks.read.measure import EXAMPLE_SHAPE, Example, run_example
from flexcache.parallel.assembly import CHECKSUM_TOLERANCE
from flexcache.parallel.layout import find_sharded_dim
from flexcache.parallel.meta_model import BatchExtent

Spread = Literal["replicated", "sharded", "unexplained"]


@dataclass(frozen=True)
class Sharding:
    """The way in which ranks share an activation.

    Attributes
    ----------
    spread
        ``"replicated"``: each rank has all of it. ``"sharded"``: each rank has a part along one dim. ``"unexplained"``:
        neither.
    dim
        The dim along which it is sharded.
    sizes
        The size of each rank's part along that dim, by rank.
    why
        The reason for ``"unexplained"``.
    """

    spread: Spread
    dim: int | None = None
    sizes: tuple[int, ...] = ()
    why: str = ""

    def __str__(self) -> str:
        if self.spread == "sharded":
            return f"sharded on dim {self.dim} ({'+'.join(map(str, self.sizes))})"
        return f"cannot be explained: {self.why}" if self.spread == "unexplained" else self.spread


@dataclass(frozen=True)
class LocalActivation:
    """The activation of one rank: its shape, and two checksums that distinguish copies from different values."""

    shape: tuple[int, ...]
    sums: tuple[float, float] = field(default=(0.0, 0.0), compare=False)


def survey_sharding(
    model: nn.Module, surveyed: Iterable[SurveyedModule], *, example: Example | None = None, group: Any = None
) -> dict[ModuleSide, Sharding]:
    """Return how the ranks of a tensor-parallel model share each activation, by path and side.

    Collective: every rank of *group* runs the model once on the same small example, with its weights, and sends the
    others its shapes and checksums. No activation is sent. Activations inside experts are unexplained, since their rows
    are not the tokens in order; so are those of equal shape and different values: sums that are not reduced yet.

    Parameters
    ----------
    surveyed
        The result of `survey`: the whole shapes.

    Raises
    ------
    SiteError
        The model cannot run the example.
    """
    held = read_local_activations(model, example=example)
    told: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, held, group=group)
    extent = BatchExtent(*EXAMPLE_SHAPE)
    found: dict[ModuleSide, Sharding] = {}
    for entry in surveyed:
        for side in SIDES:
            sizes = entry.input if side == "input" else entry.output
            if sizes is not None:
                whole = tuple(size.of(extent) for size in sizes)
                found[entry.path, side] = compare_ranks(whole, told, (entry.path, side))
    return found


def read_local_activations(model: nn.Module, *, example: Example | None = None) -> dict[ModuleSide, LocalActivation]:
    """Run the model on a small example; return this rank's activation on each side of each module in its first run.

    Raises
    ------
    SiteError
        The model cannot run the example.
    """
    found: dict[ModuleSide, LocalActivation] = {}

    def register_hooks() -> Iterator[RemovableHandle]:
        # Outside the hooks that distribute a module, as the hooks of FlexModel are.
        for path, module in modules_by_path(model).items():
            if not is_container(module):
                yield module.register_forward_pre_hook(
                    lambda _, args, kwargs, path=path: _note(found, (path, "input"), first_input_tensor(args, kwargs)),
                    prepend=True,
                    with_kwargs=True,
                )
                yield module.register_forward_hook(
                    lambda _, args, output, path=path: _note(found, (path, "output"), first_output_tensor(output))
                )

    with hook_scope(register_hooks()):
        run_example(model, (), lambda point, tensor: None, example)
    return found


def compare_ranks(
    whole: tuple[int, ...], told: Sequence[Mapping[ModuleSide, LocalActivation]], place: ModuleSide
) -> Sharding:
    """Return how ranks share an activation of shape *whole*, from the activation of each."""
    if "experts" in place[0].split(".")[:-1]:  # a shape that fits would be chance; FlexModel raises as well
        return Sharding("unexplained", why="inside experts rows are not the tokens in order")
    absent = [rank for rank, held in enumerate(told) if place not in held]
    if absent:
        named = "no rank reads it" if len(absent) == len(told) else f"not read on rank {', '.join(map(str, absent))}"
        return Sharding("unexplained", why=named)
    held = [ranks[place] for ranks in told]
    shapes = [each.shape for each in held]
    try:
        dims = {find_sharded_dim(shape, whole, place[0], len(told)) for shape in shapes}
    except LayoutError:
        return Sharding("unexplained", why=f"{_listed(shapes)} of {whole}")
    if dims == {None}:
        return Sharding("replicated") if _alike(held) else Sharding("unexplained", why="ranks have different values")
    dim = next(iter(dims))
    if dim is None or len(dims) > 1 or sum(shape[dim] for shape in shapes) != whole[dim]:
        return Sharding("unexplained", why=f"{_listed(shapes)} of {whole}")
    return Sharding("sharded", dim, tuple(shape[dim] for shape in shapes))


def _alike(held: Sequence[LocalActivation]) -> bool:
    if len({each.sums for each in held}) == 1:
        return True  # equal, also if infinite
    scale = max(each.sums[1] for each in held)
    spread = max(max(values) - min(values) for values in zip(*(each.sums for each in held), strict=True))
    return spread <= CHECKSUM_TOLERANCE * scale


def _listed(shapes: Sequence[tuple[int, ...]]) -> str:
    return " and ".join(dict.fromkeys(map(str, shapes)))


def _note(found: dict[ModuleSide, LocalActivation], place: ModuleSide, tensor: torch.Tensor | None) -> None:
    if tensor is None or place in found:
        return
    if type(tensor) is not torch.Tensor and hasattr(tensor, "to_local"):
        tensor = tensor.to_local()  # not full_tensor(): some ranks may not reach this hook
    values = tensor.detach()
    values = (torch.view_as_real(values) if values.is_complex() else values).reshape(-1).to(torch.float64)
    weights = torch.linspace(1, 2, values.numel(), dtype=torch.float64, device=values.device)
    sums = (float((values * weights).mean()), float(values.abs().mean())) if values.numel() else (0.0, 0.0)
    found[place] = LocalActivation(tuple(tensor.shape), sums)
