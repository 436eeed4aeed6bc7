"""What a capture reads of a model in every forward, and the arrays that this fills."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from flexcache import hooks
from flexcache.errors import CaptureError, ConfigError, SiteError
from flexcache.hooks.measure import Example, Reader, read_example
from flexcache.hooks.sides import TARGET
from flexcache.hooks.taps import batch_shape
from flexcache.recorder.batch import Batch
from flexcache.recorder.objective import OBJECTIVE, NextTokenLoss, Objective, by_token, checked
from flexcache.recorder.transform import Transform
from flexcache.site import ONCE, Site
from flexcache.spec import DTYPES, ArraySpec, Spec
from flexcache.store.format.int8 import with_scales


@dataclass(frozen=True)
class Reading:
    """Taps, and what is made of the tensors that they read.

    Attributes
    ----------
    sources : mapping from str to tuple of Tap
        By a site as the user wrote it, or by the name of a transform.
    transforms : mapping from str to Transform
        By the name of the array that each fills.
    objective : Objective or None
        What is differentiated, where a tap is a gradient.
    """

    sources: Mapping[str, tuple[hooks.Tap, ...]]
    transforms: Mapping[str, Transform]
    objective: Objective | None = None

    @property
    def taps(self) -> tuple[hooks.Tap, ...]:
        """The taps of all sources."""
        return tuple(tap for taps in self.sources.values() for tap in taps)


def locate(
    model: torch.nn.Module,
    spec: Spec,
    transforms: Sequence[Transform] = (),
    objective: Objective | None = None,
    elsewhere: Collection[str] = (),
) -> Reading:
    """Find the sites of a spec, and of transforms, in a model; *elsewhere* as for `flexcache.hooks.locate`.

    Raises
    ------
    SiteError
        A site matches nothing, or two sites mean the same array.
    ConfigError
        Two transforms of one name; an objective without a gradient to store.
    """
    sources = {text: hooks.locate(model, Site.parse(text), layers, elsewhere) for text, layers in spec.sites.items()}
    made: dict[str, Transform] = {}
    for transform in transforms:
        if transform.name in sources:
            raise ConfigError(f"two arrays would be named {transform.name}", remedy="rename the transform")
        found = hooks.locate(model, transform.place, transform.layers, elsewhere)
        several = len(found) > 1 and found[0].layer is None
        sources[transform.name] = tuple(
            replace(tap, array=f"{transform.name}.{tap.module}" if several else transform.name) for tap in found
        )
        made |= {tap.array: transform for tap in sources[transform.name]}
    gradients = any(tap.gradient for taps in sources.values() for tap in taps)
    if objective is not None and not gradients:
        raise ConfigError(
            "an objective is given, and no site whose gradient is to be stored",
            expected="a site that ends in .grad, such as resid_post.grad",
            found=", ".join(sources),
        )
    return Reading(sources, made, (objective or NextTokenLoss()) if gradients else None)


def measure_arrays(
    model: torch.nn.Module,
    spec: Spec,
    reading: Reading,
    reader: Reader = read_example,
    example: Example | None = None,
) -> list[ArraySpec]:
    """Return the arrays of a store: names, widths and dtypes, by one small forward.

    Raises
    ------
    SiteError
        See `flexcache.hooks.measure`.
    CaptureError
        What is read cannot be stored; a transform or the objective fails.
    """

    def through(tap: hooks.Tap, values: torch.Tensor, inputs: Any) -> torch.Tensor:
        transform = reading.transforms.get(tap.array)
        if transform is None:
            return values
        if values.device.type == "meta":
            values = torch.zeros(values.shape, dtype=values.dtype)
        return transform(values, _example(model, inputs))

    plain = {tap: replace(tap, gradient=False) for tap in reading.taps}
    try:
        measured = hooks.measure(
            model, tuple(dict.fromkeys(plain.values())), example=example, through=through, reader=reader
        )
    except SiteError as error:
        if "example=" in (error.remedy or ""):  # which hooks take, and a capture does not
            error.remedy = "run the model's forward yourself, and store the activations with flexcache.record"
        raise
    arrays: list[ArraySpec] = []
    for text, taps in reading.sources.items():
        kinds = {tap: measured[plain[tap]] for tap in taps}
        transform = reading.transforms.get(taps[0].array)
        dim = _feature_dim(text, transform)
        site = transform.site if transform else text
        if taps[0].layer is not None:
            layers, depth = tuple(tap.layer for tap in taps if tap.layer is not None), len(hooks.find_blocks(model)[1])
            arrays.append(_array(taps[0].array, site, layers, depth, kinds[taps[0]], dim, spec))
        else:
            arrays += [_array(tap.array, site, None, None, kinds[tap], dim or _own_dim(tap), spec) for tap in taps]
    if reading.objective is not None and _objective_by_token(model, reading.objective, reader, example):
        kind = hooks.Activation((1,), torch.float32)
        arrays.append(_array(OBJECTIVE, OBJECTIVE, None, None, kind, f"feature_{OBJECTIVE}", spec, "float32"))
    return with_scales(arrays)


def _objective_by_token(model: torch.nn.Module, objective: Objective, reader: Reader, example: Example | None) -> bool:
    inputs, _, output = reader(model, (), example)
    batch = _example(model, inputs)
    try:
        return by_token(checked(objective(output, batch), batch), batch) is not None
    except Exception:
        if next(iter(inputs.values())).device.type == "meta":  # no values to compute with: only the plan is asked for
            return True
        raise


def _example(model: torch.nn.Module, inputs: Any) -> Batch:
    given = inputs.get(TARGET, inputs.get("input_ids"))
    shape = batch_shape(model, (), inputs)
    ids = torch.full(shape, -1) if given is None else torch.ones(shape) if given.device.type == "meta" else given.cpu()
    tokens = tuple(line.int().numpy() for line in ids)
    documents = torch.arange(shape[0]).numpy()
    return Batch(0, 0, range(math.prod(shape)), documents, tokens, ((0, shape[1]),) * shape[0])


def _feature_dim(text: str, transform: Transform | None) -> str:
    if transform is not None:
        return transform.feature_dim
    site = Site.parse(text)
    return site.feature_dim if site.standard or site.name in ONCE else ""


def _own_dim(tap: hooks.Tap) -> str:
    return f"feature_{tap.array.removesuffix('.grad') if tap.gradient else tap.array}"


def _array(
    name: str,
    site: str,
    layers: tuple[int, ...] | None,
    depth: int | None,
    activation: hooks.Activation,
    feature_dim: str,
    spec: Spec,
    dtype: str = "auto",
) -> ArraySpec:
    if dtype == "auto":
        dtype = str(activation.dtype).removeprefix("torch.") if spec.dtype == "auto" else spec.dtype
    features = math.prod(activation.shape)
    if dtype not in DTYPES or not features:
        raise CaptureError(
            f"activations of {name} cannot be stored as they are computed",
            expected=f"at least one value of {', '.join(DTYPES)}",
            found=f"shape {activation.shape} of {dtype}",
            remedy="set dtype to one of them, or leave the site out",
        )
    return ArraySpec(name, site, layers, depth, features, feature_dim, dtype)
