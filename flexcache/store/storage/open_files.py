"""Keep files open and mapped, at most 256 of them in a process, whatever the number of stores and arrays."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Hashable
from itertools import count
from typing import Any

MOST_OPEN = 256
numbers = count()
"""Numbers of the readers of this process."""


class OpenFile:
    """A file that is open for reading from start to end; it is closed with its last reference."""

    def __init__(self, path: str) -> None:
        self.path, self._close = path, os.close
        self.handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._identity = _identity(os.fstat(self.handle))
        os.posix_fadvise(self.handle, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def is_current(self, path: str) -> bool:
        """Return True if the file is still the one at *path*, with the size it had."""
        try:
            return self.path == path and _identity(os.stat(path)) == self._identity
        except OSError:
            return False

    def __del__(self) -> None:
        if hasattr(self, "_identity"):
            self._close(self.handle)


class OpenFiles:
    """Keep the open files and maps of all readers: the least recently used are given up, and close when unused.

    >>> files = OpenFiles(most=1)
    >>> files.put(0, "first", "a map"), files.put(0, "second", "another")
    ('a map', 'another')
    >>> files.get(0, "first"), files.get(0, "second")
    (None, 'another')
    """

    def __init__(self, most: int = MOST_OPEN) -> None:
        self.most = most
        self._held: OrderedDict[tuple[int, Hashable], Any] = OrderedDict()
        self.renew_lock()

    def renew_lock(self) -> None:
        """Make a new lock: in a forked process, no thread is left that could release the old one."""
        self._lock = threading.RLock()

    def get(self, reader: int, key: Hashable) -> Any:
        """Return what a reader has open under *key*; None if nothing is."""
        with self._lock:
            found = self._held.get((reader, key))
            if found is not None:
                self._held.move_to_end((reader, key))
            return found

    def put(self, reader: int, key: Hashable, value: Any) -> Any:
        """Keep *value* for a reader, and return it."""
        with self._lock:
            self._held[reader, key] = value
            self._held.move_to_end((reader, key))
            while len(self._held) > self.most:
                self._held.popitem(last=False)
        return value

    def forget(self, reader: int) -> None:
        """Forget all that a reader has open."""
        with self._lock:
            for key in [key for key in self._held if key[0] == reader]:
                del self._held[key]


def _identity(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_dev, found.st_ino, found.st_size


open_files = OpenFiles()
os.register_at_fork(after_in_child=open_files.renew_lock)
