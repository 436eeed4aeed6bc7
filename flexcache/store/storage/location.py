"""Where a store is: a folder, or a place on object storage; and the few things that differ between the two."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from typing_extensions import TypeIs

from flexcache.errors import StoreError
from flexcache.paths import FILE_URLS, local_path
from flexcache.store.storage.object_path import ObjectPath

StoreLocation = Path | ObjectPath

COPY = "copy the store to a disk with flexcache copy, do it there, and copy the result back"


def parse_location(path: Any) -> StoreLocation:
    """Return a path, URL or opened store as its place; folders are absolute, see `flexcache.paths.local_path`.

    Raises
    ------
    ConfigError
        It is no path, no file can have that name, or nothing that is installed can open this kind of URL.

    >>> parse_location("file:///data/run.zarr/")
    PosixPath('/data/run.zarr')
    """
    opened = getattr(path, "path", None)  # of a Store
    if isinstance(opened, Path | ObjectPath):
        return opened
    if isinstance(path, ObjectPath):
        return path
    if isinstance(path, str) and path.partition("://")[1] and path.partition("://")[0] not in FILE_URLS:
        return ObjectPath(path)
    return local_path(path)


def is_location(value: Any) -> TypeIs[str | bytes | os.PathLike[Any] | ObjectPath]:
    """Return True if *value* is a path or a URL, as text, bytes or an object."""
    return isinstance(value, str | bytes | os.PathLike | ObjectPath)


def beyond_links(path: StoreLocation) -> StoreLocation:
    """Return where a new store is made: the target, if the path is a link, to an empty folder or to nothing yet."""
    return path.resolve() if isinstance(path, Path) and path.is_symlink() else path


def local(path: Any, what: str, remedy: str = COPY) -> Path:
    """Return a place that must be a folder, for *what* only file systems can do.

    Raises
    ------
    StoreError
        It is on object storage.
    """
    found = parse_location(path)
    if isinstance(found, Path):
        return found
    raise StoreError(
        f"{what} works on stores in folders, not on object storage",
        where=str(found),
        remedy=remedy,
    )
