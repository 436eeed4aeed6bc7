"""From sites to the arrays of a store: which taps, how wide, of which dtype."""

from __future__ import annotations

import math

import torch

from flexcache import hooks
from flexcache.errors import CaptureError
from flexcache.site import Site
from flexcache.spec import DTYPES, ArraySpec, Spec


def locate(model: torch.nn.Module, spec: Spec) -> dict[str, tuple[hooks.Tap, ...]]:
    """Return the taps of each site of a spec.

    Raises
    ------
    SiteError
        A site matches nothing, or two sites mean the same array.
    """
    return {text: hooks.locate(model, Site.parse(text), layers) for text, layers in spec.sites.items()}


def measure_arrays(model: torch.nn.Module, spec: Spec, located: dict[str, tuple[hooks.Tap, ...]]) -> list[ArraySpec]:
    """Return the arrays of a store for these taps: names, widths and dtypes, by one small forward."""
    measured = hooks.measure(model, all_taps(located))
    arrays: list[ArraySpec] = []
    for text, taps in located.items():
        if Site.parse(text).standard:
            layers, depth = tuple(tap.layer for tap in taps if tap.layer is not None), _depth(model)
            arrays.append(_array(taps[0], text, layers, depth, measured[taps[0]], spec))
        else:
            arrays += [_array(tap, text, None, None, measured[tap], spec) for tap in taps]
    return arrays


def all_taps(located: dict[str, tuple[hooks.Tap, ...]]) -> tuple[hooks.Tap, ...]:
    """Return the taps of all sites."""
    return tuple(tap for taps in located.values() for tap in taps)


def _array(
    tap: hooks.Tap,
    text: str,
    layers: tuple[int, ...] | None,
    depth: int | None,
    activation: hooks.Activation,
    spec: Spec,
) -> ArraySpec:
    dtype = str(activation.dtype).removeprefix("torch.") if spec.dtype == "auto" else spec.dtype
    features = math.prod(activation.shape)
    if dtype not in DTYPES or not features:
        raise CaptureError(
            f"activations of {tap.array} cannot be stored as they are computed",
            expected=f"at least one value of {', '.join(DTYPES)}",
            found=f"shape {activation.shape} of {dtype}",
            remedy="set dtype to one of them, or leave the site out",
        )
    site = Site.parse(text)
    feature_dim = site.feature_dim if site.standard else f"feature_{tap.array}"
    return ArraySpec(tap.array, text, layers, depth, features, feature_dim, dtype)


def _depth(model: torch.nn.Module) -> int:
    return len(hooks.find_blocks(model)[1])
