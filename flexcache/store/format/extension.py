"""Traces of an extension on disk: it is staged in a folder inside the store, and then committed to the store."""

from __future__ import annotations

from pathlib import Path

from flexcache.store.storage.backend import disk_path
from flexcache.store.storage.location import StoreLocation

STAGED = ".growing"
"""Folder of a staged extension, a store of its own until it is committed."""
COMMITTING = "placing"
"""File in that folder: it marks an extension that is complete and is being committed."""


def staged_folder(path: StoreLocation) -> Path | None:
    """Return the folder of the extension that is staged in the store at *path*, None if there is none."""
    root = disk_path(path)
    if root is None:  # a store on object storage is not extended in place
        return None
    folder = root / STAGED
    return folder if (folder / "zarr.json").is_file() else None


def committing_folder(path: StoreLocation) -> Path | None:
    """Return the folder of the extension that is being committed, None if there is none."""
    folder = staged_folder(path)
    return folder if folder is not None and (folder / COMMITTING).exists() else None
