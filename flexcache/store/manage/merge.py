"""Merge stores over one plan that hold different sites or layers of one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from flexcache.array_spec import ArraySpec
from flexcache.errors import ConfigError, MismatchError
from flexcache.progress import ProgressCallback, ignore_progress
from flexcache.provenance import select_fingerprint
from flexcache.spec import CaptureSpec
from flexcache.store.format.model_comparison import differences
from flexcache.store.format.provenance import recorded_model
from flexcache.store.format.shard import shard_name
from flexcache.store.format.text import join_lines, shorten
from flexcache.store.manage.copy import check_separate
from flexcache.store.manage.derive import derived_content, keep_fields, merge_arrays, prepare_store
from flexcache.store.manage.extension_transaction import check_not_extending
from flexcache.store.manage.labels.tables import check_same_labels, copy_labels
from flexcache.store.manage.row_copy import RowCopy
from flexcache.store.manage.store_contents import describe_origin, differing_tables
from flexcache.store.read.batch_rows import hash_batches
from flexcache.store.read.selection import ArrayKey, captured_keys
from flexcache.store.read.store import Store
from flexcache.store.storage.location import StoreLocation, parse_location
from flexcache.store.write.create import total_bytes


def merge(
    sources: Sequence[str | StoreLocation], target: str | StoreLocation, progress: ProgressCallback = ignore_progress
) -> Store:
    """Merge stores that were captured from one model over the same plan; the same call resumes an interrupted merge.

    ::

        flexcache.merge(["layers-0-15.zarr", "layers-16-31.zarr"], "run.zarr")

    Layers of one site become one array. A site and layer that two stores have must be the same files. Files are checked
    and copied byte for byte, as by `copy`. A unit is copied once every source has it. The joined labels of all sources
    are copied. A layer that is virtual in one store and on disk in another one is on disk in the target; its rows must
    have the digests of the virtual layer.

    Returns
    -------
    The target. It is complete if all sources are.

    Raises
    ------
    ConfigError
        There are fewer than two sources.
    MismatchError
        The sources differ in plan, documents, model, codec or the form of an array, or have different bytes for one
        site and layer, or different joined labels; the error lists the differences. Or the target is another store.
    DamagedError
        A file of a source is damaged.
    """
    stores, path = [Store(source) for source in sources], parse_location(target)
    if len(stores) < 2:
        raise ConfigError("a merge needs two stores or more", found=f"{len(stores)}")
    for store in stores:
        check_separate(store.path, path)
        check_not_extending(store.path)
    for other in stores[1:]:
        _check_alike(stores[0], other)
    check_same_labels(stores)
    arrays: list[ArraySpec] = []
    first: dict[ArrayKey, Store] = {}  # the first store that has each layer, from which it is copied
    for store in stores:
        arrays, new = merge_arrays({array.name: array for array in arrays}, store.arrays.values())
        first |= dict.fromkeys(new, store)
    entry = {"merged_from": [describe_origin(store) for store in stores]}
    share = min(len(store.committed_units) for store in stores) / max(1, stores[0].n_units)
    needed = int(total_bytes(arrays, stores[0].n_rows, stores[0].shard_rows) * share)
    content = derived_content(stores[0], arrays, _spec(stores, arrays), entry)
    result = prepare_store(path, stores[0], arrays, content, needed)
    check_same_labels([*stores, result])
    RowCopy(result, {key: first[key] for key in captured_keys(arrays)}).run(progress)
    return copy_labels(stores, result)


_OF_ARRAYS = {"sites", "transforms", "objective", "dtype", "keep", "keep_dtype"}
"""Fields of a spec that may differ, since arrays are compared."""


def _check_alike(one: Store, other: Store) -> None:
    numbers = ("rows", "units", "shard_rows", "corpus_xxh3_128")
    pairs: list[tuple[str, Any, Any]] = [(f"plan.{name}", one.plan.get(name), other.plan.get(name)) for name in numbers]
    pairs.append(("tokenizer", one.provenance.tokenizer, other.provenance.tokenizer))
    specs = [store.spec.model_dump(mode="json") for store in (one, other)]
    asked = sorted({name for spec in specs for name in spec} - _OF_ARRAYS)
    pairs += [(f"spec.{name}", specs[0].get(name), specs[1].get(name)) for name in asked]
    both = [select_fingerprint(store.spec.objective) for store in (one, other)]
    if None not in both:
        pairs.append(("spec.objective", both[0], both[1]))
    first, second = one.spec.transforms, other.spec.transforms
    pairs += [(f"transform {name}", value, second[name]) for name, value in first.items() if name in second]
    different = [f"{name}: {shorten(a)} and {shorten(b)}" for name, a, b in pairs if a != b]
    different += [f"model.{line}" for line in differences(*(recorded_model(store) for store in (one, other)))]
    different += differing_tables(one, other)
    for name in set(one.arrays) & set(other.arrays):
        forms = [replace(store.arrays[name], layers=None, virtual=()) for store in (one, other)]
        if forms[0] != forms[1]:
            different.append(f"array {name}: {forms[0]} and {forms[1]}")
    if not different and any(array.virtual for store in (one, other) for array in store.arrays.values()):
        different += _differing_budgets(one, other)
    for name in set(one.arrays) & set(other.arrays) if not different else ():
        different += _differing_files(one, other, name)
    if different:
        raise MismatchError(
            "the stores cannot be merged",
            where=f"{one.path} and {other.path}",
            expected="one model over the same plan, and the same bytes for each site and layer that both have",
            found=join_lines(different),
            remedy="capture both from the same documents with the same options and unit size; flexcache rm removes"
            " a site or layer that only one of them should contribute",
        )


def _differing_files(one: Store, other: Store, name: str) -> list[str]:
    """Return the shards that differ, of layers and units that both stores have."""
    layers = [layer for layer in one.arrays[name].captured if layer in other.arrays[name].captured]
    found = []
    for unit in _common_units(one, other) if layers else []:
        first, second = (store.ledger.read_record(unit) for store in (one, other))
        for layer in layers:
            shard = shard_name(name, layer, unit)
            digests = [record.virtual.get(shard) for record in (first, second)]
            if digests == [None, None]:
                same = first.files.get(shard) == second.files.get(shard)
            elif None in digests:
                store, held = (one, digests[1]) if digests[0] is None else (other, digests[0])
                same = hash_batches(store, first, name, layer) == held
            else:
                same = digests[0] == digests[1]
            found += [] if same else [f"{shard} has other bytes"]
    return found


def _differing_budgets(one: Store, other: Store) -> list[str]:
    """Return the units that two stores ran in other batches, so that digests of virtual layers are of other rows."""
    found = []
    for unit in _common_units(one, other):
        first, second = (store.ledger.read_record(unit).batch_tokens for store in (one, other))
        if first != second:
            found.append(f"unit {unit}: batches of {first} and {second} tokens, and virtual layers are hashed by batch")
    return found


def _common_units(one: Store, other: Store) -> list[int]:
    return sorted(set(one.committed_units.tolist()) & set(other.committed_units.tolist()))


def _spec(stores: list[Store], arrays: list[ArraySpec]) -> CaptureSpec:
    """Return the spec of one capture of all arrays."""
    sites: dict[str, Any] = {}
    layers = {array.site: list(array.captured) for array in arrays if array.layers is not None}
    for store in stores:
        for site, asked in store.spec.sites.items():
            sites[site] = asked if sites.get(site, asked) == asked else layers.get(site, asked)
    objectives = [store.spec.objective for store in stores if store.spec.objective is not None]
    dtypes = {store.spec.dtype for store in stores}
    changes: dict[str, Any] = {
        "sites": sites,
        "transforms": {k: v for store in stores for k, v in store.spec.transforms.items()},
        "dtype": dtypes.pop() if len(dtypes) == 1 else "auto",
        "objective": max(objectives, key=len, default=None),  # a later version records more
    }
    if any(store.spec.keep_dtype == "compute" for store in stores):
        changes["keep_dtype"] = "compute"
    forms = {site: layers for store in stores for site, layers in (store.spec.keep or {}).items()}
    merged = stores[0].spec.model_copy(update=changes | ({"keep": forms} if forms else {}))
    return merged.model_copy(update=keep_fields(arrays, merged))
