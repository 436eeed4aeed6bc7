"""Announce a process that fills a store to the others, by a heartbeat file that it keeps touching."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from flexcache.store.storage.atomic_files import json_bytes, temporaries
from flexcache.store.storage.object_path import ObjectPath

PARTIAL = ".partial"
ALIVE = "alive"
HEARTBEAT_TIMEOUT = 120.0
"""Seconds without a heartbeat after which a worker on any machine counts as gone."""
BEATS = 6
"""Heartbeats within the timeout."""
_NEW = ".new"


class Worker:
    """This process as a worker on a store: a folder of its own for files in progress, and a heartbeat.

    Clocks of different machines are never compared: a worker is gone when its folder is gone, or when its heartbeat
    file has not changed for *heartbeat_timeout* seconds of the observer's own clock. On the same machine, the end of a
    process, by any signal, is seen at once.

    Attributes
    ----------
    folder : Path
        ``<root>/.partial/<id>``; removed by `close`, or by any other worker once this one is gone.
    alive : Path
        The heartbeat file; claims are links to it.
    touches : set of Path
        Other files to touch: the claims on a file system without links.
    """

    def __init__(
        self, root: Any, conditions: dict[str, Any] | None = None, heartbeat_timeout: float = HEARTBEAT_TIMEOUT
    ) -> None:
        self.root = root
        self.conditions = conditions or {}
        self.id = uuid.uuid4().hex
        self.alive = root / PARTIAL / self.id / ALIVE
        self.touches: set[Path] = set()
        self._heartbeat_timeout = heartbeat_timeout
        self._seen: dict[Any, tuple[Any, float]] = {}
        self._stopped = threading.Event()
        self._announce()
        self._thread = threading.Thread(target=self._beat, name="flexcache-heartbeat", daemon=True)
        self._thread.start()

    @property
    def folder(self) -> Path:
        """The private folder of this worker for files in progress."""
        folder: Path = self.root / PARTIAL / self.id
        return folder

    def describe(self) -> dict[str, Any]:
        """Return what this worker tells others: its process, id and conditions."""
        return {**identity(os.getpid()), "id": self.id, "conditions": self.conditions}

    def close(self) -> None:
        """Stop, and remove the folder; the last worker also removes temporary files that others left behind."""
        self._stopped.set()
        self._thread.join()
        left = temporaries(self.root)
        for _ in range(2):  # a second time, in case the disk refused
            shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()  # only the last worker can: nobody writes the files found above
            for path in left:
                path.unlink(missing_ok=True)

    @property
    def lost(self) -> bool:
        """True if others have removed the folder of this worker, for example after it was suspended."""
        return not self.alive.exists()

    def gone(self, path: Path) -> bool:
        """Return True if the worker that owns heartbeat file *path* has exited or timed out; False if missing."""
        try:
            handle = os.open(path, os.O_RDONLY)  # so that a network file system asks its server
            try:
                changed = os.fstat(handle).st_mtime_ns
                content = b"" if path.is_dir() else os.read(handle, 1 << 16)
            finally:
                os.close(handle)
        except OSError:
            self._seen.pop(path, None)
            return False
        return ended(content) or self._left(content) or self._timed_out(path, changed)

    def _timed_out(self, key: Any, sign: Any) -> bool:
        """Return True if a worker's sign of life has not changed for the timeout."""
        now = time.monotonic()
        before, since = self._seen.setdefault(key, (sign, now))
        if before != sign:
            self._seen[key] = sign, now
            return False
        return now - since >= self._heartbeat_timeout

    def _announce(self) -> None:
        """Create the folder with the heartbeat file in one step."""
        fresh = self.folder.with_suffix(_NEW)
        for left in reversed(range(10)):
            try:
                fresh.mkdir(parents=True)
                break
            except FileNotFoundError:  # another worker removed the folder above in between, as its last one
                if not left:
                    raise
        try:
            (fresh / ALIVE).write_bytes(json_bytes(self.describe()))
            fresh.rename(self.folder)
        except OSError:
            shutil.rmtree(fresh, ignore_errors=True)
            raise

    def _left(self, content: bytes) -> bool:
        """Return True if the folder of a worker is gone: it has closed, or others found it gone."""
        try:
            folder = self.root / PARTIAL / uuid.UUID(json.loads(content)["id"]).hex
            # check the initial name first: the folder may be renamed between the two checks
            return not folder.with_suffix(_NEW).exists() and not folder.exists()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return False

    def sweep(self) -> None:
        """Remove files in progress of workers that are gone."""
        for folder in (self.root / PARTIAL).glob("*"):
            if folder != self.folder and self.gone(folder / ALIVE if (folder / ALIVE).exists() else folder):
                shutil.rmtree(folder, ignore_errors=True)

    def _beat(self) -> None:
        while not self._stopped.wait(self._heartbeat_timeout / BEATS):
            self._refresh()

    def _refresh(self) -> None:
        for path in (self.alive, *list(self.touches)):
            with contextlib.suppress(OSError):
                os.utime(path)


def describe(path: Path | ObjectPath) -> dict[str, Any]:
    """Return the content of a heartbeat file: host, pid, conditions; empty if it cannot be read."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def identity(pid: int) -> dict[str, Any]:
    """Return a record that identifies a process uniquely: host, boot, pid and start time."""
    return {"host": socket.gethostname(), "machine": _machine(), "pid": pid, "started": _started(pid)}


def ended(content: bytes) -> bool:
    """Return True if the process of a heartbeat file ran on this machine and has ended; False if unknown."""
    try:
        found = json.loads(content)
        machine, pid, started = found["machine"], int(found["pid"]), found["started"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    return bool(machine) and machine == _machine() and started is not None and _started(pid) != started


def _machine() -> str | None:
    """Return an identifier of this boot and pid namespace of this machine, None if there is none."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """Return the start time of a process in ticks since boot; None if it does not exist or is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
