"""A survey of the modules of a model that run: shapes of inputs and outputs, and standard sites."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flexcache.errors import HookError, SiteError
from flexcache.hooks.flexmodel.pytree import find_input_tensor, find_tensor
from flexcache.hooks.locate.blocks import find_blocks
from flexcache.hooks.locate.hook_point import HookPoint
from flexcache.hooks.locate.names import is_container, modules_by_path, text_config, unwrap_model
from flexcache.hooks.locate.site_search import find_hook_points
from flexcache.hooks.locate.vision import default_image_size, example_pixels, reads_images
from flexcache.hooks.read.measure import EXAMPLE_SHAPE, Example
from flexcache.parallel.meta_model import MetaModel, Shape, ShapeProbe
from flexcache.site import ONCE, STANDARD, Side, Site

TIMES = " × "
SIDES: tuple[Side, Side] = ("input", "output")

ModuleSide = tuple[str, Side]
"""The path of a module, and its input or output."""


@dataclass(frozen=True)
class SurveyedModule:
    """A module that runs.

    Attributes
    ----------
    path
        Dotted, without prefixes of wrappers; ``""`` is the model itself.
    kind
        Name of its class.
    input, output
        Sizes of its first input and output tensor in its first run, as whole activations; None without a tensor.
    dtype
        Dtype of the output, or else of the input, such as ``"float32"``; None if neither is a tensor.
    runs
        Number of runs in one forward.
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
        """Return the shape of a side in symbols, ``"batch × length × 64"``, or ``"–"`` if there is no tensor."""
        sizes = self.input if side == "input" else self.output
        if sizes is None:
            return "–"
        return TIMES.join(map(str, sizes)) or "a number"


def survey(model: nn.Module, *, example: Example | None = None) -> tuple[SurveyedModule, ...]:
    """Return every module of *model* that runs in a forward, in module order.

    A copy of the model runs on the meta device, which needs no weights: *model* may be a skeleton on that device, or
    sharded. Shapes are those of the whole activations.

    >>> [module.kind for module in survey(nn.Sequential(nn.Linear(4, 8)), example=lambda n, m: torch.zeros(n, m, 4))]
    ['Sequential', 'Linear']

    Parameters
    ----------
    example
        For models that read neither ``input_ids`` nor ``pixel_values``: a function of (sequences, tokens) that returns
        inputs.

    Raises
    ------
    SiteError
        The model does not run without weights on an example.
    """
    root = unwrap_model(model)
    named = {path: module for path, module in modules_by_path(model).items() if not is_container(module)}
    dtypes: dict[tuple[str, Side], str] = {}
    probes = [_probe(path, module, side, dtypes) for path, module in named.items() for side in SIDES]
    args, kwargs = _inputs(model, example)
    try:
        learned = MetaModel(root).learn_shapes(probes, args, kwargs)
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
        SurveyedModule(
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
    """Return the standard sites that *model* has, in all layers that have them; none without a stack of blocks."""
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


def _probe(path: str, module: nn.Module, side: Side, dtypes: dict[ModuleSide, str]) -> ShapeProbe:
    def read(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> torch.Tensor | None:
        tensor = first_input_tensor(args, kwargs) if side == "input" else first_output_tensor(output)
        if tensor is not None:
            dtypes.setdefault((path, side), str(tensor.dtype).removeprefix("torch."))
        return tensor

    return ShapeProbe((path, side), module, read)


def first_input_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Return the first tensor that a module is given, or None."""
    with suppress(HookError):
        return find_input_tensor(args, kwargs, 0, "")[0]
    return None


def first_output_tensor(output: Any) -> torch.Tensor | None:
    """Return the first tensor that a module returns, or None."""
    with suppress(HookError):
        return find_tensor(output, 0, "")[0]
    return None


def _inputs(model: nn.Module, example: Example | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if example is not None:
        made = example(*EXAMPLE_SHAPE)
        return ((), dict(made)) if isinstance(made, Mapping) else (made if isinstance(made, tuple) else (made,), {})
    if reads_images(model):
        return (), example_pixels(model, EXAMPLE_SHAPE[0], default_image_size(model), torch.device("meta"))
    ids = torch.empty(EXAMPLE_SHAPE, dtype=torch.int64, device="meta")
    two = getattr(text_config(model), "is_encoder_decoder", False)
    return (), {"input_ids": ids} | ({"decoder_input_ids": ids} if two else {})
