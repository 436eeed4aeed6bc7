"""A process that fills a store on object storage, and its claims: objects that one process alone can create."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from flexcache.errors import UnreachableError
from flexcache.store.claims import CLAIM_NAME, CLAIMS
from flexcache.store.files import json_bytes
from flexcache.store.remote.path import RemotePath
from flexcache.store.remote.upload import abort_uploads
from flexcache.store.worker import ALIVE, BEATS, PARTIAL, PATIENCE, describe, ended, identity


class RemoteWorker:
    """This process at work on a store, as `flexcache.store.worker.Worker`, with an object that it keeps rewriting.

    Clocks are not compared: a worker is gone when its object is, or when that has not changed for *patience* seconds of
    the watcher's clock, or when its process on this machine has ended.

    Attributes
    ----------
    folder : Path
        Of this process alone, on its own disk, for files in progress; it is made when first asked for.
    alive : RemotePath
        The object, ``<root>/.partial/<id>/alive``.
    """

    def __init__(self, root: RemotePath, conditions: dict[str, Any] | None = None, patience: float = PATIENCE) -> None:
        self.root = root
        self.conditions = conditions or {}
        self.id = uuid.uuid4().hex
        self.alive = root / PARTIAL / self.id / ALIVE
        self._patience = patience
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._folder: Path | None = None
        self._beats = 0
        self._stopped = threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._beat, name="flexcache-heartbeat", daemon=True)
        self._thread.start()

    @property
    def folder(self) -> Path:
        """A folder on this machine."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="flexcache-"))
        return self._folder

    @property
    def lost(self) -> bool:
        """Whether others took this worker for gone."""
        return not self.alive.is_file()

    def close(self) -> None:
        """Stop, and remove the object and the folder."""
        self._stopped.set()
        self._thread.join()
        with contextlib.suppress(UnreachableError):  # others will see that it has ended
            self.alive.unlink(missing_ok=True)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def tells(self) -> bytes:
        """Return what a claim of this worker says of it."""
        return json_bytes({**identity(os.getpid()), "id": self.id, "conditions": self.conditions})

    def gone(self, path: RemotePath) -> bool:
        """Whether the worker has ended that wrote this claim or `alive` object; one that is missing tells nothing."""
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
        return now - since >= self._patience

    def sweep(self) -> None:
        """Remove the objects of workers that are gone."""
        for place in list((self.root / PARTIAL).iterdir()):
            alive = place / ALIVE
            if place.name != self.id and self.gone(alive):
                alive.unlink(missing_ok=True)

    def _write(self) -> None:
        told = {**identity(os.getpid()), "id": self.id, "conditions": self.conditions, "beat": self._beats}
        self.alive.write_bytes(json_bytes(told))
        self._beats += 1

    def _beat(self) -> None:
        while not self._stopped.wait(self._patience / BEATS):
            with contextlib.suppress(UnreachableError, FileNotFoundError):
                if not self.lost:
                    self._write()


class RemoteClaims:
    """A worker's claims on the units of a store, as `flexcache.store.claims.Claims`; a claim is an object.

    Where the storage cannot let one of many create an object, two workers may compute the same unit. They commit the
    same bytes, so that work is lost and nothing else.
    """

    def __init__(self, worker: RemoteWorker) -> None:
        self.worker = worker
        self.folder = worker.root / CLAIMS
        self._held: dict[str, int] = {}

    def take(self, names: Iterable[str | int]) -> str | None:
        """Claim the first of *names* that is free or whose worker is gone, and return it; None where none is."""
        newest = self._newest()
        for name in map(str, names):
            generation = newest.get(name)
            if generation is not None and not self.worker.gone(self._path(name, generation)):
                continue
            number = 0 if generation is None else generation + 1
            if self._path(name, number).create(self.worker.tells()):
                self._held[name] = number
                return name
        return None

    def holds(self, name: str | int) -> bool:
        """Whether a claim is this worker's still, and nobody has taken it over."""
        held = self._held.get(str(name))
        return held is not None and self._newest().get(str(name)) == held

    def release(self, name: str | int) -> None:
        """Give a claim up, with those that it took over."""
        number = self._held.pop(str(name), None)
        for generation in range(0 if number is None else number + 1):
            self._path(str(name), generation).unlink(missing_ok=True)

    def close(self, finished: bool = False) -> None:
        """Give all claims up; where nothing is left to claim, remove what killed processes have left."""
        for name in list(self._held):
            with contextlib.suppress(UnreachableError):
                self.release(name)
        if finished and not any(True for _ in self.others()):
            self.folder.remove_all()
            abort_uploads(self.worker.root)

    def others(self) -> Iterator[dict[str, Any]]:
        """Yield what the workers of other live claims say of themselves."""
        for name, generation in self._newest().items():
            path = self._path(name, generation)
            if self._held.get(name) != generation and not self.worker.gone(path) and (told := describe(path)):
                yield told

    def _newest(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for path in self.folder.iterdir():
            if match := CLAIM_NAME.fullmatch(path.name):
                found[match[1]] = max(found.get(match[1], -1), int(match[2]))
        return found

    def _path(self, name: str, generation: int) -> RemotePath:
        return self.folder / f"{name}.{generation}"
