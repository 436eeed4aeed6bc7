"""Parse the location of a store: a local path, or a URL of object storage."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from typing_extensions import TypeIs

from flexcache.errors import ConfigError, StoreError
from flexcache.paths import FILE_URLS, local_path
from flexcache.store.storage.object_path import ObjectPath

StoreLocation = Path | ObjectPath
COPY = "copy the store to a disk with flexcache copy, do it there, and copy the result back"


def parse_location(path: Any) -> StoreLocation:
    """Return the location of a path, URL or opened store; folders are absolute, see `flexcache.paths.local_path`.

    ConfigError if it is no path, no file or object can have that name, or this kind of URL cannot be opened.

    >>> parse_location("file:///data/run.zarr/")
    PosixPath('/data/run.zarr')
    """
    opened = getattr(path, "path", None)  # of a Store
    if isinstance(opened, Path | ObjectPath):
        return opened
    if isinstance(path, ObjectPath):
        return path
    if isinstance(path, str) and path.partition("://")[1] and path.partition("://")[0] not in FILE_URLS:
        return _parse_url(path)
    return local_path(path)


def _parse_url(url: str) -> ObjectPath:
    path = ObjectPath(url)
    if path.key and {"", ".", ".."}.intersection(path.key.split("/")):
        raise ConfigError(
            "no object can have that name", where=url, found="an empty part, . or ..", remedy="give the URL without it"
        )
    return path


def is_location(value: Any) -> TypeIs[str | bytes | os.PathLike[Any] | ObjectPath]:
    """Return True if *value* is a path or a URL, as text, bytes or an object."""
    return isinstance(value, str | bytes | os.PathLike | ObjectPath)


def beyond_links(path: StoreLocation) -> StoreLocation:
    """Return the location of a new store: the target, if the path is a link to an empty folder or to nothing yet."""
    return path.resolve() if isinstance(path, Path) and path.is_symlink() else path


def local(path: Any, what: str, remedy: str = COPY) -> Path:
    """Return the path of a store that must be in a folder, since *what* needs a file system; else StoreError."""
    found = parse_location(path)
    if isinstance(found, Path):
        return found
    raise StoreError(
        f"{what} works on stores in folders, not on object storage",
        where=str(found),
        remedy=remedy,
    )
