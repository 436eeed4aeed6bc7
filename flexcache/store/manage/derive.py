"""Make a store from another: same plan, tables and coordinates, other arrays, no activations yet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zarr

from flexcache.errors import MismatchError
from flexcache.site import STANDARD
from flexcache.spec import ArraySpec, CaptureSpec
from flexcache.store.format.schema import ATTRIBUTE, read_attributes
from flexcache.store.format.text import join_lines, shorten, size
from flexcache.store.manage.dataset_card import card
from flexcache.store.manage.file_transfer import copy_verified
from flexcache.store.manage.store_contents import differing_tables, plan_files, shared_files
from flexcache.store.read.store import Store
from flexcache.store.storage.location import StoreLocation
from flexcache.store.storage.path_safety import check_inside
from flexcache.store.write.create import check_free_space, create_once, publish_store, total_bytes
from flexcache.store.write.skeleton import create_arrays, write_skeleton


@dataclass(frozen=True)
class DerivedStore:
    """Description of a store that is made from another one.

    Attributes
    ----------
    origin : Store
        The store whose plan, tables and coordinates are reused.
    arrays : list of ArraySpec
    spec : CaptureSpec
        The spec of a capture of these arrays, so that a capture can resume the result.
    history : dict
        Entry for the provenance: the origin, and the changes.
    needed : int
        Upper bound for the bytes of the shards.
    """

    origin: Store
    arrays: list[ArraySpec]
    spec: CaptureSpec
    history: dict[str, Any]
    needed: int

    def attributes(self) -> dict[str, Any]:
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
            "spec": given["spec"] | self.spec.to_json(),
            "provenance": {**given["provenance"], "history": history},
        }


def prepare_store(path: StoreLocation, derived: DerivedStore) -> Store:
    """Create a derived store without activations at *path*, or return the one that an equal call has begun there.

    Raises
    ------
    StoreError
        Something that is not a store exists at *path*.
    MismatchError
        Another store exists at *path*.
    PlanError
        The disk has too little free space.
    DamagedError
        A table or coordinate of the origin is damaged.
    CaptureError
        The disk refuses a write.
    """

    def make(folder: Path) -> None:
        check_free_space(path, derived.needed)
        write_derived(path.name, folder / "store", derived)
        publish_store(folder / "store", path)

    create_once(path, make)
    store = Store(path)
    _check_begun_alike(store, derived)
    return store


def _check_begun_alike(store: Store, derived: DerivedStore) -> None:
    """Raise MismatchError if a store was not begun from the same plan for the same arrays."""
    expected = derived.attributes()
    found = read_attributes(store.path)
    different = [
        f"{part}.{name}: {shorten(found.get(part, {}).get(name))} there,"
        f" {shorten(expected.get(part, {}).get(name))} asked for"
        for part in ("arrays", "plan", "spec")
        for name in sorted({*found.get(part, {}), *expected[part]})
        if found.get(part, {}).get(name) != expected[part].get(name)
    ]
    different += differing_tables(derived.origin, store)
    if different:
        raise MismatchError(
            "the target is another store",
            where=str(store.path),
            found=join_lines(different, 16),
            remedy="give the command that began it to resume it, or choose another target",
        )


def narrow_spec(store: Store, arrays: Sequence[ArraySpec]) -> CaptureSpec:
    """Return the spec of a store as if only *arrays* had been requested."""
    kept = {array.name: array for array in arrays}
    before: dict[str, list[ArraySpec]] = {}
    for array in store.arrays.values():
        before.setdefault(array.site, []).append(array)
    sites: dict[str, Any] = {}
    for site, asked in store.spec.sites.items():
        had = before.get(site, [])
        left = [array for array in had if array.name in kept]
        if had and [kept[array.name].layers for array in left] == [array.layers for array in had]:
            sites[site] = asked
        elif not had and site.removesuffix(".grad") not in STANDARD:
            sites[site] = asked  # a glob of module paths, say
        else:
            for array in left:
                layers = kept[array.name].layers
                name = array.site if layers is not None or len(had) == 1 else _module(array.name)
                sites[name] = asked if layers is None else list(layers)
    transforms = {name: value for name, value in store.spec.transforms.items() if name in kept}
    return store.spec.model_copy(update={"sites": sites, "transforms": transforms})


def plan_facts(store: Store) -> list[tuple[str, str]]:
    """Return the size of the plan as names and values for a dataset card."""
    plan = store.plan
    return [
        ("documents", f"{plan.get('documents', 0):,}"),
        ("rows", f"{store.n_rows:,}"),
        ("units", f"{store.n_units:,} of {store.shard_rows:,} rows"),
    ]


def write_derived(name: str, folder: Path, derived: DerivedStore) -> None:
    """Write a derived store without activations into *folder*, which must not exist.

    Raises
    ------
    DamagedError
        A table or coordinate of the origin is damaged.
    """
    origin, content = derived.origin, derived.attributes()
    compression = derived.spec.compression
    same_codec = compression == origin.spec.compression
    given, kept = plan_files(origin), shared_files(origin)
    new = []
    for array in derived.arrays:
        if same_codec and origin.arrays.get(array.name) == array:
            kept[f"{array.name}/zarr.json"] = given[f"{array.name}/zarr.json"]
        else:
            new.append(array)
    for file in kept:
        check_inside(origin.path, origin.path / file)

    def copy_files(tables: bool) -> None:
        for file, record in kept.items():
            if file.endswith(".parquet") == tables:
                copy_verified(origin.path / file, folder / file, record)

    def add_arrays(group: zarr.Group) -> None:
        create_arrays(group, new, origin.n_rows, origin.shard_rows, compression)
        copy_files(tables=False)

    attributes = json.loads((origin.path / "zarr.json").read_bytes())["attributes"]
    facts = [*plan_facts(origin), ("bytes", size(content["plan"].get("bytes", 0)))]
    write_skeleton(
        folder,
        {**attributes, ATTRIBUTE: content},
        card(name, derived.arrays, facts, content),
        add_arrays,
        lambda added: copy_files(tables=True),
    )


def _module(array: str) -> str:
    plain = array.removesuffix(".grad")
    site = f"{plain.removesuffix('.input')}:input" if plain.endswith(".input") else plain
    return site + array[len(plain) :]
