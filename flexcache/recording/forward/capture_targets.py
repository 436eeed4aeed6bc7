"""The hook points that a capture reads in every forward, and the arrays that they fill."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from flexcache import hooks
from flexcache.array_spec import DTYPES, RESIDUAL, ArraySpec, can_be_virtual, check_starts, divide_layers
from flexcache.errors import CaptureError, ConfigError, SiteError
from flexcache.hooks.locate.encoder_decoder import DECODER_INPUT_IDS
from flexcache.hooks.read.activation_hooks import batch_shape
from flexcache.hooks.read.measure import Example, ExampleReader, read_example
from flexcache.recording.forward.batch import Batch, unplanned_batch
from flexcache.recording.forward.objective import OBJECTIVE, NextTokenLoss, Objective, check_value, spread_by_token
from flexcache.recording.forward.transform import Transform
from flexcache.site import EXPERT_NEURONS, ONCE, Site
from flexcache.spec import CaptureSpec
from flexcache.store.format.int8 import with_scales


@dataclass(frozen=True)
class CaptureTargets:
    """Hook points, with the transforms and the objective that apply to them.

    Attributes
    ----------
    sources : mapping from str to tuple of HookPoint
        By the site as the user wrote it, or by the name of a transform.
    transforms : mapping from str to Transform
        By the name of the array that each fills.
    objective : Objective or None
        The scalar that is differentiated, if a hook point is a gradient.
    """

    sources: Mapping[str, tuple[hooks.HookPoint, ...]]
    transforms: Mapping[str, Transform]
    objective: Objective | None = None

    @property
    def points(self) -> tuple[hooks.HookPoint, ...]:
        """The hook points of all sources."""
        return tuple(point for points in self.sources.values() for point in points)


def find_targets(
    model: torch.nn.Module,
    spec: CaptureSpec,
    transforms: Sequence[Transform] = (),
    objective: Objective | None = None,
    remote_modules: Collection[str] = (),
) -> CaptureTargets:
    """Find the sites of a spec and of transforms in a model; *remote_modules* as for `find_hook_points`.

    SiteError if a site matches no module, or two sites name the same array; ConfigError if two transforms have one
    name, or there is an objective but no gradient to store.
    """
    sources = {
        text: hooks.find_hook_points(model, Site.parse(text), layers, remote_modules)
        for text, layers in spec.sites.items()
    }
    made: dict[str, Transform] = {}
    for transform in transforms:
        if transform.name in sources:
            raise ConfigError(f"two arrays would be named {transform.name}", remedy="rename the transform")
        found = hooks.find_hook_points(model, transform.parsed_site, transform.layers, remote_modules)
        several = len(found) > 1 and found[0].layer is None
        sources[transform.name] = tuple(
            replace(point, array=f"{transform.name}.{point.module}" if several else transform.name) for point in found
        )
        made |= {point.array: transform for point in sources[transform.name]}
    gradients = any(point.gradient for points in sources.values() for point in points)
    if objective is not None and not gradients:
        raise ConfigError(
            "there is an objective, but no site whose gradient is to be stored",
            expected="a site that ends in .grad, such as resid_post.grad",
            found=", ".join(sources),
        )
    return CaptureTargets(sources, made, (objective or NextTokenLoss()) if gradients else None)


def measure_arrays(
    model: torch.nn.Module,
    spec: CaptureSpec,
    targets: CaptureTargets,
    reader: ExampleReader = read_example,
    example: Example | None = None,
) -> list[ArraySpec]:
    """Return the arrays of a store: names, features and dtypes, measured by one small forward.

    SiteError as from `flexcache.hooks.read.measure`; ConfigError if *keep* cannot be used;
    CaptureError if an activation cannot be stored, or a transform or
    the objective fails.
    """

    def through(point: hooks.HookPoint, values: torch.Tensor, inputs: Any) -> torch.Tensor:
        transform = targets.transforms.get(point.array)
        if transform is None:
            return values
        if values.device.type == "meta":
            values = torch.zeros(values.shape, dtype=values.dtype)
        return transform(values, _example(model, inputs))

    plain = {point: replace(point, gradient=False) for point in targets.points}
    try:
        measured = hooks.measure(
            model, tuple(dict.fromkeys(plain.values())), example=example, through=through, reader=reader
        )
    except SiteError as error:
        if "example=" in (error.remedy or ""):  # an argument of the hooks, which a capture has not
            error.remedy = "run the model's forward yourself, and store its activations with flexcache.record"
        raise
    arrays: list[ArraySpec] = []
    computed: dict[str, str] = {}
    for text, points in targets.sources.items():
        kinds = {point: measured[plain[point]] for point in points}
        transform = targets.transforms.get(points[0].array)
        dim = EXPERT_NEURONS if points[0].side == "neurons" and not transform else _feature_dim(text, transform)
        if points[0].side == "choice" and not transform and spec.rows == "mean":
            raise ConfigError(
                "numbers of experts have no mean",
                where=text,
                expected="rows that are tokens: all, last, first, or rules",
                found="rows: mean",
                remedy="leave the site out, or store all tokens",
            )
        exact = "float32" if points[0].side == "choice" and not transform else "auto"  # numbers, whatever the spec says
        site = transform.site if transform else text
        if points[0].layer is not None:
            layers, depth = (
                tuple(point.layer for point in points if point.layer is not None),
                len(hooks.find_blocks(model)[1]),
            )
            if spec.keep_dtype == "compute" and text in RESIDUAL and text in (spec.keep or {}):
                exact = _dtype_of(kinds[points[0]])
            array = _array(points[0].array, site, layers, depth, kinds[points[0]], dim, spec, exact)
            arrays.append(divide_layers(array, spec.keep) if not transform and can_be_virtual(text) else array)
            computed[array.name] = _dtype_of(kinds[points[0]])
        else:
            arrays += [
                _array(point.array, site, None, None, kinds[point], dim or _own_dim(point), spec) for point in points
            ]
    check_starts(arrays, computed)
    if targets.objective is not None and _objective_by_token(model, targets.objective, reader, example):
        kind = hooks.Activation((1,), torch.float32)
        arrays.append(_array(OBJECTIVE, OBJECTIVE, None, None, kind, f"feature_{OBJECTIVE}", spec, "float32"))
    return with_scales(arrays)


def _objective_by_token(
    model: torch.nn.Module, objective: Objective, reader: ExampleReader, example: Example | None
) -> bool:
    inputs, _, output = reader(model, (), example)
    batch = _example(model, inputs)
    try:
        return spread_by_token(check_value(objective(output, batch), batch), batch) is not None
    except Exception:
        if next(iter(inputs.values())).device.type == "meta":  # there are no values, and only a plan is wanted
            return True
        raise


def _example(model: torch.nn.Module, inputs: Any) -> Batch:
    given = inputs.get(DECODER_INPUT_IDS, inputs.get("input_ids"))
    shape = batch_shape(model, (), inputs)
    ids = torch.full(shape, -1) if given is None else torch.ones(shape) if given.device.type == "meta" else given.cpu()
    tokens = [line.int().numpy() for line in ids]
    return unplanned_batch(tokens)


def _feature_dim(text: str, transform: Transform | None) -> str:
    if transform is not None:
        return transform.feature_dim
    site = Site.parse(text)
    return site.feature_dim if site.standard or site.name in ONCE else ""


def _dtype_of(activation: hooks.Activation) -> str:
    return str(activation.dtype).removeprefix("torch.")


def _own_dim(point: hooks.HookPoint) -> str:
    return f"feature_{point.array.removesuffix('.grad') if point.gradient else point.array}"


def _array(
    name: str,
    site: str,
    layers: tuple[int, ...] | None,
    depth: int | None,
    activation: hooks.Activation,
    feature_dim: str,
    spec: CaptureSpec,
    dtype: str = "auto",
) -> ArraySpec:
    if dtype == "auto":
        dtype = _dtype_of(activation) if spec.dtype == "auto" else spec.dtype
    features = math.prod(activation.shape)
    if dtype not in DTYPES or not features:
        raise CaptureError(
            f"activations of {name} cannot be stored as they are computed",
            expected=f"at least one value of {', '.join(DTYPES)}",
            found=f"shape {activation.shape} of {dtype}",
            remedy="set dtype to one of them, or leave the site out",
        )
    return ArraySpec(name, site, layers, depth, features, feature_dim, dtype)
