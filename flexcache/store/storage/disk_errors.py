"""Translate errors of the operating system or of object storage into errors that a user can act on."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from flexcache.errors import CaptureError, FlexCacheError
from flexcache.store.storage.backend import disk_path
from flexcache.store.storage.location import StoreLocation
from flexcache.store.storage.retry import unreachable


@contextmanager
def clear_errors(root: StoreLocation) -> Iterator[None]:
    """Re-raise an OSError as the error that a user can act on."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, root) from error


def disk_error(error: OSError, root: StoreLocation) -> FlexCacheError:
    """Return the error to show for an error of the operating system or of object storage."""
    folder = disk_path(root)
    if folder is None:
        return unreachable(str(root), error)
    folder = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    failure = CaptureError(
        "the disk is full" if full else "the disk refused a write",
        where=str(error.filename or folder),
        found=f"{error.strerror or error} ({shutil.disk_usage(folder).free / 1e9:.2f} GB free)",
        remedy=("make room" if full else "repair the disk")
        + ", then run the same command again: committed units are kept, and it continues after them",
    )
    failure.__cause__ = error
    return failure
