"""Claims: which worker computes which unit, by exclusive files; no server, and no lock that a file system may lack."""

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

from flexcache.store.write.worker import Worker, describe

CLAIMS = ".claims"
_NAME = re.compile(r"([a-z0-9]+)\.(\d+)")
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS)


class Claiming(ABC):
    """A worker's claims on the units of a store, wherever they are kept: the rules, without the place.

    A claim on unit 7 is ``.claims/7.0``, which one worker alone can create. Once a claim's worker is gone, whoever
    creates ``7.1`` has taken the unit over, again one worker alone. Nothing is ever removed to take over, so no two can
    take the same claim.

    A worker that was only asleep may go on after its unit was taken over. That is harmless: `holds` tells it, and if it
    commits in that very moment, it commits the same bytes.
    """

    refused: type[Exception] = OSError
    """What the place raises where it refuses."""

    def __init__(self, worker: Any) -> None:
        self.worker = worker
        self.folder = worker.root / CLAIMS
        self._held: dict[str, int] = {}

    def take_claim(self, names: Iterable[str | int]) -> str | None:
        """Claim the first of *names* that is free or whose worker is gone, and return it; None where none is.

        A unit may have been committed, and its claim released, between the caller's look at the ledger and this call:
        look again once the claim is there.

        Raises
        ------
        OSError
            The file system refuses; UnreachableError of object storage.
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
        """Whether a claim is this worker's still, and nobody has taken it over."""
        held = self._held.get(str(name))
        return held is not None and self._newest().get(str(name)) == held

    def release(self, name: str | int) -> None:
        """Give a claim up, with those that it took over."""
        number = self._held.pop(str(name), None)
        for generation in range(0 if number is None else number + 1):
            self._remove(self._path(str(name), generation))

    def close(self, finished: bool = False) -> None:
        """Give all claims up; where nothing is left to claim, what others left as well.

        A claim that the place does not let go of is one of a worker that has closed, which others see.
        """
        for name in list(self._held):
            with contextlib.suppress(self.refused):
                self.release(name)
        self._tidy(finished)

    def others(self) -> Iterator[dict[str, Any]]:
        """Yield what the workers of other live claims say of themselves; a claim may be given up while one looks."""
        for name, generation in self._newest().items():
            path = self._path(name, generation)
            if self._held.get(name) != generation and not self.worker.gone(path) and (told := describe(path)):
                yield told

    def _newest(self) -> dict[str, int]:
        """Return the latest generation of every claim."""
        found: dict[str, int] = {}
        for name in self._names():
            if match := _NAME.fullmatch(name):
                found[match[1]] = max(found.get(match[1], -1), int(match[2]))
        return found

    def _path(self, name: str, generation: int) -> Any:
        return self.folder / f"{name}.{generation}"

    @abstractmethod
    def _names(self) -> Iterable[str]:
        """Return the names of all claims that are there."""

    @abstractmethod
    def _create(self, path: Any) -> bool:
        """Create a claim, and return whether this worker is the one that did."""

    @abstractmethod
    def _remove(self, path: Any) -> None:
        """Remove a claim of this worker, or one that it took over."""

    @abstractmethod
    def _tidy(self, finished: bool) -> None:
        """Remove the place of the claims, where it is empty or nothing is left to claim."""


class Claims(Claiming):
    """Claims of a store in a folder: each is a link to its `Worker.alive`, so that one touch keeps all of them."""

    worker: Worker
    folder: Path

    def _names(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            return [entry.name for entry in entries]
        return []

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
        except (FileExistsError, FileNotFoundError):  # taken; or the store is complete and the folder gone
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return self._write(path)
        return True

    def _write(self, path: Path) -> bool:
        """Create a claim of its own where the file system has no hard links."""
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        with os.fdopen(handle, "wb") as file:
            file.write(self.worker.alive.read_bytes())
        self.worker.touches.add(path)
        return True
