"""Copying a store: all of it or some arrays and layers, as it is or in another dtype or codec."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from flexcache.errors import ConfigError, StoreError
from flexcache.site import Layers
from flexcache.spec import DTYPES, ArraySpec, dtype_name
from flexcache.store.format.int8 import is_scale, with_scales
from flexcache.store.manage.derive import DerivedStore, narrow_spec, prepare_store
from flexcache.store.manage.extension_state import check_not_extending
from flexcache.store.manage.row_copy import Progress, RowCopy
from flexcache.store.manage.store_contents import describe_origin
from flexcache.store.read.selection import keys, select
from flexcache.store.read.store import Store
from flexcache.store.storage.location import StoreLocation, parse_location
from flexcache.store.write.create import total_bytes

CODECS = ("none", "zstd")


def copy(
    source: str | StoreLocation,
    target: str | StoreLocation,
    *,
    sites: Sequence[str] | None = None,
    layers: Layers = "all",
    dtype: Any = None,
    compression: str | None = None,
    progress: Progress = lambda done, total: None,
) -> Store:
    """Copy a store, complete or not, to another place; the same call goes on where one stopped.

    Every file is checked against the source's ledger on its way, and every unit is committed in the target by a record
    of its own. What is not converted is copied byte for byte, and the target's records of those files are the source's.

    Parameters
    ----------
    sites, layers
        What to take, see `flexcache.store.read.selection.select`; everything by default.
    dtype
        ``bfloat16``, ``float16``, ``float32`` or ``int8``; as it is by default. A narrower dtype rounds to nearest,
        ties to even; of int8, see `flexcache.store.format.int8`.
    compression
        ``none`` or ``zstd``; as it is by default.
    progress
        Called with the bytes of rows that are there, and that there will be.

    Returns
    -------
    The target. It is complete where the source is.

    Raises
    ------
    ConfigError
        There is no such dtype or compression.
    SiteError
        The source has no such site or layer.
    RangeError
        A value overflows the dtype, named with site, layer, row and value.
    StoreError
        The source is no store; or source and target are one inside the other.
    MismatchError
        The target is another store.
    DamagedError
        A file of the source is not as it was written.
    PlanError
        The disk has no room for the target.
    """
    dtype = dtype_name(dtype)
    _check_choice("dtype", dtype, tuple(DTYPES))
    _check_choice("compression", compression, CODECS)
    origin, path = Store(source), parse_location(target)
    check_separate(origin.path, path)
    check_not_extending(origin.path)
    chosen = [array for array in select(origin, sites, layers) if not is_scale(array.name, origin.arrays)]
    arrays = [replace(array, dtype=dtype or array.dtype) for array in chosen]
    derived = DerivedStore(
        origin,
        with_scales(arrays),
        spec={
            **(narrow_spec(origin, chosen) if with_scales(chosen) != list(origin.arrays.values()) else origin.spec),
            **({"dtype": dtype} if any(a.dtype != b.dtype for a, b in zip(arrays, chosen, strict=True)) else {}),
            "compression": compression or origin.spec.get("compression", "none"),
        },
        history={"copied_from": describe_origin(origin), "changed": _changes(origin, arrays, compression)},
        needed=0,
    )
    derived = replace(derived, needed=_needed(derived))
    store = prepare_store(path, derived)
    RowCopy(store, dict.fromkeys(keys(derived.arrays), origin)).run(progress)
    return store


def check_separate(source: StoreLocation, target: StoreLocation) -> None:
    """Refuse a target that is the source, or inside of it, or around it."""
    one, other = (f"{path.resolve()}/" for path in (source, target))
    if one.startswith(other) or other.startswith(one):
        raise StoreError(
            "source and target are the same place, or one is inside the other",
            where=str(target),
            found=str(source),
            remedy="choose a target beside the source",
        )


def _check_choice(what: str, value: str | None, choices: tuple[str, ...]) -> None:
    if value is not None and value not in choices:
        raise ConfigError(f"there is no {what} {value!r}", expected=f"one of {', '.join(choices)}")


def _changes(origin: Store, arrays: list[ArraySpec], compression: str | None) -> dict[str, Any]:
    """Return what a copy changes, array by array; empty for one that changes nothing."""
    kept = {array.name: array for array in arrays}
    found: dict[str, Any] = {}
    if left_out := [name for name in origin.sites if name not in kept]:
        found["sites_left_out"] = left_out
    for name, array in kept.items():
        before = origin.arrays[name]
        if array.layers != before.layers:
            found.setdefault("layers", {})[name] = list(array.layers or ())
        if array.dtype != before.dtype:
            found.setdefault("dtype", {})[name] = [before.dtype, array.dtype]
    codec = origin.spec.get("compression", "none")
    if compression not in (None, codec):
        found["compression"] = [codec, compression]
    return found


def _needed(derived: DerivedStore) -> int:
    """Return the bytes a copy will take, by the ledger where files stay as they are."""
    origin = derived.origin
    same = derived.spec["compression"] == origin.spec.get("compression", "none")
    if (
        same
        and origin.compressed
        and all(array == replace(origin.arrays.get(array.name, array), layers=array.layers) for array in derived.arrays)
    ):
        wanted = {(array.name, str(layer)) for array in derived.arrays for layer in array.slices}
        total = 0
        for record in origin.ledger:
            for name, file in record.files.items():
                array, _, rest = name.partition("/c/")
                layer = rest.split("/")[0] if origin.arrays[array].layers is not None else "None"
                total += file.size if (array, layer) in wanted else 0
        return total
    share = len(origin.committed_units) / max(1, origin.n_units)
    return int(total_bytes(derived.arrays, origin.n_rows, origin.shard_rows) * share)
