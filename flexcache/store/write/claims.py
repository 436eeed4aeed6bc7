"""Claim units for a worker by creating exclusive files: no server, and no locks, which a file system may lack."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from flexcache.store.storage.backend import storage_of
from flexcache.store.write.worker import Worker, describe

CLAIMS = ".claims"
_NAME = re.compile(r"([a-z0-9]+)\.(\d+)")
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS)


class Claiming(ABC):
    """A worker's claims on the units of a store: the protocol, independent of where claims are stored.

    A claim on unit 7 is ``.claims/7.0``, which only one worker can create. Once the worker of a claim is gone, the
    worker that creates ``7.1``, again only one, has taken the unit over. Nothing is removed for a takeover, so two
    workers cannot take the same claim.

    A worker that was only suspended may continue after its unit was taken over. That is harmless: `holds` detects it,
    and if the worker commits at that very moment, it commits the same bytes.
    """

    refused: type[Exception] = OSError
    """Error that the storage raises if it refuses an operation."""

    def __init__(self, worker: Any) -> None:
        self.worker = worker
        self.folder = worker.root / CLAIMS
        self.storage = storage_of(self.folder)
        self._held: dict[str, int] = {}

    def take_claim(self, names: Iterable[str | int]) -> str | None:
        """Claim the first of *names* that is free or whose worker is gone, and return it; None if there is none.

        A unit may have been committed, and its claim released, after the caller has read the ledger: read it again once
        the claim is held. `refused` is raised if the storage refuses.
        """
        newest = self._newest()
        for name in map(str, names):
            generation = newest.get(name)
            if generation is not None and not self.worker.gone(self._path(name, generation)):
                continue
            number = 0 if generation is None else generation + 1
            if self._create(self._path(name, number)):
                self._held[name] = number
                return name
        return None

    def holds(self, name: str | int) -> bool:
        """Return True if this worker still holds a claim, so that no other has taken it over."""
        held = self._held.get(str(name))
        return held is not None and self._newest().get(str(name)) == held

    def release(self, name: str | int) -> None:
        """Release a claim, and the earlier claims that it took over."""
        number = self._held.pop(str(name), None)
        for generation in range(0 if number is None else number + 1):
            self._remove(self._path(str(name), generation))

    def close(self, finished: bool = False) -> None:
        """Release the claims of this worker; if all units are *finished*, remove stale claims of others as well.

        If a claim cannot be removed, others see that its worker has closed.
        """
        for name in list(self._held):
            with contextlib.suppress(self.refused):
                self.release(name)
        self._tidy(finished)

    def others(self) -> Iterator[dict[str, Any]]:
        """Yield the descriptions of the workers of other live claims; skips claims that are released meanwhile."""
        for name, generation in self._newest().items():
            path = self._path(name, generation)
            if self._held.get(name) != generation and not self.worker.gone(path) and (found := describe(path)):
                yield found

    def _newest(self) -> dict[str, int]:
        """Return the latest generation of each claim."""
        found: dict[str, int] = {}
        for name in self.storage.list_names():
            if match := _NAME.fullmatch(name):
                found[match[1]] = max(found.get(match[1], -1), int(match[2]))
        return found

    def _path(self, name: str, generation: int) -> Any:
        return self.folder / f"{name}.{generation}"

    @abstractmethod
    def _create(self, path: Any) -> bool:
        """Create a claim; return False if it exists already."""

    @abstractmethod
    def _remove(self, path: Any) -> None:
        """Remove a claim of this worker, or one that it took over."""

    @abstractmethod
    def _tidy(self, finished: bool) -> None:
        """Remove the folder of the claims if it is empty or all units are *finished*."""


class Claims(Claiming):
    """Claims in a folder: each is a hard link to `Worker.alive`, so that one heartbeat refreshes all of them."""

    worker: Worker
    folder: Path

    def _remove(self, path: Path) -> None:
        self.worker.touches.discard(path)
        path.unlink(missing_ok=True)

    def _tidy(self, finished: bool) -> None:
        if finished:
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def _create(self, path: Path) -> bool:
        try:
            self.folder.mkdir(exist_ok=True)
            os.link(self.worker.alive, path)
        except (FileExistsError, FileNotFoundError):  # taken, or the store is complete and the folder removed
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return self._write(path)
        return True

    def _write(self, path: Path) -> bool:
        """Create a claim as a separate file, for file systems without hard links."""
        created = self.storage.create_bytes(path.name, self.worker.alive.read_bytes())
        if created:
            self.worker.touches.add(path)
        return created
