"""Where a store is: a folder, or a place on object storage; and the few things that differ between the two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flexcache.errors import StoreError
from flexcache.store.remote.path import RemotePath
from flexcache.store.remote.zarr_store import ObjectStore

Place = Path | RemotePath

COPY = "copy the store to a disk with flexcache copy, do it there, and copy the result back"


def place(path: str | Place) -> Place:
    """Return a path or URL as the place that it means: ``file://`` and paths without a kind are folders.

    Raises
    ------
    ConfigError
        Nothing that is installed can open this kind of URL.
    """
    if isinstance(path, Path | RemotePath):
        return path
    kind, found, rest = path.partition("://")
    if not found:
        return Path(path)
    return Path(rest) if kind in ("file", "local") else RemotePath(path)


def local(path: str | Place, what: str, remedy: str = COPY) -> Path:
    """Return a place that must be a folder, for *what* only file systems can do.

    Raises
    ------
    StoreError
        It is on object storage.
    """
    found = place(path)
    if isinstance(found, Path):
        return found
    raise StoreError(
        f"{what} works on stores in folders, not on object storage",
        where=str(found),
        remedy=remedy,
    )


def zarr_source(path: Place) -> Any:
    """Return a place as zarr-python takes it."""
    return path if isinstance(path, Path) else ObjectStore(path)
