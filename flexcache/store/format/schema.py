"""Names and versions of the disk format, which docs/format.md describes in full."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flexcache.array_spec import ArraySpec
from flexcache.errors import DamagedError, StoreError, VersionError
from flexcache.store.format.int8 import outlier_count
from flexcache.store.storage.backend import disk_path
from flexcache.store.storage.location import StoreLocation
from flexcache.store.storage.path_safety import MOST_JSON, check_inside

SCHEMA = 1
OUTLIER_SCHEMA = 2
"""Schema of stores whose int8 rows keep outliers apart."""
VIRTUAL_SCHEMA = NEWEST_SCHEMA = 3
"""Schema of stores with virtual layers; all other stores have schema 1 or 2."""
ATTRIBUTE = "flexcache"
DOCUMENTS = "documents.parquet"
SEQUENCES = "sequences.parquet"
BEGINS = "begins"
"""Column of the sequences: offsets at which attention and positions restart."""
CONTEXT = "context"
"""Column of the sequences: input tokens of the encoder, if rows are those of the decoder."""
COORDINATES = {"token_id": "int32", "position": "int32", "document": "int64"}
RESERVED = frozenset({"ledger", "runs", "layer", "token", *COORDINATES})
PLAN_RECORD = "ledger/plan.json"
NEXT_PLAN = "ledger/next.json"
"""The record of the plan that replaces the present one, while its files are renamed."""
STAGED = ".growing"
"""Folder inside a store of a staged extension, a store of its own until it is committed."""
GROWING = "growing"
"""Key of the plan of a store whose last documents are not planned yet."""
COMMITTING = "placing"
"""File in that folder: it marks an extension that is complete and is being committed."""


def schema_of(arrays: Iterable[ArraySpec]) -> int:
    """Return the schema of a store of these arrays."""
    named = {array.name: array for array in arrays}
    if any(array.virtual for array in named.values()):
        return VIRTUAL_SCHEMA
    return OUTLIER_SCHEMA if any(outlier_count(name, named) for name in named) else SCHEMA


def read_attributes(path: StoreLocation) -> dict[str, Any]:
    """Return the attributes of a store, from its ``zarr.json``.

    Raises
    ------
    StoreError
        There is no store of FlexCache. VersionError if a newer version wrote it, DamagedError if it cannot be read.
    """
    metadata = path / "zarr.json"
    if not metadata.is_file():
        raise StoreError(
            f"{path} is not a store",
            expected="a folder with zarr.json",
            found="no such folder" if not path.exists() else "a folder or file without zarr.json",
            remedy="check the path; flexcache capture makes a store",
        )
    check_inside(path, metadata, MOST_JSON)
    try:
        attributes = json.loads(metadata.read_bytes())["attributes"]
        content = attributes.get(ATTRIBUTE) if isinstance(attributes, dict) else None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(
            "the store's metadata cannot be read",
            where=str(metadata),
            found=f"{type(error).__name__}: {error}",
            remedy="restore zarr.json from a copy",
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("schema"), int):
        raise StoreError(
            f"{path} is a Zarr folder, but not a FlexCache store",
            expected=f"an attribute {ATTRIBUTE!r} with a schema version",
            remedy="open it with zarr or xarray",
        )
    if content["schema"] > NEWEST_SCHEMA:
        raise VersionError(
            f"{path} was written by a newer version of FlexCache",
            expected=f"schema {NEWEST_SCHEMA} or older",
            found=f"schema {content['schema']}",
            remedy="upgrade flexcache-activations",
        )
    return content


def is_planned(path: StoreLocation) -> bool:
    """Return True if there is a store at *path* whose plan has all of its documents."""
    return (path / "zarr.json").exists() and GROWING not in read_attributes(path).get("plan", {})


def staged_folder(path: StoreLocation) -> Path | None:
    """Return the folder of the extension that is staged in the store at *path*, None if there is none."""
    root = disk_path(path)  # a store on object storage is not extended in place
    folder = None if root is None else root / STAGED
    return folder if folder is not None and (folder / "zarr.json").is_file() else None


def committing_folder(path: StoreLocation) -> Path | None:
    """Return the folder of the extension that is being committed, None if there is none."""
    folder = staged_folder(path)
    return folder if folder is not None and (folder / COMMITTING).exists() else None
