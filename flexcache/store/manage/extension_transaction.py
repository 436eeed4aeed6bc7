"""Growing: more documents, layers or sites are captured into a store inside the store, and then put in place.

The staged store ``.growing`` has the metadata, tables and coordinates of the store as it will be, and a ledger of its
own, which is filled like any other. Once it is complete, its files take their places in steps that each leave a correct
store of what was there before, for readers that are open and for new ones; the root ``zarr.json`` is the step that
makes what is new visible. Every step can be done again, and none needs the model, so a process that ends anywhere is
followed by any other.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flexcache.errors import DamagedError, MismatchError, StoreError
from flexcache.store.format.extension import GROWING, PLACING, committing_folder, staged_folder
from flexcache.store.format.ledger import FileRecord, Ledger, UnitRecord
from flexcache.store.format.schema import COORDINATES, DOCUMENTS, PLAN_RECORD, SEQUENCES, read_attributes
from flexcache.store.manage.derive import plan_files
from flexcache.store.read.store import Store
from flexcache.store.storage.atomic_files import fsync_folder, write_durably
from flexcache.store.storage.location import Place, local, place
from flexcache.store.storage.object_path import RemotePath
from flexcache.store.write.claims import Claims
from flexcache.store.write.create import appear
from flexcache.store.storage.disk_errors import clear_errors
from flexcache.store.write.worker import ALIVE, PARTIAL, Worker

"""Is there from before the first file takes its place: what is staged can no longer be dropped."""
POLL = 0.1

Progress = Callable[[int, int], None]


class ExtensionTransaction:
    """What a store grows by, from when it is staged until it is in place.

    Attributes
    ----------
    path, folder : Path
        The store, and the staged one inside it.
    """

    def __init__(self, path: str | Place) -> None:
        self.path = local(path, "flexcache extend")
        self.folder = self.path / GROWING

    @property
    def begun(self) -> bool:
        """Whether something is staged."""
        return staged_folder(self.path) is not None

    @property
    def placing(self) -> bool:
        """Whether what is staged is complete, and goes to its place."""
        return committing_folder(self.path) is not None

    def request(self) -> Any:
        """Return what was asked for when it was staged: the last entry of the history that the store will have."""
        history = read_attributes(self.folder)["provenance"].get("history", [])
        return history[-1].get("extended_by") if history and isinstance(history[-1], dict) else None

    def begin(self, make: Callable[[Path], None], on_wait: Callable[[], None] = lambda: None) -> None:
        """Stage what *make* writes into the folder that it is given; where several processes ask for it, one does it.

        Raises
        ------
        CaptureError
            The disk refuses.
        """
        with clear_errors(self.path), self._alone(on_wait, lambda: self.begun) as worker:
            if worker is not None:
                make(worker.folder / "store")
                appear(worker.folder / "store", self.folder)

    def check_request(self, request: Any) -> None:
        """Refuse another extension than the one that is staged.

        Raises
        ------
        MismatchError
        """
        with self.watched():
            staged = self.request()
        if staged != request:
            raise MismatchError(
                "another extension of the store was begun, and is not finished",
                where=str(self.path),
                expected=str(staged),
                found=str(request),
                remedy="finish it by the command that began it, or drop it by flexcache extend --discard",
            )

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While open, an error that comes of what is staged being put in place by others says so.

        Raises
        ------
        SettledError
        """
        try:
            yield
        except StoreError as error:
            self.check_open()
            raise error

    def settle(self, progress: Progress = lambda done, total: None, on_wait: Callable[[], None] = lambda: None) -> None:
        """Put what is staged in place, or finish that; where several processes ask for it, one does it.

        Raises
        ------
        StoreError
            What is staged is not complete; or units of the store itself were taken back meanwhile.
        CaptureError
            The disk refuses.
        """
        with clear_errors(self.path), self._alone(on_wait, lambda: not self.begun) as worker:
            if worker is not None:
                self._check_complete()
                if not self.placing:
                    write_durably(self.folder / PLACING, b"")
                self._wait_for_others(on_wait)
                self._place(progress)
                self._remove(worker)

    def check_open(self) -> None:
        """Refuse to fill what other processes have completed: to be called once a worker is at work in `folder`.

        Whoever puts it in place says so first, and then waits for the workers that are there; so of the two, one sees
        the other.

        Raises
        ------
        SettledError
        """
        if not self.begun or self.placing:
            raise SettledError("other processes have completed the extension", where=str(self.path))

    def discard(self) -> bool:
        """Drop what is staged, and return whether there was something.

        Raises
        ------
        StoreError
            It is complete, and on its way to its place; or other processes fill it.
        """
        if not self.begun:
            return False
        if self.placing:
            raise StoreError(
                "the extension is complete and on its way to its place, so it cannot be dropped",
                where=str(self.path),
                remedy="run flexcache extend with the configuration again to finish it, which takes moments;"
                " flexcache rm can drop sites and layers afterwards",
            )
        with clear_errors(self.path), self._alone(lambda: None, lambda: not self.begun) as worker:
            if worker is not None:
                inside = Worker(self.folder)
                others = next(iter(Claims(inside).others()), None)
                inside.close()
                if others:
                    raise StoreError(
                        "another process fills the extension",
                        where=str(self.path),
                        found=f"process {others.get('pid')} on {others.get('host')}",
                        remedy="stop it first",
                    )
                self._remove(worker)
        return True

    # Steps, each of which may be done again

    def _place(self, progress: Progress) -> None:
        staged, store = Store(self.folder), Store(self.path)
        changed = [pair for unit in range(staged.n_units) if (pair := self._record(staged.ledger, store.ledger, unit))]
        files = [name for record, names in changed for name in names] + self._plan_files()
        folders: dict[Path, None] = {}
        for done, name in enumerate(files):
            folders.update(self._move(name))
            progress(done + 1, len(files))
        for folder in folders:
            fsync_folder(folder)
        for record, _ in changed:
            store.ledger.commit(record)
        for name in ("zarr.json", PLAN_RECORD):
            write_durably(self.path / name, (self.folder / name).read_bytes())

    def _record(self, staged: Ledger, ledger: Ledger, unit: int) -> tuple[UnitRecord, list[str]] | None:
        """Return the record that a unit is to have, and the files of it that come; None where it stays as it is."""
        new = staged.read(unit)
        if not ledger.has(unit):
            return new, list(new.files)
        old = ledger.read(unit)
        coming = [name for name, file in new.files.items() if old.files.get(name) != file]
        if not coming and old.rows == new.rows:
            return None
        together = set(old.files) <= set(new.files)  # the unit was computed anew, behind the rows that it had
        fingerprint = new.fingerprint
        if not together and old.fingerprint != new.fingerprint:
            fingerprint = {"merged": [old.fingerprint, new.fingerprint]}
        budget = new.batch_tokens if together else min(old.batch_tokens, new.batch_tokens)
        return UnitRecord(unit, new.rows, budget, fingerprint, {**old.files, **new.files}), coming

    def _plan_files(self) -> list[str]:
        """Return the files beside shards and root that differ, in the order in which they may change."""
        before, after = plan_files(Store(self.path)), plan_files(Store(self.folder))
        changed = {name for name, record in after.items() if before.get(name) != record and name != "zarr.json"}
        last = [*(f"{name}/zarr.json" for name in COORDINATES), SEQUENCES, DOCUMENTS, "README.md"]
        chunks = sorted(name for name in changed if name.partition("/")[0] in COORDINATES and name not in last)
        arrays = sorted(changed - set(chunks) - set(last))
        return [*chunks, *arrays, *(name for name in last if name in changed)]

    def _move(self, name: str) -> dict[Path, None]:
        source, target = self.folder / name, self.path / name
        if not source.exists():
            if target.exists():  # it is in place
                return {}
            raise DamagedError("a file of the extension is missing", where=str(source))
        target.parent.mkdir(parents=True, exist_ok=True)
        source.replace(target)
        return dict.fromkeys(parent for parent in target.parents if parent == self.path or self.path in parent.parents)

    def _remove(self, worker: Worker) -> None:
        runs = self.folder / "runs"
        for run in sorted(runs.glob("*.json")):
            (self.path / "runs").mkdir(exist_ok=True)
            run.replace(self.path / "runs" / run.name)
        self.folder.rename(worker.folder / "growing")
        fsync_folder(self.path)

    # Private

    @contextmanager
    def _alone(self, on_wait: Callable[[], None], done: Callable[[], bool]) -> Iterator[Worker | None]:
        """Give a worker of the store that alone has the claim on its growth; None once another has *done* it."""
        worker = Worker(self.path)
        claims = Claims(worker)
        try:
            while not done():
                worker.sweep()
                if claims.take(["grow"]) is not None:
                    yield None if done() else worker
                    return
                on_wait()
                time.sleep(POLL)
            yield None
        finally:
            claims.close()
            worker.close()

    def _check_complete(self) -> None:
        staged, store = Store(self.folder), Store(self.path)
        if not staged.complete:
            raise StoreError(
                "the extension is not complete",
                where=str(self.path),
                found=f"{len(staged.committed_units)} of {staged.n_units} units",
                remedy="run flexcache extend with the configuration again",
            )
        if not store.complete:
            raise incomplete(store)

    def _wait_for_others(self, on_wait: Callable[[], None]) -> None:
        """Return once no other process has the staged store open: those that have it, leave it as it is complete."""
        inside = Worker(self.folder)
        try:
            while any(not inside.gone(alive) for alive in self._alive(inside)):
                on_wait()
                time.sleep(POLL)
        finally:
            inside.close()

    def _alive(self, own: Worker) -> list[Path]:
        folders = (self.folder / PARTIAL).glob("*")
        return [folder / ALIVE for folder in folders if folder != own.folder and (folder / ALIVE).exists()]


class SettledError(StoreError):
    """Other processes have completed an extension, so that there is nothing left to capture for it."""


def incomplete(store: Store) -> StoreError:
    """Return the error for a store that cannot grow since units of it are missing."""
    return StoreError(
        "the store is not complete, so it cannot grow",
        where=str(store.path),
        found=f"{len(store.committed_units)} of {store.n_units} units committed",
        remedy="finish it first, by the capture that began it",
    )


def check_settled(path: str | Place, begun: bool = False) -> None:
    """Refuse a store in which an extension is on its way to its place, or, with *begun*, has begun at all.

    Raises
    ------
    StoreError
    """
    if isinstance(place(path), RemotePath):  # it does not grow there
        return
    growth = ExtensionTransaction(path)
    if growth.placing or (begun and growth.begun):
        raise StoreError(
            "an extension of the store has begun and is not finished",
            where=str(path),
            remedy="finish it by the flexcache extend that began it"
            + ("" if growth.placing else ", or drop it by flexcache extend --discard"),
        )


def staged_records(path: Place) -> tuple[dict[str, FileRecord], dict[int, UnitRecord]]:
    """Return what the files of an extension on its way to its place are to be, by name and by unit; else nothing."""
    if isinstance(path, RemotePath) or not ExtensionTransaction(path).placing:
        return {}, {}
    ledger = Ledger(path / GROWING)
    return plan_files(Store(path / GROWING)), {unit: ledger.read(unit) for unit in ledger.units()}


def link_records(source: Ledger, target: Ledger, units: range) -> None:
    """Give a ledger that is being made the records of units of another."""
    for unit in units:
        try:
            os.link(str(source.path(unit)), str(target.path(unit)))
        except OSError:
            shutil.copyfile(str(source.path(unit)), str(target.path(unit)))
