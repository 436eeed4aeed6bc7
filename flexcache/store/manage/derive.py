"""Make a store from another one, without activations yet: the same rows with other arrays, or more rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import zarr

from flexcache.array_spec import ArraySpec, keep_of
from flexcache.errors import MismatchError
from flexcache.site import STANDARD
from flexcache.spec import CaptureSpec
from flexcache.store.format.ledger import read_plan_record
from flexcache.store.format.schema import ATTRIBUTE, read_attributes, schema_of
from flexcache.store.format.text import join_lines, shorten, size
from flexcache.store.manage.dataset_card import card, plan_facts
from flexcache.store.manage.file_transfer import copy_verified
from flexcache.store.manage.store_contents import differing_tables, shared_files
from flexcache.store.read.selection import ArrayKey, captured_keys
from flexcache.store.read.store import Store
from flexcache.store.storage.location import StoreLocation
from flexcache.store.storage.path_safety import check_inside
from flexcache.store.write.create import check_free_space, check_names, create_once, publish_store, total_bytes
from flexcache.store.write.skeleton import create_arrays, write_skeleton

T = TypeVar("T")


def derived_content(origin: Store, arrays: list[ArraySpec], spec: CaptureSpec, entry: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes of a store of the rows of another one.

    *spec* is that of a capture of these arrays, so that a capture can resume the result; *entry*, the origin and the
    changes, is added to the history.
    """
    given = read_attributes(origin.path)
    plan = dict(given["plan"])
    if "files" in plan:
        plan["files"] = origin.n_units * sum(len(array.slices) for array in arrays)
    if "bytes" in plan:
        plan["bytes"] = total_bytes(arrays, origin.n_rows, origin.shard_rows)
    described = {array.name: array.to_json() for array in arrays}
    changed = {
        "schema": schema_of(arrays),
        "arrays": described,
        "plan": plan,
        "spec": changed_spec(given["spec"], spec),
    }
    return add_history({**given, **changed}, entry)


def changed_spec(given: Mapping[str, Any], spec: CaptureSpec) -> dict[str, Any]:
    """Return the spec in the attributes of a store with the fields of *spec*; `keep` only if that has it."""
    return {name: value for name, value in given.items() if name != "keep"} | spec.to_json()


def add_history(content: Mapping[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes of a store with an entry at the end of its history."""
    provenance = content["provenance"]
    return {**content, "provenance": {**provenance, "history": [*provenance.get("history", []), entry]}}


def prepare_store(
    path: StoreLocation, origin: Store, arrays: list[ArraySpec], content: dict[str, Any], needed: int
) -> Store:
    """Create a store without activations at *path*, or return the one that an equal call has begun there.

    *content* is the result of `derived_content`, and *needed* an upper bound for the bytes of the shards.

    Raises
    ------
    MismatchError
        Another store is at *path*; StoreError if it is no store.
    PlanError
        The disk has too little free space.
    DamagedError
        A table or coordinate of the origin is damaged.
    """

    def make(folder: Path) -> None:
        check_free_space(path, needed)
        write_derived(path.name, folder / "store", origin, arrays, content)
        publish_store(folder / "store", path)

    create_once(path, make)
    store = Store(path)
    found = read_attributes(path)
    different = [
        f"{part}.{name}: {shorten(found.get(part, {}).get(name))} there, {shorten(content[part].get(name))} asked for"
        for part in ("arrays", "plan", "spec")
        for name in sorted({*found.get(part, {}), *content[part]})
        if found.get(part, {}).get(name) != content[part].get(name)
    ]
    different += differing_tables(origin, store)
    if different:
        raise MismatchError(
            "the target is another store",
            where=str(path),
            found=join_lines(different, 16),
            remedy="give the command that began it to resume it, or choose another target",
        )
    return store


def write_derived(name: str, folder: Path, origin: Store, arrays: list[ArraySpec], content: dict[str, Any]) -> None:
    """Write a store of the rows of another one into *folder*; DamagedError if a table or coordinate is damaged."""
    compression = str(content["spec"].get("compression", "none"))
    given, kept, new = read_plan_record(origin.path), shared_files(origin), []
    for array in arrays:
        if compression == origin.spec.compression and origin.arrays.get(array.name) == array:
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

    write_changed(name, folder, origin, arrays, content, add_arrays, lambda _: copy_files(tables=True))


def write_changed(
    name: str,
    folder: Path,
    origin: Store,
    arrays: list[ArraySpec],
    content: dict[str, Any],
    add_arrays: Callable[[zarr.Group], T],
    add_tables: Callable[[T], None],
) -> None:
    """Write a store without activations into *folder*, with the attributes of another one that are not FlexCache's."""
    attributes = json.loads((origin.path / "zarr.json").read_bytes())["attributes"]
    facts = [*plan_facts(content["plan"]), ("bytes", size(content["plan"].get("bytes", 0)))]
    text = card(name, arrays, facts, content)
    write_skeleton(folder, {**attributes, ATTRIBUTE: content}, text, add_arrays, add_tables)


def merge_arrays(before: Mapping[str, ArraySpec], more: Iterable[ArraySpec]) -> tuple[list[ArraySpec], list[ArrayKey]]:
    """Return arrays with *more* of them or of their layers, and the keys of what was added.

    A layer that is on disk in one of them and virtual in another one is on disk.
    """
    found = dict(before)
    new: list[ArrayKey] = []
    for array in more:
        held = found.get(array.name)
        if held is None:
            found[array.name] = array
            new += captured_keys([array])
        elif array.layers is not None and held.layers is not None:
            layers = {*held.layers, *array.layers}
            virtual = {*held.virtual, *array.virtual} - layers
            found[array.name] = replace(held, layers=tuple(sorted(layers)), virtual=tuple(sorted(virtual)))
            added = sorted((layers - {*held.layers}) | (virtual - {*held.virtual}))
            new += [(array.name, layer) for layer in added]
    check_names(list(found.values()))
    return list(found.values()), new


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
        if had and [kept[array.name].captured for array in left] == [array.captured for array in had]:
            sites[site] = asked
        elif not had and site.removesuffix(".grad") not in STANDARD:
            sites[site] = asked  # a glob of module paths, say
        else:
            for array in left:
                stacked = kept[array.name].layers is not None
                name = array.site if stacked or len(had) == 1 else _module(array.name)
                sites[name] = list(kept[array.name].captured) if stacked else asked
    transforms = {name: value for name, value in store.spec.transforms.items() if name in kept}
    changes = {"sites": sites, "transforms": transforms, **keep_fields(arrays, store.spec)}
    return store.spec.model_copy(update=changes)


def keep_fields(arrays: Iterable[ArraySpec], spec: CaptureSpec) -> dict[str, Any]:
    """Return the field `keep` of a spec of these arrays; nothing if neither they nor *spec* have virtual layers."""
    keep = keep_of(arrays, spec.keep, spec.keep_dtype)
    return {} if keep is None and spec.keep is None else {"keep": keep}


def _module(array: str) -> str:
    plain = array.removesuffix(".grad")
    site = f"{plain.removesuffix('.input')}:input" if plain.endswith(".input") else plain
    return site + array[len(plain) :]
