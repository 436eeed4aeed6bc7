"""Claims: which worker computes which unit, by exclusive files; no server, and no lock that a file system may lack."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from flexcache.store.worker import Worker, describe

CLAIMS = ".claims"
CLAIM_NAME = re.compile(r"([a-z0-9]+)\.(\d+)")
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS)


class Claims:
    """A worker's claims on the units of a store.

    A claim on unit 7 is the file ``.claims/7.0``, which one worker alone can create: a link to its `Worker.alive`, so
    that one touch a while keeps all of its claims. Once a claim's worker is gone, whoever creates ``7.1`` has taken the
    unit over, again one worker alone. Nothing is ever removed to take over, so no two can take the same claim.

    A worker that was only asleep may go on after its unit was taken over. That is harmless: `holds` tells it, and if it
    commits in that very moment, it commits the same bytes.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.folder = worker.root / CLAIMS
        self._held: dict[str, Path] = {}

    def take(self, names: Iterable[str | int]) -> str | None:
        """Claim the first of *names* that is free or whose worker is gone, and return it; None where none is.

        A unit may have been committed, and its claim released, between the caller's look at the ledger and this call:
        look again once the claim is there.

        Raises
        ------
        OSError
            The file system refuses.
        """
        newest = self._newest()
        for name in map(str, names):
            generation = newest.get(name)
            if generation is None:
                number = 0
            elif self.worker.gone(self._path(name, generation)):
                number = generation + 1
            else:
                continue
            path = self._path(name, number)
            if self._create(path):
                self._held[name] = path
                return name
        return None

    def holds(self, name: str | int) -> bool:
        """Whether a claim is this worker's still, and nobody has taken it over."""
        path = self._held.get(str(name))
        return path is not None and self._newest().get(str(name)) == int(path.suffix[1:]) and path.exists()

    def release(self, name: str | int) -> None:
        """Give a claim up, with those that it took over."""
        path = self._held.pop(str(name), None)
        if path is not None:
            self.worker.touches.discard(path)
            for number in range(int(path.suffix[1:]) + 1):
                self._path(str(name), number).unlink(missing_ok=True)

    def close(self, finished: bool = False) -> None:
        """Give all claims up; where nothing is left to claim, the folder as well.

        A claim that the disk does not let go of is one of a worker that has closed, which others see.
        """
        for name in list(self._held):
            with contextlib.suppress(OSError):
                self.release(name)
        if finished:
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def others(self) -> Iterator[dict[str, Any]]:
        """Yield what the workers of other live claims say of themselves; a claim may be given up while one looks."""
        for name, generation in self._newest().items():
            path = self._path(name, generation)
            if self._held.get(name) != path and not self.worker.gone(path) and (told := describe(path)):
                yield told

    def _newest(self) -> dict[str, int]:
        """Return the latest generation of every claim."""
        found: dict[str, int] = {}
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            for entry in entries:
                if match := CLAIM_NAME.fullmatch(entry.name):
                    found[match[1]] = max(found.get(match[1], -1), int(match[2]))
        return found

    def _path(self, name: str, generation: int) -> Path:
        return self.folder / f"{name}.{generation}"

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
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(handle, "wb") as file:
            file.write(self.worker.alive.read_bytes())
        self.worker.touches.add(path)
        return True
