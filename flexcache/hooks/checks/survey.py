"""Every module of a model that runs: what it reads and returns, which site it is, and how ranks share it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from flexcache.errors import HookError, LayoutError, SiteError
from flexcache.hooks.flexmodel.pytree import input_leaf, tensor_leaf
from flexcache.hooks.locate.blocks import find_blocks
from flexcache.hooks.locate.hook_point import HookPoint
from flexcache.hooks.locate.names import modules, text_config, unwrap
from flexcache.hooks.locate.search import find_hook_points, is_container
from flexcache.hooks.locate.vision import default_pixels, example_pixels, reads_images
from flexcache.hooks.read.measure import EXAMPLE_SHAPE, Example, run_example
from flexcache.parallel.assembly import ALIKE
from flexcache.parallel.layout import explain
from flexcache.parallel.meta_model import Extent, MetaModel, Shape, ShapeProbe
from flexcache.site import ONCE, STANDARD, Side, Site

TIMES = " × "
SIDES: tuple[Side, Side] = ("input", "output")


@dataclass(frozen=True)
class Surveyed:
    """A module that runs.

    Attributes
    ----------
    path
        Dotted, without prefixes of wrappers; ``""`` is the model itself.
    kind
        Name of its class.
    input, output
        Sizes of the first tensor that it is given, and of the first that it returns, of the whole activation; None
        where there is no tensor. Of its first run, where it runs several times.
    dtype
        Of what it returns, or else of what it is given, such as ``"float32"``; None where neither is a tensor.
    runs
        How many times it runs in one forward.
    points
        The standard sites that are read here.
    """

    path: str
    kind: str
    input: Shape | None
    output: Shape | None
    dtype: str | None
    runs: int = 1
    points: tuple[HookPoint, ...] = ()

    def shape(self, side: Side) -> str:
        """Return the shape of a side in symbols, ``"batch × length × 64"``, or ``"–"`` where there is none."""
        sizes = self.input if side == "input" else self.output
        if sizes is None:
            return "–"
        return TIMES.join(map(str, sizes)) or "a number"


def survey(model: nn.Module, *, example: Example | None = None) -> tuple[Surveyed, ...]:
    """Return every module of *model* that runs in a forward, in module order.

    The model itself does not run, but a twin on the meta device, which needs no weights: *model* may be a skeleton
    on that device, or sharded. Shapes are those of the whole activations.

    Parameters
    ----------
    example
        For models that take neither ``input_ids`` nor ``pixel_values``: a function of (sequences, tokens) that makes
        their inputs.

    Raises
    ------
    SiteError
        The model does not run without weights on an example.
    """
    root = unwrap(model)
    named = {path: module for path, module in modules(model).items() if not is_container(module)}
    dtypes: dict[tuple[str, Side], str] = {}
    probes = [_probe(path, module, side, dtypes) for path, module in named.items() for side in SIDES]
    args, kwargs = _inputs(model, example)
    try:
        learned = MetaModel(root).learn(probes, args, kwargs)
    except Exception as error:
        raise SiteError(
            "the model cannot be surveyed: it does not run without weights",
            where=type(root).__name__,
            expected=f"a forward of {EXAMPLE_SHAPE[0]} sequences of {EXAMPLE_SHAPE[1]} tokens on the meta device",
            found=f"{type(error).__name__}: {error}",
            remedy="pass example=, a function of (sequences, tokens) that makes the inputs of the model",
        ) from error
    points = standard_hook_points(model)
    return tuple(
        Surveyed(
            path,
            type(module).__name__,
            learned.shapes[path, "input"][0] if (path, "input") in dtypes else None,
            learned.shapes[path, "output"][0] if (path, "output") in dtypes else None,
            dtypes.get((path, "output"), dtypes.get((path, "input"))),
            len(learned.shapes[path, "output"]),
            tuple(point for point in points if point.module == path),
        )
        for path, module in named.items()
        if learned.shapes[path, "output"]
    )


def standard_hook_points(model: nn.Module) -> tuple[HookPoint, ...]:
    """Return the standard sites that *model* has, of every layer that has them; none without one stack of blocks."""
    try:
        depth = len(find_blocks(model)[1])
    except SiteError:
        return ()
    found: list[HookPoint] = []
    for name, layer in ((name, layer) for name in STANDARD for layer in range(depth)):
        with suppress(SiteError):
            found.extend(find_hook_points(model, Site(name), layer))
    for name in ONCE:
        with suppress(SiteError):
            found.extend(find_hook_points(model, Site(name)))
    return tuple(found)


Spread = Literal["replicated", "sharded", "unexplained"]


@dataclass(frozen=True)
class Sharding:
    """How the ranks share an activation.

    Attributes
    ----------
    spread
        ``"replicated"``: each has all of it. ``"sharded"``: each has a part along one dim. ``"unexplained"``: neither.
    dim
        Along which it is sharded.
    sizes
        Of each rank's part along that dim, by rank.
    why
        What is not explained.
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
class Held:
    """What one rank has of an activation: its shape, and two checksums that tell copies from different values."""

    shape: tuple[int, ...]
    sums: tuple[float, float] = field(default=(0.0, 0.0), compare=False)


Place = tuple[str, Side]
"""A module's path and side."""


def survey_sharding(
    model: nn.Module, surveyed: Iterable[Surveyed], *, example: Example | None = None, group: Any = None
) -> dict[Place, Sharding]:
    """Return how the ranks of a tensor-parallel model share each activation, by path and side.

    Collective: every rank of *group* runs the model once on the same small example, with its weights, and tells the
    others the shapes and checksums that it had. No activation is sent. That of experts, whose rows are not the tokens
    in order, is unexplained, and so is what ranks have of one shape with different values: sums not added up yet.

    Parameters
    ----------
    surveyed
        What `survey` says of the model: the whole shapes.

    Raises
    ------
    SiteError
        The model cannot run the example.
    """
    held = observe(model, example=example)
    told: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, held, group=group)
    extent = Extent(*EXAMPLE_SHAPE)
    found: dict[Place, Sharding] = {}
    for entry in surveyed:
        for side in SIDES:
            sizes = entry.input if side == "input" else entry.output
            if sizes is not None:
                whole = tuple(size.of(extent) for size in sizes)
                found[entry.path, side] = compare(whole, told, (entry.path, side))
    return found


def observe(model: nn.Module, *, example: Example | None = None) -> dict[Place, Held]:
    """Run the model on a small example; return what this rank has on each side of each module in its first run.

    Raises
    ------
    SiteError
        The model cannot run the example.
    """
    found: dict[Place, Held] = {}
    handles = []
    try:
        for path, module in modules(model).items():
            if is_container(module):
                continue
            # Outside of the hooks that distribute a module, as the hooks of FlexModel are.
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, kwargs, path=path: _note(found, (path, "input"), _first_given(args, kwargs)),
                    prepend=True,
                    with_kwargs=True,
                )
            )
            handles.append(
                module.register_forward_hook(
                    lambda _, args, output, path=path: _note(found, (path, "output"), _first_returned(output))
                )
            )
        run_example(model, (), lambda point, tensor: None, example)
    finally:
        for handle in handles:
            handle.remove()
    return found


def compare(whole: tuple[int, ...], told: Sequence[Mapping[Place, Held]], place: Place) -> Sharding:
    """Return how ranks share an activation of shape *whole*, by what each has told of it."""
    if "experts" in place[0].split(".")[:-1]:  # a shape that fits would be chance, and FlexModel refuses it too
        return Sharding("unexplained", why="inside experts rows are not the tokens in order")
    absent = [rank for rank, held in enumerate(told) if place not in held]
    if absent:
        named = "no rank reads it" if len(absent) == len(told) else f"not read on rank {', '.join(map(str, absent))}"
        return Sharding("unexplained", why=named)
    held = [ranks[place] for ranks in told]
    shapes = [each.shape for each in held]
    try:
        dims = {explain(shape, whole, place[0], len(told)) for shape in shapes}
    except LayoutError:
        return Sharding("unexplained", why=f"{_listed(shapes)} of {whole}")
    if dims == {None}:
        return Sharding("replicated") if _alike(held) else Sharding("unexplained", why="ranks have different values")
    dim = next(iter(dims))
    if dim is None or len(dims) > 1 or sum(shape[dim] for shape in shapes) != whole[dim]:
        return Sharding("unexplained", why=f"{_listed(shapes)} of {whole}")
    return Sharding("sharded", dim, tuple(shape[dim] for shape in shapes))


def _alike(held: Sequence[Held]) -> bool:
    if len({each.sums for each in held}) == 1:
        return True  # infinite ones as well
    scale = max(each.sums[1] for each in held)
    spread = max(max(values) - min(values) for values in zip(*(each.sums for each in held), strict=True))
    return spread <= ALIKE * scale


def _listed(shapes: Sequence[tuple[int, ...]]) -> str:
    return " and ".join(dict.fromkeys(map(str, shapes)))


def _note(found: dict[Place, Held], place: Place, tensor: torch.Tensor | None) -> None:
    if tensor is None or place in found:
        return
    if type(tensor) is not torch.Tensor and hasattr(tensor, "to_local"):
        tensor = tensor.to_local()  # no sum over ranks is finished here: ranks might not all come to this hook
    values = tensor.detach()
    values = (torch.view_as_real(values) if values.is_complex() else values).reshape(-1).to(torch.float64)
    weights = torch.linspace(1, 2, values.numel(), dtype=torch.float64, device=values.device)
    sums = (float((values * weights).mean()), float(values.abs().mean())) if values.numel() else (0.0, 0.0)
    found[place] = Held(tuple(tensor.shape), sums)


def _probe(path: str, module: nn.Module, side: Side, dtypes: dict[Place, str]) -> ShapeProbe:
    def read(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> torch.Tensor | None:
        tensor = _first_given(args, kwargs) if side == "input" else _first_returned(output)
        if tensor is not None:
            dtypes.setdefault((path, side), str(tensor.dtype).removeprefix("torch."))
        return tensor

    return ShapeProbe((path, side), module, read)


def _first_given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    with suppress(HookError):
        return input_leaf(args, kwargs, 0, "")[0]
    return None


def _first_returned(output: Any) -> torch.Tensor | None:
    with suppress(HookError):
        return tensor_leaf(output, 0, "")[0]
    return None


def _inputs(model: nn.Module, example: Example | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if example is not None:
        made = example(*EXAMPLE_SHAPE)
        return ((), dict(made)) if isinstance(made, Mapping) else (made if isinstance(made, tuple) else (made,), {})
    if reads_images(model):
        return (), example_pixels(model, EXAMPLE_SHAPE[0], default_pixels(model), torch.device("meta"))
    ids = torch.empty(EXAMPLE_SHAPE, dtype=torch.int64, device="meta")
    two = getattr(text_config(model), "is_encoder_decoder", False)
    return (), {"input_ids": ids} | ({"decoder_input_ids": ids} if two else {})
