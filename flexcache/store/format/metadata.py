"""Parse the attributes of a store, which may come from an untrusted source, with checks of types and ranges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from flexcache.array_spec import DTYPES, ArraySpec
from flexcache.errors import ConfigError, DamagedError
from flexcache.plan import Largest
from flexcache.spec import CaptureSpec
from flexcache.store.format.int8 import default_outliers, scale_name, scales_of
from flexcache.store.format.provenance import Provenance

MOST_ROWS, MOST_UNITS, MOST_FEATURES, MOST_LAYERS = 2**48, 10**8, 2**24, 100_000


@dataclass(frozen=True)
class StoreMetadata:
    """The attributes of a store, with valid types and ranges, and consistent with each other."""

    arrays: dict[str, ArraySpec]
    spec: CaptureSpec
    plan: dict[str, Any]
    provenance: Provenance

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle plain values, which take fewer bytes."""
        return _rebuild, (self.arrays, self.spec.to_json(), self.plan, self.provenance.to_json())


def _rebuild(arrays: dict[str, ArraySpec], spec: Any, plan: dict[str, Any], provenance: Any) -> StoreMetadata:
    return StoreMetadata(arrays, CaptureSpec.from_store(spec), plan, Provenance.from_json(provenance))


def parse_metadata(content: Mapping[str, Any], where: str) -> StoreMetadata:
    """Return the attributes of a store; raise DamagedError if one is missing, not valid, or leads out of the store."""
    try:
        spec, plan, provenance = (dict(_mapping(content, name)) for name in ("spec", "plan", "provenance"))
        arrays = {str(name): _array(str(name), value) for name, value in _mapping(content, "arrays").items()}
        rows, shard_rows = _whole(plan, "rows", 1, MOST_ROWS), _whole(plan, "shard_rows", 1, MOST_ROWS)
        _agree(shard_rows & (shard_rows - 1) == 0, f"shard_rows is {shard_rows}, not a power of two")
        units = _whole(plan, "units", 1, MOST_UNITS)
        _agree(units == -(-rows // shard_rows), f"{rows} rows are not {units} units of {shard_rows}")
        for name in ("documents", "files", "bytes", "tokens"):
            _whole(plan, name, 0, 2**80)
        _agree(isinstance(spec.get("rows"), str), f"rows is {spec.get('rows')!r}")
        fields = {name: value for name, value in spec.items() if name in CaptureSpec.model_fields}
        known, made_by = CaptureSpec.from_store(fields), Provenance.from_json(provenance)
        for array in arrays.values():
            if array.dtype == "int8":
                forms = [scales_of(array, outliers) for outliers in (0, default_outliers(array.features))]
                _agree(arrays.get(scale_name(array.name)) in forms, f"int8 array {array.name} has no scales")
    except (ConfigError, KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
        raise DamagedError(
            "the store's metadata is not valid",
            where=where,
            found=f"{type(error).__name__}: {str(error)[:200]}",
            remedy="restore zarr.json from a copy",
        ) from error
    return StoreMetadata(arrays, known, plan, made_by)


def _array(name: str, data: Any) -> ArraySpec:
    keys = {"name", "site", "layers", "depth", "features", "feature_dim", "dtype"}
    _agree(
        isinstance(data, Mapping) and set(data) - {"virtual"} == keys,
        f"array {name!r} is not described by {sorted(keys)}",
    )
    inside = PurePosixPath(name).name == name and name not in ("", ".", "..") and "\x00" not in name
    _agree(inside and data["name"] == name, f"array {name!r} is outside the store")
    for key in ("site", "feature_dim", "dtype"):
        _agree(isinstance(data[key], str), f"{key} of {name} is {data[key]!r}")
    _agree(data["dtype"] in DTYPES, f"dtype of {name} is {data['dtype']!r}")
    _agree(data["feature_dim"] not in ("", "token", "layer"), f"feature_dim of {name} is {data['feature_dim']!r}")
    _whole(data, "features", 1, MOST_FEATURES)
    layers = data["layers"]
    if layers is None:
        _agree(data["depth"] is None and "virtual" not in data, f"{name} has a depth or virtual layers, and no layers")
        return ArraySpec.from_json(data)
    depth = _whole(data, "depth", 1, MOST_LAYERS)
    for held in (layers, data.get("virtual", [])):
        whole = isinstance(held, list) and all(type(layer) is int and 0 <= layer < depth for layer in held)
        _agree(whole and held == sorted(set(held)), f"layers of {name} are {str(held)[:80]}")
    _agree(not set(layers) & set(data.get("virtual", [])), f"layers of {name} are on disk and virtual")
    return ArraySpec.from_json(data)


def largest_batch(plan: Mapping[str, Any]) -> Largest | None:
    """Return the largest batch of a plan, None if the store was made by an earlier version, which did not record it."""
    found = plan.get("largest_batch")
    if not isinstance(found, list) or len(found) != 3 or any(type(value) is not int or value < 0 for value in found):
        return None
    return Largest(*found)


def _mapping(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    _agree(isinstance(content[name], Mapping), f"{name} is not a mapping")
    found: Mapping[str, Any] = content[name]
    return found


def _whole(content: Mapping[str, Any], name: str, least: int, most: int) -> int:
    found = content[name]
    _agree(type(found) is int and least <= found <= most, f"{name} is {str(found)[:40]}")
    return int(found)


def _agree(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)
