"""Workers and claims on object storage: a heartbeat object, and objects that only one process can create."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import uuid
from pathlib import Path

from flexcache.errors import UnreachableError
from flexcache.store.storage.atomic_files import json_bytes
from flexcache.store.storage.multipart_upload import abort_uploads
from flexcache.store.storage.object_path import ObjectPath
from flexcache.store.write.claims import Claiming
from flexcache.store.write.worker import ALIVE, PARTIAL, Worker, ended


class ObjectWorker(Worker):
    """This process at work on a store: like `Worker`, with a heartbeat object that it keeps rewriting.

    Clocks are not compared: a worker is gone when its object is gone, when its object has not changed for
    *heartbeat_timeout* seconds of the watcher's clock, or when its process on this machine has ended.
    """

    _local: Path | None = None
    _beats = 0

    @property
    def folder(self) -> Path:
        """The private folder on the local disk, which is made when it is first used."""
        if self._local is None:
            self._local = Path(tempfile.mkdtemp(prefix="flexcache-"))
        return self._local

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
        if self._local is not None:
            shutil.rmtree(self._local, ignore_errors=True)

    def gone(self, path: ObjectPath) -> bool:  # type: ignore[override]
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
        return self._timed_out(name, beat)

    def sweep(self) -> None:
        """Remove the heartbeat objects of workers that are gone."""
        for place in list((self.root / PARTIAL).iterdir()):
            alive = place / ALIVE
            if place.name != self.id and self.gone(alive):
                alive.unlink(missing_ok=True)

    def _announce(self) -> None:
        self.alive.write_bytes(json_bytes({**self.describe(), "beat": self._beats}))
        self._beats += 1

    def _refresh(self) -> None:
        with contextlib.suppress(UnreachableError, FileNotFoundError):
            if not self.lost:
                self._announce()


class ObjectClaims(Claiming):
    """Claims of a store on object storage; each is an object.

    On a server that ignores ``If-None-Match``, two workers may compute the same unit. They commit the same bytes, so
    that only work is lost.
    """

    refused = UnreachableError
    worker: ObjectWorker
    folder: ObjectPath

    def _create(self, path: ObjectPath) -> bool:
        return self.storage.create_bytes(path.name, json_bytes(self.worker.describe()))

    def _remove(self, path: ObjectPath) -> None:
        path.unlink(missing_ok=True)

    def _tidy(self, finished: bool) -> None:
        if finished and not any(True for _ in self.others()):
            self.folder.remove_all()
            abort_uploads(self.worker.root)
