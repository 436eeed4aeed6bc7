"""Files of a store that may be read: regular ones, and inside of it; a stranger may have put links or pipes there."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from flexcache.errors import DamagedError
from flexcache.store.storage.backend import disk_path
from flexcache.store.storage.location import StoreLocation

MOST_JSON = 64 << 20
"""Bytes of the largest file of metadata or records that is read."""


def check_inside(root: StoreLocation, path: StoreLocation, most: int | None = None) -> None:
    """Raise DamagedError if a file is outside its store, is not a regular file, or has more than *most* bytes.

    A missing file passes: the code that reads it raises its own error.
    """
    folder, file = disk_path(root), disk_path(path)
    if folder is None or file is None:  # an object is always a regular file inside its store
        return
    try:
        found = file.stat()
    except OSError:  # it is missing, which whoever reads it says
        return
    if not stat.S_ISREG(found.st_mode):
        raise _refused("is a folder, a pipe or a device, not a file", file)
    if most is not None and found.st_size > most:
        raise _refused(f"has {found.st_size} bytes, where at most {most} are read", file)
    _check_link(folder, file)


def check_tree_inside(root: StoreLocation, folder: StoreLocation) -> None:
    """Raise DamagedError if a folder has an entry that leads out of its store or is neither a folder nor a file."""
    top, below = disk_path(root), disk_path(folder)
    if top is None or below is None:
        return
    _check_link(top, below)
    for place, folders, names in os.walk(below):
        for path in (Path(place) / name for name in folders):
            if path.is_symlink():
                _check_link(top, path)
        for path in (Path(place) / name for name in names):
            if not stat.S_ISREG(path.lstat().st_mode):
                check_inside(top, path)


def _check_link(root: Path, path: Path) -> None:
    top = os.path.realpath(root)
    if os.path.commonpath([top, os.path.realpath(path)]) != top:
        raise _refused("is a link that leads out of it", path)


def _refused(what: str, path: Path) -> DamagedError:
    return DamagedError(
        f"a file of the store {what}",
        where=str(path),
        expected="a file inside the store",
        remedy="remove the link, or copy the file to its place, if you trust who made the store",
    )
