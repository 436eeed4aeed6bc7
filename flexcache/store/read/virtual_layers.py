"""The error for reading layers that are not on disk."""

from __future__ import annotations

from collections.abc import Sequence

from flexcache.errors import SiteError
from flexcache.spec import ArraySpec
from flexcache.store.format.text import layer_text
from flexcache.store.storage.location import StoreLocation


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
