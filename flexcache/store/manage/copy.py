"""Copy a store: all of it or some arrays and layers, unchanged or in another dtype or codec."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from flexcache.array_spec import DTYPES, ArraySpec
from flexcache.errors import ConfigError, StoreError
from flexcache.progress import ProgressCallback, ignore_progress
from flexcache.site import Layers
from flexcache.spec import dtype_name
from flexcache.store.format.int8 import is_scale, with_scales
from flexcache.store.format.shard import shard_folder
from flexcache.store.manage.derive import derived_content, narrow_spec, prepare_store
from flexcache.store.manage.extension_transaction import check_not_extending
from flexcache.store.manage.labels.tables import check_same_labels, copy_labels
from flexcache.store.manage.row_copy import RowCopy
from flexcache.store.manage.store_contents import describe_origin
from flexcache.store.read.selection import captured_keys, keys, select
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
    progress: ProgressCallback = ignore_progress,
) -> Store:
    """Copy a store, complete or not, to another location; the same call resumes an interrupted copy.

    ::

        flexcache.copy("run.zarr", "small.zarr", sites=["resid_post"], layers="8:16", dtype="int8")

    Every file is checked against the ledger of the source, and every unit is committed in the target by a record.
    Files that need no conversion are copied byte for byte and keep their records. Joined labels are copied too, and the
    digests of virtual layers.

    Parameters
    ----------
    sites, layers
        Sites and layers to copy, see `flexcache.store.select`; all by default.
    dtype
        ``bfloat16``, ``float16``, ``float32`` or ``int8``; unchanged by default. A narrower dtype rounds to nearest,
        ties to even; for int8 see `flexcache.store.format.int8`.
    compression
        ``none`` or ``zstd``; unchanged by default.
    progress
        Called with the bytes of rows copied so far, and in total.

    Returns
    -------
    The target. It is complete if the source is.

    Raises
    ------
    ConfigError
        There is no such dtype or compression, or virtual layers would be converted.
    SiteError
        The source has no such site or layer.
    RangeError
        A value overflows the dtype; the error names site, layer, row and value.
    StoreError
        The source is not a store, or one of source and target is inside the other.
    MismatchError
        The target is another store.
    DamagedError
        A file of the source is damaged.
    PlanError
        The disk has too little free space.
    """
    dtype = dtype_name(dtype)
    _check_choice("dtype", dtype, tuple(DTYPES))
    _check_choice("compression", compression, CODECS)
    origin, path = Store(source), parse_location(target)
    check_separate(origin.path, path)
    check_not_extending(origin.path)
    chosen = [array for array in select(origin, sites, layers, virtual=True) if not is_scale(array.name, origin.arrays)]
    arrays = [replace(array, dtype=dtype or array.dtype) for array in chosen]
    _check_convertible(origin, arrays, compression)
    stored = Store(path).arrays if (path / "zarr.json").exists() else origin.arrays
    every = with_scales(arrays, stored)
    changes: dict[str, Any] = {"compression": compression or origin.spec.compression}
    if any(a.dtype != b.dtype for a, b in zip(arrays, chosen, strict=True)):
        changes["dtype"] = dtype
    whole = with_scales(chosen, origin.arrays) == list(origin.arrays.values())
    spec = origin.spec if whole else narrow_spec(origin, chosen)
    spec = spec.model_copy(update=changes)
    entry = {"copied_from": describe_origin(origin), "changed": _changes(origin, arrays, compression)}
    needed = _needed(origin, every, spec.compression)
    store = prepare_store(path, origin, every, derived_content(origin, every, spec, entry), needed)
    check_same_labels([origin, store])
    RowCopy(store, dict.fromkeys(captured_keys(every), origin)).run(progress)
    return copy_labels([origin], store)


def check_separate(source: StoreLocation, target: StoreLocation) -> None:
    """Raise StoreError if source and target are the same, or one is inside the other."""
    one, other = (f"{path.resolve()}/" for path in (source, target))
    if one.startswith(other) or other.startswith(one):
        raise StoreError(
            "source and target are the same, or one is inside the other",
            where=str(target),
            found=str(source),
            remedy="choose a target outside the source",
        )


def _check_choice(what: str, value: str | None, choices: tuple[str, ...]) -> None:
    if value is not None and value not in choices:
        raise ConfigError(f"there is no {what} {value!r}", expected=f"one of {', '.join(choices)}")


def _check_convertible(origin: Store, arrays: list[ArraySpec], compression: str | None) -> None:
    """Raise ConfigError if virtual layers would be converted, whose rows are not there."""
    for array in arrays:
        before = origin.arrays[array.name]
        if array.virtual and (array.dtype != before.dtype or compression not in (None, origin.spec.compression)):
            raise ConfigError(
                f"virtual layers of {array.name} cannot be converted, since their rows are not on disk",
                where=str(origin.path),
                expected=f"{before.dtype} and compression {origin.spec.compression}, or layers on disk only",
                found=f"{array.dtype} and compression {compression or origin.spec.compression}",
                remedy="select the layers on disk, or write the others to disk first by flexcache fill",
            )


def _changes(origin: Store, arrays: list[ArraySpec], compression: str | None) -> dict[str, Any]:
    """Return the changes that a copy makes, by kind and array; empty for an exact copy."""
    kept = {array.name: array for array in arrays}
    found: dict[str, Any] = {}
    if left_out := [name for name in origin.sites if name not in kept]:
        found["sites_left_out"] = left_out
    for name, array in kept.items():
        before = origin.arrays[name]
        if array.captured != before.captured:
            found.setdefault("layers", {})[name] = list(array.captured)
        if array.dtype != before.dtype:
            found.setdefault("dtype", {})[name] = [before.dtype, array.dtype]
    codec = origin.spec.compression
    if compression not in (None, codec):
        found["compression"] = [codec, compression]
    return found


def _needed(origin: Store, arrays: list[ArraySpec], compression: str) -> int:
    """Return the bytes that a copy needs, from the ledger if compressed files are copied unchanged."""
    unchanged = all(array.dtype == origin.arrays.get(array.name, array).dtype for array in arrays)
    if origin.compressed and unchanged and compression == origin.spec.compression:
        folders = tuple(shard_folder(*key) for key in keys(arrays))
        files = (file for record in origin.ledger for file in record.files.items())
        return sum(file.size for name, file in files if name.startswith(folders))
    share = len(origin.committed_units) / max(1, origin.n_units)
    return int(total_bytes(arrays, origin.n_rows, origin.shard_rows) * share)
