"""Remove sites and layers from a store, in steps that each leave a store that reads correctly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flexcache.array_spec import mean_blocks
from flexcache.errors import SiteError
from flexcache.progress import ProgressCallback, ignore_progress
from flexcache.site import Layers
from flexcache.store.manage.layer_change import LayerChange, unfinished_error
from flexcache.store.read.selection import ArrayKey, captured_keys, select
from flexcache.store.read.store import Store
from flexcache.store.storage.location import local


class Removal:
    """A planned removal of sites or layers from a store; `run` applies it.

    ::

        removal = flexcache.Removal("run.zarr", ["attn_weights"])
        print(removal.bytes())
        removal.run()

    The removal first writes a note of what is removed, then changes the metadata, then the ledger records, then deletes
    the files, and last the note. Once the metadata is changed, readers no longer see what is removed; all else reads as
    before. If a removal is interrupted, the next one finishes it, whatever it is asked to remove.

    Parameters
    ----------
    sites, layers
        Sites and layers to remove, see `flexcache.store.select`. Virtual layers lose their digests. Residual streams
        from which virtual layers are recomputed can be removed, since the token ids stay; `price` says what it costs.

    Attributes
    ----------
    gone : list of (str, int or None)
        The arrays and layers to remove.
    unfinished : bool
        True if an earlier removal was interrupted, so that this one only finishes it.

    Raises
    ------
    SiteError
        The store has no such site or layer, or would have no site left.
    StoreError
        There is no store at *path*, or another change of it was interrupted.
    """

    def __init__(self, path: str | Path, sites: Sequence[str] | None = None, layers: Layers = "all") -> None:
        self.path = local(path, "flexcache rm")
        store = Store(self.path)
        earlier = LayerChange.read_note(self.path)
        if earlier is not None and earlier.kind != "remove":
            raise unfinished_error(earlier)
        self.unfinished = earlier is not None
        chosen = () if self.unfinished else tuple(captured_keys(select(store, sites, layers, virtual=True)))
        self._change = earlier or LayerChange(self.path, "remove", chosen)
        self.gone: list[ArrayKey] = list(self._change.keys)
        if not self.unfinished and len(self.gone) == len(captured_keys(store.arrays.values())):
            raise SiteError(
                "the store would have no site left",
                where=str(self.path),
                found=", ".join(store.sites),
                remedy="delete the folder if nothing in it is needed",
            )

    def price(self) -> str:
        """Return what reading virtual layers will cost if residual streams are removed; an empty text if no more."""
        store = Store(self.path)
        left = self._change.left(store)
        remaining = set(captured_keys(left))
        before, after = (mean_blocks(arrays, remaining) for arrays in (store.arrays.values(), left))
        if after <= before:
            return ""
        return f"a virtual layer is then recomputed by {after:.1f} blocks on average, instead of {before:.1f}"

    def bytes(self) -> int:
        """Return the bytes of the files to remove."""
        return self._change.bytes()

    def run(self, progress: ProgressCallback = ignore_progress) -> int:
        """Apply the removal, and return the bytes freed.

        Raises
        ------
        StoreError
            Another process fills the store, or an extension is unfinished.
        CaptureError
            The disk refuses.
        """
        return self._change.run(progress)
