"""Workers and claims on object storage: a heartbeat object, and objects that only one process can create."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from flexcache.errors import UnreachableError
from flexcache.store.storage.atomic_files import json_bytes
from flexcache.store.storage.multipart_upload import abort_uploads
from flexcache.store.storage.object_path import ObjectPath
from flexcache.store.write.claims import Claiming
from flexcache.store.write.worker import ALIVE, BEATS, HEARTBEAT_TIMEOUT, PARTIAL, ended, identity


class ObjectWorker:
    """This process at work on a store: like `Worker`, with a heartbeat object that it keeps rewriting.

    Clocks are not compared: a worker is gone when its object is gone, when its object has not changed for
    *heartbeat_timeout* seconds of the watcher's clock, or when its process on this machine has ended.

    Attributes
    ----------
    folder : Path
        Private folder on the local disk for files in progress; it is created on first use.
    alive : ObjectPath
        The heartbeat object, ``<root>/.partial/<id>/alive``.
    """

    def __init__(
        self, root: ObjectPath, conditions: dict[str, Any] | None = None, heartbeat_timeout: float = HEARTBEAT_TIMEOUT
    ) -> None:
        self.root = root
        self.conditions = conditions or {}
        self.id = uuid.uuid4().hex
        self.alive = root / PARTIAL / self.id / ALIVE
        self._heartbeat_timeout = heartbeat_timeout
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._folder: Path | None = None
        self._beats = 0
        self._stopped = threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._beat, name="flexcache-heartbeat", daemon=True)
        self._thread.start()

    @property
    def folder(self) -> Path:
        """The private folder on the local disk."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="flexcache-"))
        return self._folder

    @property
    def lost(self) -> bool:
        """True if others considered this worker gone."""
        return not self.alive.is_file()

    def close(self) -> None:
        """Stop the heartbeat, and remove its object and the folder."""
        self._stopped.set()
        self._thread.join()
        with contextlib.suppress(UnreachableError):  # others will see that it has ended
            self.alive.unlink(missing_ok=True)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def tells(self) -> bytes:
        """Return the content of this worker's claims: its process, id and conditions."""
        return json_bytes({**identity(os.getpid()), "id": self.id, "conditions": self.conditions})

    def gone(self, path: ObjectPath) -> bool:
        """Return True if the worker that wrote this claim or heartbeat object is gone; False if it is missing."""
        try:
            content = path.read_bytes()
            if ended(content):
                return True
            told = json.loads(content)
            name = uuid.UUID(told["id"]).hex
            beat = (self.root / PARTIAL / name / ALIVE).read_bytes()
        except FileNotFoundError:  # the claim was given up just now; or the worker of it has closed
            return path.is_file()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            name, beat = path.url, content
        now = time.monotonic()
        before, since = self._seen.setdefault(name, (beat, now))
        if before != beat:
            self._seen[name] = beat, now
            return False
        return now - since >= self._heartbeat_timeout

    def sweep(self) -> None:
        """Remove the heartbeat objects of workers that are gone."""
        for place in list((self.root / PARTIAL).iterdir()):
            alive = place / ALIVE
            if place.name != self.id and self.gone(alive):
                alive.unlink(missing_ok=True)

    def _write(self) -> None:
        told = {**identity(os.getpid()), "id": self.id, "conditions": self.conditions, "beat": self._beats}
        self.alive.write_bytes(json_bytes(told))
        self._beats += 1

    def _beat(self) -> None:
        while not self._stopped.wait(self._heartbeat_timeout / BEATS):
            with contextlib.suppress(UnreachableError, FileNotFoundError):
                if not self.lost:
                    self._write()


class ObjectClaims(Claiming):
    """Claims of a store on object storage; each is an object.

    On a server that ignores ``If-None-Match``, two workers may compute the same unit. They commit the same bytes, so
    that only work is lost.
    """

    refused = UnreachableError
    worker: ObjectWorker
    folder: ObjectPath

    def _create(self, path: ObjectPath) -> bool:
        return self.storage.create_bytes(path.name, self.worker.tells())

    def _remove(self, path: ObjectPath) -> None:
        path.unlink(missing_ok=True)

    def _tidy(self, finished: bool) -> None:
        if finished and not any(True for _ in self.others()):
            self.folder.remove_all()
            abort_uploads(self.worker.root)
