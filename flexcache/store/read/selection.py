"""Select arrays, layers, documents and rows of a store."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from flexcache.array_spec import ArraySpec
from flexcache.errors import ConfigError, SiteError, nearest
from flexcache.site import Layers, plain_layers, resolve_layers
from flexcache.store.format.int8 import scale_name
from flexcache.store.format.text import layer_text
from flexcache.store.read.open_store import OpenStore
from flexcache.store.storage.location import StoreLocation

ArrayKey = tuple[str, int | None]
"""Name of an array, and a layer of it; None for an array without layers."""


def select(
    store: OpenStore, sites: str | Sequence[str] | None = None, layers: Layers = "all", *, virtual: bool = False
) -> list[ArraySpec]:
    """Return the arrays of a store that match, each with its matching layers.

    ::

        flexcache.store.select(store, ["resid_*"], "8:24")

    Parameters
    ----------
    sites
        Names of arrays, or globs; None for all.
    layers
        As for `flexcache.capture`: ``"all"``, a number, a list, or ``"8:24"``. Each layer of a number or list must have
        been captured; a range selects its captured layers. Arrays without layers are always kept.
    virtual
        Select virtual layers, too, which `ArraySpec.virtual` names. By default, they are an error.

    Raises
    ------
    SiteError
        A site or layer is not in the store, nothing matches, or a layer is virtual.
    """
    asked = plain_layers(layers)
    found = [_narrow(store, array, asked) for array in _arrays(store, [sites] if isinstance(sites, str) else sites)]
    if not virtual:
        for array in found:
            if array.virtual:
                raise virtual_error(array, array.virtual, store.path)
    return found


def keys(arrays: Iterable[ArraySpec]) -> list[ArrayKey]:
    """Return one key for each layer of each array that is on disk."""
    return [(array.name, layer) for array in arrays for layer in array.slices]


def captured_keys(arrays: Iterable[ArraySpec]) -> list[ArrayKey]:
    """Return one key for each captured layer of each array, on disk or virtual."""
    return [(array.name, layer) for array in arrays for layer in array.captured]


def by_array(keys: Iterable[ArrayKey]) -> dict[str, list[int | None] | None]:
    """Return the layers of each array among some keys, None for an array without layers."""
    found: dict[str, list[int | None]] = {}
    for name, layer in keys:
        found.setdefault(name, []).append(layer)
    return {name: None if layers == [None] else layers for name, layers in found.items()}


def layer_number(array: ArraySpec, layer: int | None, where: StoreLocation) -> int | None:
    """Return a captured layer as a number from 0, None for an array without layers; SiteError if it is not there."""
    if array.layers is None or array.depth is None:
        if layer is not None:
            raise SiteError(f"site {array.name} has no layers", found=f"layer {layer}", remedy="leave layer out")
        return None
    if layer is None and len(array.captured) == 1:
        layer = array.captured[0]
    asked = None if layer is None else plain_layers(layer)
    if not isinstance(asked, int | None):
        raise SiteError(f"layer {layer!r} is not one layer", expected="a number", remedy="read layers one by one")
    number = None if asked is None else asked + (array.depth if asked < 0 else 0)
    if number in array.virtual:
        raise virtual_error(array, [number], where)
    if number not in array.layers:
        raise SiteError(
            f"{array.name} has layers, and none is given"
            if layer is None
            else f"layer {layer} of {array.name} was not captured",
            where=str(where),
            expected=f"one of {', '.join(map(str, array.captured))}",
        )
    return number


def row_numbers(rows: Any, n_rows: int, where: StoreLocation) -> np.ndarray:
    """Return rows, given by number or as a mask of shape (n_rows,), as numbers from 0.

    ConfigError if *rows* is text; IndexError if a number is out of range, or the shape or type is wrong.
    """
    numbers = np.atleast_1d(np.asarray(rows))
    if numbers.dtype.kind in "US":
        raise ConfigError(
            "rows of a store cannot be selected by a word",
            where=str(where),
            expected="row numbers, a slice, or a boolean mask of all rows",
            found=repr(rows),
            remedy="get the numbers from store.rows(document, position); of last tokens: store.rows(position=-1)",
        )
    if numbers.dtype == bool:
        if numbers.shape != (n_rows,):
            raise IndexError(f"a mask of rows has {n_rows} entries, not {numbers.shape}")
        return np.flatnonzero(numbers)
    if numbers.size == 0:
        return np.zeros(0, np.int64)
    if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer):
        raise IndexError(f"rows are a list of integers, not {numbers.dtype} of shape {numbers.shape}")
    numbers = numbers.astype(np.int64)
    if numbers.min() < -n_rows or numbers.max() >= n_rows:
        raise IndexError(f"row numbers are 0 to {n_rows - 1}; asked for {numbers.min()} … {numbers.max()}")
    return np.where(numbers < 0, numbers + n_rows, numbers)


def _arrays(store: OpenStore, sites: Sequence[str] | None) -> list[ArraySpec]:
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


def _narrow(store: OpenStore, array: ArraySpec, layers: Layers) -> ArraySpec:
    if array.layers is None or array.depth is None or layers == "all":
        return array
    asked = resolve_layers(layers, array.depth)
    kept, virtual = (tuple(layer for layer in held if layer in asked) for held in (array.layers, array.virtual))
    missing = [layer for layer in asked if layer not in array.captured]
    if not (kept or virtual) or (missing and not isinstance(layers, str)):
        raise SiteError(
            f"layer {', '.join(map(str, missing))} of {array.name} is not in the store",
            where=str(store.path),
            expected=f"one of {', '.join(map(str, array.captured))}",
        )
    return replace(array, layers=kept, virtual=virtual)


def virtual_error(array: ArraySpec, layers: Sequence[int], where: StoreLocation) -> SiteError:
    """Return the error for reading virtual *layers* of an array without a model that recomputes them."""
    several = "s" if len(layers) > 1 else ""
    return SiteError(
        f"layer{several} {layer_text(tuple(layers))} of {array.name} {'are' if several else 'is'} virtual: computed and"
        " hashed by the capture, and not on disk",
        where=str(where),
        expected=f"layers {layer_text(array.layers)}, which are on disk" if array.layers else "layers on disk",
        found="no model that recomputes virtual layers",
        remedy="attach the model: flexcache.attach(store, model); or write them to disk by flexcache fill",
    )
