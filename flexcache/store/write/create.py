"""Create a store: metadata, plan and coordinates, complete before the first forward and visible in one step."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import zarr

from flexcache.array_spec import ArraySpec
from flexcache.errors import ConfigError, PlanError, StoreError
from flexcache.paths import check_writable
from flexcache.plan import Plan
from flexcache.sequences import TokenizedCorpus
from flexcache.store.format.ledger import changed_plan_files, read_plan_record
from flexcache.store.format.schema import (
    ATTRIBUTE,
    COORDINATES,
    DOCUMENTS,
    GROWING,
    NEXT_PLAN,
    PLAN_RECORD,
    RESERVED,
    SEQUENCES,
    schema_of,
)
from flexcache.store.format.shard import ShardLayout
from flexcache.store.storage.atomic_files import commit_files, fsync_tree, write_durably
from flexcache.store.storage.backend import disk_path, storage_of
from flexcache.store.storage.disk_errors import clear_errors
from flexcache.store.storage.location import StoreLocation, beyond_links
from flexcache.store.write.election import elect, working
from flexcache.store.write.skeleton import coordinate_chunk, create_arrays, create_coordinate, write_skeleton
from flexcache.store.write.tables import write_tables

PLAN = "plan"
"""Name of the claim of the process that makes the plan of a store."""
NAME_BYTES = 255
"""Bytes of the longest file name on common file systems."""
OTHER_ENTRIES = (DOCUMENTS, SEQUENCES, "README.md", "ledger")
"""Entries of a new store in addition to its arrays and coordinates."""


def check_target(path: StoreLocation) -> None:
    """Raise StoreError if there is no store at *path* and none can be created.

    Something else is there, the name is too long, or the folder is not writable.
    """
    if (path / "zarr.json").exists():
        return
    folder = disk_path(path)
    taken = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    if folder is None:
        taken = taken and not _is_incomplete(path)
    if taken and not (path / "zarr.json").exists():  # another process may have created it meanwhile
        raise StoreError(
            f"{path} exists and is not a store",
            remedy="choose another path, or remove it if it is not needed",
        )
    if folder is None or taken:
        return
    path = folder.resolve()
    planned = _planning(path)
    if len(os.fsencode(planned.name)) > NAME_BYTES:
        raise StoreError(
            "the name of the store is too long",
            where=str(path),
            expected=f"at most {NAME_BYTES - len(planned.name) + len(path.name)} bytes",
            found=f"{len(os.fsencode(path.name))} bytes",
            remedy="choose a shorter name",
        )
    try:
        check_writable(path.parent)
    except ConfigError as error:
        raise StoreError(
            "no store can be created there",
            where=str(path),
            expected=error.expected,
            found=error.found,
            remedy="choose another path",
        ) from None


def _planning(path: StoreLocation) -> StoreLocation:
    """Return the folder next to *path* in which its store is prepared."""
    return path.with_name(f".{path.name}.planning")


def _is_incomplete(path: StoreLocation) -> bool:
    """Return True if the objects at *path* were uploaded by a process that ended before the store was visible."""
    names = storage_of(path).list_files()
    return all(name.split("/")[0] in {*COORDINATES, *OTHER_ENTRIES} or name.endswith("/zarr.json") for name in names)


def create_once(path: StoreLocation, make: Callable[[Path], None]) -> None:
    """Run *make* in one of the processes that ask for a store at *path*, see `elected_planner`."""
    with elected_planner(path, (path / "zarr.json").exists) as planner:
        if planner is not None:
            make(planner.folder)


class Planner(NamedTuple):
    """The process that makes the plan of a store.

    Attributes
    ----------
    folder : Path
        An empty folder for files in progress.
    holds : callable
        Returns True while no other process has taken over.
    """

    folder: Path
    holds: Callable[[], bool]


@contextmanager
def elected_planner(
    path: StoreLocation, done: Callable[[], bool], on_wait: Callable[[], None] = lambda: None
) -> Iterator[Planner | None]:
    """Yield a planner in one of the processes that ask for a store at *path*; None where the plan is *done*.

    The others wait, calling *on_wait* now and then, and one of them takes over if the process ends early. StoreError as
    from `check_target`, CaptureError if the disk refuses a write.
    """
    check_target(path)
    if done():
        yield None
        return
    with clear_errors(path.parent):
        path = beyond_links(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        root = _planning(path)
        try:
            with working(root) as (worker, claims):
                chosen = elect(worker, claims, PLAN, done, on_wait)
                yield Planner(worker.folder, lambda: not worker.lost and claims.holds(PLAN)) if chosen else None
        finally:
            if (folder := disk_path(root)) is not None:
                with contextlib.suppress(OSError):
                    folder.rmdir()


def total_bytes(arrays: Iterable[ArraySpec], n_rows: int, shard_rows: int) -> int:
    """Return the bytes of all shard files of a complete, uncompressed store."""
    total = 0
    for array in arrays:
        layout = ShardLayout(n_rows, shard_rows, array.row_bytes)
        whole, last = max(0, layout.n_shards - 1), layout.n_shards - 1
        total += len(array.slices) * (whole * layout.file_bytes(0) + layout.file_bytes(last))
    return total


def check_free_space(path: StoreLocation, needed: int) -> None:
    """Raise PlanError if fewer than *needed* bytes are free on the disk of *path*."""
    folder = disk_path(path)
    if folder is None:
        return
    place = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise PlanError(
            "the store does not fit on the disk",
            where=str(path),
            expected=f"{needed / 1e9:.1f} GB free",
            found=f"{free / 1e9:.1f} GB free",
            remedy="make room, choose another disk, fewer layers, rows: last or mean, or a max_length",
        )


def create(
    path: StoreLocation,
    folder: Path,
    plan: Plan,
    corpus: TokenizedCorpus,
    arrays: list[ArraySpec],
    summary: dict[str, Any],
    content: dict[str, Any],
    card: str,
) -> None:
    """Write a store without activations into *folder*, then publish it at *path*, or grow the plan of the store there.

    Parameters
    ----------
    summary
        Numbers of the plan: rows, units, shard_rows, tokens, …
    content
        Spec and provenance.
    card
        Text of README.md.
    """
    check_names(arrays)
    store = folder / "store"
    attributes = {
        "schema": schema_of(arrays),
        "arrays": {array.name: array.to_json() for array in arrays},
        "plan": {**summary, "corpus_xxh3_128": corpus.digest, **({} if plan.stop_unit is None else {GROWING: True})},
        **content,
    }

    def add_arrays(group: zarr.Group) -> dict[str, zarr.Array]:
        create_arrays(group, arrays, plan.n_rows, plan.shard_rows, content["spec"]["compression"])
        chunk = coordinate_chunk(plan.expected_rows or plan.n_rows)
        return {name: create_coordinate(group, name, plan.n_rows, chunk) for name in COORDINATES}

    write_skeleton(
        store, {ATTRIBUTE: attributes}, card, add_arrays, lambda added: write_tables(store, plan, corpus, added)
    )
    if (path / "zarr.json").exists():
        grow_plan(store, path)
    else:
        publish_store(store, path)


def grow_plan(store: Path, path: StoreLocation) -> None:
    """Replace the plan of the store at *path* by that of *store*, which begins with it and is longer.

    At every moment readers find the old plan or the new one, and each step can be repeated. On object storage, where
    nothing is renamed, a plan does not grow.
    """
    root = disk_path(path)
    assert root is not None
    fsync_tree(store)
    names = changed_plan_files(read_plan_record(root), read_plan_record(store))
    write_durably(root / NEXT_PLAN, (store / PLAN_RECORD).read_bytes())
    commit_files(root, [(store / name, name) for name in names])
    for name in ("zarr.json", PLAN_RECORD):
        write_durably(root / name, (store / name).read_bytes())
    storage_of(root).delete(NEXT_PLAN)
    shutil.rmtree(store)


def publish_store(store: Path, path: StoreLocation) -> None:
    """Make a store that was written to a folder visible at *path* in one step: a rename, or the upload of zarr.json."""
    storage_of(path).publish(store, (PLAN_RECORD, "zarr.json"))


def check_names(arrays: list[ArraySpec]) -> None:
    """Raise StoreError if two arrays have the same name, or one has a reserved name."""
    names = [array.name for array in arrays]
    taken = sorted({name for name in names if name in RESERVED or names.count(name) > 1})
    if taken:
        raise StoreError(
            f"two arrays of the store would be named {', '.join(taken)}", remedy="leave one of the sites out"
        )
