"""Traces of an extension on disk: staged beside the rows of a store, and then committed to it."""

from __future__ import annotations

from pathlib import Path

from flexcache.store.storage.location import Place

GROWING = ".growing"
"""The folder of a staged extension, a store of its own until it is committed."""
PLACING = "placing"
"""The file in that folder that says that the extension is complete and is being committed."""


def staged_folder(path: Place) -> Path | None:
    """Return the folder of the extension that is staged in the store at *path*, None where there is none."""
    if not isinstance(path, Path):  # a store on object storage is not extended in place
        return None
    folder = path / GROWING
    return folder if (folder / "zarr.json").is_file() else None


def committing_folder(path: Place) -> Path | None:
    """Return the folder of the extension that is being committed, None where there is none."""
    folder = staged_folder(path)
    return folder if folder is not None and (folder / PLACING).exists() else None
