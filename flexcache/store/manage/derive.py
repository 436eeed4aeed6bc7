"""Stores made from others: the plan, tables and coordinates of a store, with other arrays, and no activations yet."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
import zarr

from flexcache.errors import DamagedError, MismatchError
from flexcache.site import STANDARD
from flexcache.spec import ArraySpec
from flexcache.store.format.ledger import FileRecord
from flexcache.store.format.plan_record import read_plan_record, write_plan_record
from flexcache.store.format.schema import ATTRIBUTE, PLAN_RECORD, read_attributes
from flexcache.store.format.text import size
from flexcache.store.read.store import Store
from flexcache.store.storage.atomic_files import digest, relative_files
from flexcache.store.storage.location import Place
from flexcache.store.storage.object_path import RemotePath
from flexcache.store.storage.path_safety import check_inside
from flexcache.store.write.create import appear, check_place, check_room, create_arrays, planning, total_bytes
from flexcache.store.format.dataset_card import card
from flexcache.store.storage.disk_errors import clear_errors

POLL = 0.1
"""Seconds between two looks for the store that another process makes."""


@dataclass(frozen=True)
class Derived:
    """What a store made from others is to be.

    Attributes
    ----------
    origin : Store
        Whose plan, tables and coordinates it takes.
    arrays : list of ArraySpec
    spec : dict
        As a capture of these arrays would have been asked for, so that a capture can go on with the result.
    history : dict
        Added to provenance: what it was made from, and how.
    needed : int
        Bytes that its shards will take at most.
    """

    origin: Store
    arrays: list[ArraySpec]
    spec: dict[str, Any]
    history: dict[str, Any]
    needed: int

    def content(self) -> dict[str, Any]:
        """Return the attributes of the store."""
        given = read_attributes(self.origin.path)
        plan = dict(given["plan"])
        if "files" in plan:
            plan["files"] = self.origin.n_units * sum(len(array.slices) for array in self.arrays)
        if "bytes" in plan:
            plan["bytes"] = total_bytes(self.arrays, self.origin.n_rows, self.origin.shard_rows)
        history = [*given["provenance"].get("history", []), self.history]
        return {
            **given,
            "arrays": {array.name: array.to_json() for array in self.arrays},
            "plan": plan,
            "spec": self.spec,
            "provenance": {**given["provenance"], "history": history},
        }


def prepare(path: Place, derived: Derived) -> Store:
    """Make the store, without activations, at *path* in one step, or return the one there that was begun alike.

    Raises
    ------
    StoreError
        The place is taken by something that is not a store.
    MismatchError
        The store there is another one.
    PlanError
        The disk has no room.
    DamagedError
        A table or coordinate of the origin is not as it was written.
    CaptureError
        The disk refuses.
    """
    check_place(path)
    if (path / "zarr.json").exists():
        store = Store(path)
        check_begun_alike(store, derived)
        return store
    with clear_errors(path), planning(path) as (worker, claims):
        while not (path / "zarr.json").exists():
            worker.sweep()
            if claims.take(["plan"]) is None:
                time.sleep(POLL)
            elif not (path / "zarr.json").exists():
                check_room(path, derived.needed)
                make(path.name, worker.folder / "store", derived)
                appear(worker.folder / "store", path)
    store = Store(path)
    check_begun_alike(store, derived)
    return store


def check_begun_alike(store: Store, derived: Derived) -> None:
    """Refuse a store that was not begun from the same plan for the same arrays."""
    expected = derived.content()
    found = read_attributes(store.path)
    different = [
        f"{part}.{name}: {_short(found.get(part, {}).get(name))} there,"
        f" {_short(expected.get(part, {}).get(name))} asked for"
        for part in ("arrays", "plan", "spec")
        for name in sorted({*found.get(part, {}), *expected[part]})
        if found.get(part, {}).get(name) != expected[part].get(name)
    ]
    different += differing_tables(derived.origin, store)
    if different:
        raise MismatchError(
            "the target is a store already, and another one",
            where=str(store.path),
            found="\n    ".join(["", *different[:16], *(["…"] if len(different) > 16 else [])]),
            remedy="give the same command to go on with it, or another target",
        )


def plan_files(store: Store) -> dict[str, FileRecord]:
    """Return what ``ledger/plan.json`` says of every file of a store that is not a shard.

    Raises
    ------
    DamagedError
        It cannot be read.
    """
    try:
        return read_plan_record(store.path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(
            "the record of the plan cannot be read",
            where=str(store.path / PLAN_RECORD),
            found=f"{type(error).__name__}: {error}",
            remedy="run flexcache verify to see what else is damaged",
        ) from error


def shared_files(store: Store) -> dict[str, FileRecord]:
    """Return the tables and coordinates: what two stores over the same plan have in common."""
    own = {"zarr.json", "README.md", *(f"{name}/zarr.json" for name in store.arrays)}
    return {name: record for name, record in plan_files(store).items() if name not in own}


def differing_tables(one: Store, other: Store) -> list[str]:
    """Return which tables and coordinates of two stores differ, in words."""
    first, second = shared_files(one), shared_files(other)
    return [
        f"{name} differs ({_short(first.get(name))} and {_short(second.get(name))})"
        for name in sorted({*first, *second})
        if first.get(name) != second.get(name)
    ]


def ledger_digest(store: Store) -> str:
    """Return the XXH3-128 of a store's records, those of the plan and of all committed units: what is in it."""
    hasher = xxhash.xxh3_128((store.path / PLAN_RECORD).read_bytes())
    for unit in store.committed_units.tolist():
        hasher.update(store.ledger.path(unit).read_bytes())
    return hasher.hexdigest()


def describe_origin(store: Store) -> dict[str, Any]:
    """Return what provenance says of a store that another is made from."""
    return {
        "store": store.path.name,
        "ledger_xxh3_128": ledger_digest(store),
        "units_committed": len(store.committed_units),
    }


def narrow_spec(store: Store, arrays: Sequence[ArraySpec]) -> dict[str, Any]:
    """Return the spec of a store as if only *arrays* had been asked for."""
    kept = {array.name: array for array in arrays}
    before: dict[str, list[ArraySpec]] = {}
    for array in store.arrays.values():
        before.setdefault(array.site, []).append(array)
    sites: dict[str, Any] = {}
    for site, asked in store.spec.get("sites", {}).items():
        had = before.get(site, [])
        left = [array for array in had if array.name in kept]
        if had and [kept[array.name].layers for array in left] == [array.layers for array in had]:
            sites[site] = asked
        elif not had and site.removesuffix(".grad") not in STANDARD:
            sites[site] = asked  # not ours to judge
        else:
            for array in left:
                layers = kept[array.name].layers
                name = array.site if layers is not None or len(had) == 1 else _module(array.name)
                sites[name] = asked if layers is None else list(layers)
    transforms = {name: value for name, value in store.spec.get("transforms", {}).items() if name in kept}
    return {**store.spec, "sites": sites, **({"transforms": transforms} if "transforms" in store.spec else {})}


def facts(store: Store) -> list[tuple[str, str]]:
    """Return the plan in numbers for a store's card."""
    plan = store.plan
    return [
        ("documents", f"{plan.get('documents', 0):,}"),
        ("rows", f"{store.n_rows:,}"),
        ("units", f"{store.n_units:,} of {store.shard_rows:,} rows"),
    ]


def copy_verified(source: Place, target: Path, record: FileRecord) -> None:
    """Copy a file within the kernel, by reference where the file system can, and check the bytes of the copy.

    Raises
    ------
    DamagedError
        They are not those that the ledger names.
    OSError
        The disk refused.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        _clone(source, target)
    except FileNotFoundError as error:
        raise DamagedError(
            "a file of the store is missing", where=str(source), remedy="run flexcache verify to see what else is"
        ) from error
    if target.stat().st_size == record.size and digest(target) == record.xxh3_128:
        return
    at_fault = source if source.stat().st_size != record.size or digest(source) != record.xxh3_128 else target
    raise DamagedError(
        "a file has other bytes than were written",
        where=str(at_fault),
        expected=f"{record.size} bytes with XXH3-128 {record.xxh3_128}",
        found=f"{at_fault.stat().st_size} bytes with XXH3-128 {digest(at_fault)}",
        remedy="run flexcache verify on the source; a damaged unit can be recomputed by the capture"
        if at_fault == source
        else "the copy went wrong on its way: check the disk of the target, then run the same command again",
    )


def consolidate(store: zarr.storage.LocalStore) -> None:
    """Put the metadata of all arrays into that of the group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Consolidated metadata is currently not part")
        zarr.consolidate_metadata(store)


def make(name: str, store: Path, derived: Derived) -> None:
    """Write what `derived` says, without activations, into the folder *store*, which must not exist.

    Raises
    ------
    DamagedError
        A table or coordinate of the origin is not as it was written.
    """
    origin, content = derived.origin, derived.content()
    compression = str(derived.spec.get("compression", "none"))
    same_codec = compression == origin.spec.get("compression", "none")
    given = plan_files(origin)
    kept = dict(shared_files(origin))
    new = []
    for array in derived.arrays:
        if same_codec and origin.arrays.get(array.name) == array:
            kept[f"{array.name}/zarr.json"] = given[f"{array.name}/zarr.json"]
        else:
            new.append(array)
    for file in kept:
        check_inside(origin.path, origin.path / file)
    group = zarr.create_group(zarr.storage.LocalStore(store), zarr_format=3)
    attributes = json.loads((origin.path / "zarr.json").read_bytes())["attributes"]
    group.attrs.update({**attributes, ATTRIBUTE: content})
    create_arrays(group, new, origin.n_rows, origin.shard_rows, compression)
    coordinates = {name: record for name, record in kept.items() if not name.endswith(".parquet")}
    for name, record in coordinates.items():
        copy_verified(origin.path / name, store / name, record)
    consolidate(zarr.storage.LocalStore(store))  # before the tables: zarr warns of files that are not its own
    for name, record in kept.items():
        if name not in coordinates:
            copy_verified(origin.path / name, store / name, record)
    shards = ("bytes", size(content["plan"].get("bytes", 0)))
    (store / "README.md").write_text(card(name, derived.arrays, [*facts(origin), shards], content), encoding="utf-8")
    names = relative_files(store)
    (store / "ledger" / "0").mkdir(parents=True)
    write_plan_record(store, names)


def _clone(source: Place, target: Path) -> None:
    if isinstance(source, RemotePath):
        with target.open("wb") as write:
            write.writelines(source.blocks())
        return
    with source.open("rb") as read, target.open("wb") as write:
        left = os.fstat(read.fileno()).st_size
        try:
            while left:
                count = os.copy_file_range(read.fileno(), write.fileno(), left)
                if not count:
                    break
                left -= count
        except (OSError, AttributeError) as error:
            if isinstance(error, OSError) and error.errno in _FATAL:
                raise
            read.seek(0)
            write.seek(0)
            write.truncate()
            shutil.copyfileobj(read, write, 1 << 20)


_FATAL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
"""No other way of copying would help."""


def _module(array: str) -> str:
    plain = array.removesuffix(".grad")
    site = f"{plain.removesuffix('.input')}:input" if plain.endswith(".input") else plain
    return site + array[len(plain) :]


def _short(value: Any) -> str:
    if isinstance(value, FileRecord):
        return f"{value.size} bytes, {value.xxh3_128[:8]}"
    if isinstance(value, Mapping):
        value = json.dumps(value, ensure_ascii=False)
    text = "nothing" if value is None else str(value)
    return text if len(text) < 160 else text[:157] + "…"
