"""Which arrays and layers of a store a command means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from flexcache.errors import SiteError, nearest
from flexcache.site import Layers, plain_layers, resolve_layers
from flexcache.spec import ArraySpec
from flexcache.store.format.int8 import scale_name
from flexcache.store.read.store import Store

Key = tuple[str, int | None]
"""An array and a layer of it; None for an array that has no layers."""


def select(store: Store, sites: str | Sequence[str] | None = None, layers: Layers = "all") -> list[ArraySpec]:
    """Return arrays of a store, each with the layers that are meant.

    Parameters
    ----------
    sites
        Names of arrays, or globs; None for all.
    layers
        As `flexcache.capture` takes them: ``"all"``, a number, a list, or ``"8:24"``. A number or list must have been
        captured; of a range, what was captured is meant. Arrays without layers are not concerned.

    Raises
    ------
    SiteError
        A site or layer is not in the store, or nothing is left.
    """
    asked = plain_layers(layers)
    return [_narrow(store, array, asked) for array in _arrays(store, [sites] if isinstance(sites, str) else sites)]


def keys(arrays: Sequence[ArraySpec]) -> list[Key]:
    """Return every layer of every array."""
    return [(array.name, layer) for array in arrays for layer in array.slices]


def _arrays(store: Store, sites: Sequence[str] | None) -> list[ArraySpec]:
    if sites is None:
        return list(store.arrays.values())
    chosen: set[str] = set()
    for site in sites:
        found = [name for name in store.sites if fnmatchcase(name, site) or name == site]
        if not found:
            raise SiteError(f"the store has no site {site!r}", where=str(store.path), remedy=nearest(site, store.sites))
        chosen.update(found)
        chosen.update(scale_name(name) for name in found if store.arrays[name].dtype == "int8")
    if not chosen:
        raise SiteError("no site is given", where=str(store.path), expected=f"one of {', '.join(store.sites)}")
    return [array for array in store.arrays.values() if array.name in chosen]


def _narrow(store: Store, array: ArraySpec, layers: Layers) -> ArraySpec:
    if array.layers is None or array.depth is None or layers == "all":
        return array
    asked = resolve_layers(layers, array.depth)
    kept = tuple(layer for layer in array.layers if layer in asked)
    ranged = isinstance(layers, str) and ":" in layers
    missing = [layer for layer in asked if layer not in array.layers]
    if not kept or (missing and not ranged):
        raise SiteError(
            f"layer {', '.join(map(str, missing))} of {array.name} is not in the store",
            where=str(store.path),
            expected=f"one of {', '.join(map(str, array.layers))}",
        )
    return replace(array, layers=kept)
