"""Resolve the layers of a question to captured layers."""

from __future__ import annotations

import warnings
from typing import Any, cast

from analysis.dataset.readable import Readable
from flexcache.errors import AnalysisError
from flexcache.site import Layers, plain_layers, resolve_layers
from flexcache.store.format.text import layer_text
from flexcache.store.read.selection import virtual_error


def choose_layers(store: Readable, site: str, layers: Layers) -> tuple[int | None, ...]:
    """Return the captured layers that *layers* names, in ascending order; (None,) for a site without layers.

    Raises
    ------
    AnalysisError
        A layer was not captured, or the site has none.
    SiteError
        A layer is virtual, and no model is attached to the store.

    Warns
    -----
    UserWarning
        *layers* is ``"all"``, and some layers are virtual: those on disk are returned.
    """
    captured, layers = tuple(store.layers(site)), plain_layers(layers)
    array = getattr(store, "arrays", {}).get(site)
    if array is not None and array.virtual:  # no model is attached: it would have none
        asked = array.virtual if layers == "all" else resolve_layers(layers, array.depth)
        if not captured or (layers != "all" and not set(captured).issuperset(asked)):
            raise virtual_error(array, [one for one in asked if one in array.virtual], cast("Any", store).path)
        if layers == "all":
            warnings.warn(
                f"layers {layer_text(array.virtual)} of {site} are virtual and are left out: attach the model,"
                " flexcache.attach(store, model), to use them, or name the layers on disk",
                stacklevel=3,
            )
    if not captured:
        if layers != "all":
            raise AnalysisError(f"{site} is a module and has no layers", remedy='leave layers out, or pass "all"')
        return (None,)
    if layers == "all":
        return captured
    asked = resolve_layers(layers, _depth(store, site, captured))
    missing = [layer for layer in asked if layer not in captured]
    found = tuple(layer for layer in asked if layer in captured)
    if not found or (missing and not (isinstance(layers, str) and ":" in layers)):
        raise AnalysisError(
            f"layer {', '.join(map(str, missing))} of {site} was not captured",
            expected=f"captured layers: {', '.join(map(str, captured))}",
            found=str(layers),
        )
    return found


def _depth(store: Readable, site: str, captured: tuple[int, ...]) -> int:
    array = getattr(store, "arrays", {}).get(site)
    return getattr(array, "depth", None) or max(captured) + 1
