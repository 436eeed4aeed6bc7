"""Creating a store: metadata, plan and coordinates, complete before the first forward and visible in one step."""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import zarr
from zarr.codecs import ZstdCodec

from flexcache.errors import ConfigError, PlanError, StoreError
from flexcache.paths import check_writable
from flexcache.plan import Plan
from flexcache.sequences import Spool
from flexcache.spec import DTYPES, ArraySpec
from flexcache.store.format.bfloat16 import BFloat16
from flexcache.store.format.plan_record import write_plan_record
from flexcache.store.format.schema import ATTRIBUTE, COORDINATES, DOCUMENTS, PLAN_RECORD, RESERVED, SCHEMA, SEQUENCES
from flexcache.store.format.shard import ShardLayout
from flexcache.store.storage.atomic_files import fsync_folder, fsync_tree, relative_files
from flexcache.store.storage.location import Place, beyond_links
from flexcache.store.storage.multipart_upload import PART_BYTES, begin_upload
from flexcache.store.storage.object_path import RemotePath
from flexcache.store.write.backends import AnyWorker, claims_of, start_work
from flexcache.store.write.claims import Claiming
from flexcache.store.write.tables import write_tables

COORDINATE_CHUNK = 1 << 20
NAME_BYTES = 255
"""Of the longest name of a file, on common file systems."""
BESIDE = (DOCUMENTS, SEQUENCES, "README.md", "ledger")
"""What there is beside arrays in a store that has just been made."""


def check_place(path: Place) -> None:
    """Raise StoreError if no store can be made at *path*, and none is there.

    Raises
    ------
    StoreError
        Something else is there, the name is too long, or nothing can be written there.
    """
    if (path / "zarr.json").exists():
        return
    taken = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    if isinstance(path, RemotePath):
        taken = taken and not _begun(path)
    if taken and not (path / "zarr.json").exists():  # which another process may have made meanwhile
        raise StoreError(
            f"{path} exists and is not a store",
            remedy="choose another path, or remove it if it is not needed",
        )
    if isinstance(path, RemotePath) or taken:
        return
    path = path.resolve()
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
            "a store cannot be made there",
            where=str(path),
            expected=error.expected,
            found=error.found,
            remedy="choose another path",
        ) from None


def _planning(path: Place) -> Place:
    """Return the folder beside a place in which its store is planned."""
    return path.with_name(f".{path.name}.planning")


def _begun(path: RemotePath) -> bool:
    """Whether what is there was sent by a process that ended before the store appeared."""
    return all(name.split("/")[0] in {*COORDINATES, *BESIDE} or name.endswith("/zarr.json") for name in path.sizes())


@contextmanager
def planning(path: Place) -> Iterator[tuple[AnyWorker, Claiming]]:
    """Give a place beside *path* where one process at a time can be the one that makes the store."""
    path = beyond_links(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    root = _planning(path)
    worker = start_work(root)
    claims = claims_of(worker)
    try:
        yield worker, claims
    finally:
        claims.close()
        worker.close()
        if isinstance(root, Path):
            with contextlib.suppress(OSError):
                root.rmdir()


def total_bytes(arrays: list[ArraySpec], n_rows: int, shard_rows: int) -> int:
    """Return the bytes of all shard files of a complete, uncompressed store."""
    total = 0
    for array in arrays:
        layout = ShardLayout(n_rows, shard_rows, array.row_bytes)
        whole, last = max(0, layout.n_shards - 1), layout.n_shards - 1
        total += len(array.slices) * (whole * layout.file_bytes(0) + layout.file_bytes(last))
    return total


def check_room(path: Place, needed: int) -> None:
    """Refuse a plan that the disk cannot hold.

    Raises
    ------
    PlanError
        Fewer bytes are free than the store needs.
    """
    if isinstance(path, RemotePath):
        return
    place = next(parent for parent in [path, *path.absolute().parents] if parent.exists())
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
    path: Place,
    folder: Path,
    plan: Plan,
    corpus: Spool,
    arrays: list[ArraySpec],
    summary: dict[str, Any],
    content: dict[str, Any],
    *,
    compression: str,
    card: str,
) -> None:
    """Write a store without activations into *folder*, and rename it to *path*.

    Parameters
    ----------
    summary
        The plan in numbers: rows, units, shard_rows, tokens, …
    content
        Spec and provenance.
    card
        The store's README.md.
    """
    store = folder / "store"
    store.mkdir()
    check_names(arrays)
    n_rows = plan.n_rows
    group = zarr.create_group(zarr.storage.LocalStore(store), zarr_format=3)
    for array in arrays:
        _create_array(group, array, n_rows, plan.shard_rows, compression)
    coordinates = {name: create_coordinate(group, name, n_rows) for name in COORDINATES}
    group.attrs.update(
        {
            ATTRIBUTE: {
                "schema": SCHEMA,
                "arrays": {array.name: array.to_json() for array in arrays},
                "plan": {**summary, "corpus_xxh3_128": corpus.digest},
                **content,
            }
        }
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Consolidated metadata is currently not part")
        zarr.consolidate_metadata(group.store)  # before the tables: zarr warns of files that are not its own
    write_tables(store, plan, corpus, coordinates)
    (store / "README.md").write_text(card, encoding="utf-8")
    files = relative_files(store)
    (store / "ledger" / "0").mkdir(parents=True)
    write_plan_record(store, files)
    appear(store, path)


def appear(store: Path, path: Place) -> None:
    """Put a store that has been made in a folder at its place, in one step: a rename, or the last object, zarr.json."""
    if isinstance(path, RemotePath):
        _send(store, path)
        return
    fsync_tree(store)
    path = path.resolve()
    try:
        store.rename(path)
    except OSError:
        if not (path / "zarr.json").exists():  # else another process, which took this one for gone, was faster
            raise
    fsync_folder(path.parent)


def _send(store: Path, path: RemotePath) -> None:
    if (path / "zarr.json").exists():  # another process, which took this one for gone, was faster
        return
    last = (PLAN_RECORD, "zarr.json")
    for name in [name for name in relative_files(store) if name not in last]:
        upload = begin_upload(path / name)
        with (store / name).open("rb") as file:
            for number, part in enumerate(iter(partial(file.read, PART_BYTES), b"")):
                upload.put(number, part)
        upload.complete()
    (path / PLAN_RECORD).write_bytes((store / PLAN_RECORD).read_bytes())
    (path / "zarr.json").create((store / "zarr.json").read_bytes())


def check_names(arrays: list[ArraySpec]) -> None:
    """Refuse arrays that cannot stand side by side in one store."""
    names = [array.name for array in arrays]
    taken = sorted({name for name in names if name in RESERVED or names.count(name) > 1})
    if taken:
        raise StoreError(
            f"two arrays of the store would be named {', '.join(taken)}", remedy="leave one of the sites out"
        )


def _create_array(group: zarr.Group, array: ArraySpec, n_rows: int, shard_rows: int, compression: str) -> None:
    layout = ShardLayout(n_rows, shard_rows, array.row_bytes)
    stacked = array.layers is not None
    lead = (1,) if stacked else ()
    depth = (array.depth or 0,) if stacked else ()
    group.create_array(
        array.name,
        shape=(*depth, n_rows, array.features),
        shards=(*lead, shard_rows, array.features),
        chunks=(*lead, layout.chunk_rows, array.features),
        dtype=BFloat16() if array.dtype == "bfloat16" else DTYPES[array.dtype],
        fill_value=0 if array.dtype == "int8" else float("nan"),
        compressors=ZstdCodec(level=1) if compression == "zstd" else None,
        filters=None,
        dimension_names=array.dims,
        attributes={
            "site": array.site,
            "coordinates": " ".join(COORDINATES),
            **({"layers": list(array.layers)} if array.layers is not None else {}),
        },
    )


def coordinate_chunk(n_rows: int) -> int:
    """Return the rows of a chunk of the coordinates."""
    return min(COORDINATE_CHUNK, 1 << max(0, n_rows - 1).bit_length())


def create_coordinate(group: zarr.Group, name: str, n_rows: int, chunk: int | None = None) -> zarr.Array:
    """Add a coordinate of the rows to a group, in chunks of that many rows."""
    chunk = chunk or coordinate_chunk(n_rows)
    return group.create_array(
        name,
        shape=(n_rows,),
        chunks=(chunk,),
        dtype=COORDINATES[name],
        compressors=ZstdCodec(level=1),
        dimension_names=("token",),
    )


def create_arrays(group: zarr.Group, arrays: list[ArraySpec], n_rows: int, shard_rows: int, compression: str) -> None:
    """Add the metadata of arrays, and no activations, to the group of a store that is being made."""
    for array in arrays:
        _create_array(group, array, n_rows, shard_rows, compression)
