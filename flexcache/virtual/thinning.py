"""Make layers of a store virtual: prove that the model recomputes them to the bit, then delete their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flexcache.array_spec import ArraySpec, can_be_virtual, divide_layers, parse_keep
from flexcache.errors import MismatchError, SiteError
from flexcache.progress import ProgressCallback, ignore_progress
from flexcache.store.format.ledger import UnitRecord
from flexcache.store.format.shard import shard_name
from flexcache.store.manage.layer_change import LayerChange
from flexcache.store.read.batch_rows import hash_batches
from flexcache.store.read.selection import ArrayKey
from flexcache.store.read.store import Store
from flexcache.virtual.attachment import attach
from flexcache.virtual.unit_work import LayerMove, UnitWork, cache_groups
from flexcache.virtual.units import Unit, Units


class Thinning(LayerMove):
    """A planned move of layers from disk to virtual; `run` proves them with a model first.

    ::

        thinning = flexcache.Thinning("run.zarr", keep="every 6")
        print(thinning.bytes())
        thinning.run(model)

    Each unit is recomputed from the residual streams that stay, and each batch is compared with the stored rows; the
    digests of batches that are equal to the bit go into the ledger. Only when all units are proved, the metadata and
    the ledger records change, and then the files are deleted, as in `flexcache.Removal`. If it is interrupted, the same
    call goes on with the units that are not proved yet. Any number of processes may prove units of one store.

    Parameters
    ----------
    keep
        Layers that stay on disk, as in `flexcache.CaptureSpec`; those of sites that it does not name become virtual.

    Attributes
    ----------
    keys : list of (str, int)
        The arrays and layers that become virtual.

    Raises
    ------
    ConfigError
        The store cannot have virtual layers, or *keep* cannot be read. SiteError if nothing would become virtual.
    StoreError
        There is no store at *path*, it is incomplete, or another change of it was interrupted.
    """

    def __init__(self, path: str | Path, keep: Any) -> None:
        super().__init__(path, "thin", lambda store: self._plan(store, parse_keep(keep)))

    def bytes(self) -> int:
        """Return the bytes of the files that become needless."""
        return self._change.bytes()

    # Private

    def _plan(self, store: Store, keep: Mapping[str, Any]) -> LayerChange:
        store.spec.model_copy(update={"keep": dict(keep)}).check_keep()
        keys: list[ArrayKey] = []
        for array in _divided(store, keep).values():
            back = set(array.layers or ()) & set(store.arrays[array.name].virtual)
            if back:
                raise SiteError(
                    f"layers that keep names are virtual already: {', '.join(map(str, sorted(back)))} of {array.name}",
                    where=str(self.path),
                    remedy="write them to disk first: flexcache fill",
                )
            keys += [(array.name, layer) for layer in array.virtual if layer in (store.arrays[array.name].layers or ())]
        if not keys:
            raise SiteError("no layer would become virtual", where=str(self.path), found=f"keep: {dict(keep)}")
        return LayerChange(self.path, "thin", tuple(keys), keep)

    def _prepare(self, model: Any, progress: ProgressCallback, cache_bytes: int | str) -> None:
        view = self._view()
        with attach(view, model, cache_bytes=cache_bytes):
            self._prove(view, progress)

    def _view(self) -> Store:
        """Return the store as it is after the change, with the layers that become virtual."""
        view = Store(self.path)
        view.arrays = {array.name: array for array in self._change.left(view)}
        return view

    def _prove(self, view: Store, progress: ProgressCallback) -> None:
        """Recompute each unit, compare it with the stored rows, and add its digests to the ledger."""
        attached, stored = view.attached, Store(self.path)
        attached.use_units(_ProposedUnits(view, stored, self.keys))
        groups = cache_groups(attached, self.keys)

        def prove(unit: int) -> None:
            read = attached.unit(unit)
            try:
                for keys in groups:
                    attached.recompute_unit(unit, keys)
            except MismatchError as error:
                raise MismatchError(
                    "layers cannot become virtual, since the model does not recompute their rows to the bit",
                    where=error.where,
                    expected=error.expected,
                    found=error.found,
                    remedy="keep these layers on disk; flexcache verify tells if the store is damaged",
                ) from error
            if attached.notes:
                raise MismatchError(
                    "layers cannot become virtual, since only runs from the beginning are exact for this model",
                    where=str(self.path),
                    found=" ".join(attached.notes),
                    remedy="keep no residual stream, keep={}, if each read may run all blocks from the tokens",
                )
            stored.ledger.commit(read.record)

        UnitWork(stored, self._is_proved, prove).run(progress)

    def _is_proved(self, record: UnitRecord) -> bool:
        return all(shard_name(*key, record.unit) in record.virtual for key in self.keys)


class _ProposedUnits(Units):
    """Units whose records have the digests of layers that are still on disk."""

    def __init__(self, view: Store, stored: Store, keys: Sequence[ArrayKey]) -> None:
        super().__init__(view)
        self._stored, self._keys = stored, keys

    def _read(self, number: int) -> Unit:
        read = super()._read(number)
        digests = {shard_name(*key, number): hash_batches(self._stored, read.record, *key) for key in self._keys}
        return replace(read, record=replace(read.record, virtual={**read.record.virtual, **digests}))


def thin(path: str | Path, model: Any, keep: Any, *, progress: ProgressCallback = ignore_progress) -> Store:
    """Make layers of a complete store virtual, except those that *keep* names, and return the store.

    ::

        flexcache.thin("run.zarr", model, keep="every 6")

    Nothing is dropped that the model does not recompute to the bit; see `Thinning`, which says what will be dropped.

    Parameters
    ----------
    model
        The model of the capture; its name or folder; or a `flexcache.ModelSource`.
    keep
        Layers that stay on disk, as in `flexcache.CaptureSpec`: ``"every 6"`` is that of ``resid_post``.

    Raises
    ------
    MismatchError
        The model is not that of the capture, or does not recompute a layer to the bit. Nothing has changed then.
    ConfigError, SiteError, StoreError
        See `Thinning`.
    """
    return Thinning(path, keep).run(model, progress)


def _divided(store: Store, keep: Mapping[str, Any]) -> dict[str, ArraySpec]:
    """Return the arrays that can have virtual layers, divided as *keep* says."""
    found = {}
    for name, array in store.arrays.items():
        if array.layers is not None and name == array.site and can_be_virtual(array.site):
            whole = tuple(sorted({*array.layers, *array.virtual}))
            found[name] = divide_layers(replace(array, layers=whole, virtual=()), keep)
    return found
