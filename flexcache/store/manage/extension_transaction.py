"""Extend a store in a transaction: stage documents, layers or sites inside the store, then commit them.

The staged store ``.growing`` has the metadata, tables and coordinates of the extended store, and a ledger of its own,
which is filled like any other. Once it is complete, its files are committed in steps, each of which leaves a correct
store with the old content, for readers that are open and for new ones; replacing the root ``zarr.json`` is the step
that makes the new content visible. Each step can be repeated, and none needs the model, so if a process ends at any
point, any other process can finish its work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flexcache.errors import DamagedError, MismatchError, StoreError
from flexcache.progress import ProgressCallback, ignore_progress
from flexcache.store.format.ledger import FileRecord, Ledger, UnitRecord, changed_plan_files, read_plan_record
from flexcache.store.format.schema import (
    COMMITTING,
    NEXT_PLAN,
    PLAN_RECORD,
    STAGED,
    committing_folder,
    is_planned,
    read_attributes,
    staged_folder,
)
from flexcache.store.read.store import Store
from flexcache.store.storage.atomic_files import commit_files, fsync_folder, write_durably
from flexcache.store.storage.backend import disk_path
from flexcache.store.storage.disk_errors import clear_errors
from flexcache.store.storage.location import StoreLocation, local, parse_location
from flexcache.store.write.claims import Claims
from flexcache.store.write.create import publish_store
from flexcache.store.write.election import POLL, elect, working
from flexcache.store.write.worker import ALIVE, PARTIAL, Worker


class ExtensionTransaction:
    """An extension of the store at *path*, from staging in *folder*, a store inside it, to commit."""

    def __init__(self, path: str | StoreLocation) -> None:
        self.path = local(path, "flexcache extend")
        self.folder = self.path / STAGED

    @property
    def staged(self) -> bool:
        """True if an extension is staged, complete or not."""
        return staged_folder(self.path) is not None

    @property
    def committing(self) -> bool:
        """True if the staged extension is complete and is being committed; it can no longer be dropped."""
        return committing_folder(self.path) is not None

    def request(self) -> Any:
        """Return the request with which the extension was staged, from the history that the store will have."""
        history = read_attributes(self.folder)["provenance"].get("history", [])
        return history[-1].get("extended_by") if history and isinstance(history[-1], dict) else None

    def stage(self, make: Callable[[Path], None], on_wait: Callable[[], None] = lambda: None) -> None:
        """Stage what *make* writes into a given folder; if several processes call this, one does it."""
        with clear_errors(self.path), self._elected(on_wait, lambda: self.staged) as worker:
            if worker is not None:
                make(worker.folder / "store")
                publish_store(worker.folder / "store", self.folder)

    def check_request(self, request: Any) -> None:
        """Raise MismatchError if *request* differs from the request of the staged extension."""
        with self.watch_commit():
            staged = self.request()
        if staged != request:
            raise MismatchError(
                "another extension of the store is unfinished",
                where=str(self.path),
                expected=str(staged),
                found=str(request),
                remedy="finish it with the command that began it, or drop it with flexcache extend --discard",
            )

    @contextmanager
    def watch_commit(self) -> Iterator[None]:
        """Re-raise a store error as AlreadyCommittedError if other processes commit the extension meanwhile."""
        try:
            yield
        except StoreError as error:
            self.check_open()
            raise error

    def commit(self, progress: ProgressCallback = ignore_progress, on_wait: Callable[[], None] = lambda: None) -> None:
        """Commit the staged extension to the store; if several processes call this, one does it.

        StoreError if the extension is not complete, or units of the store itself were taken back meanwhile.
        """
        with clear_errors(self.path), self._elected(on_wait, lambda: not self.staged) as worker:
            if worker is not None:
                self._check_complete()
                if not self.committing:
                    write_durably(self.folder / COMMITTING, b"")
                self._wait_for_others(on_wait)
                self._commit_files(progress)
                self._remove(worker)

    def check_open(self) -> None:
        """Raise AlreadyCommittedError if other processes have completed the extension.

        Call it once a worker exists in `folder`. The committing process first writes its mark and then waits for the
        workers that exist, so that at least one of the two sees the other.
        """
        if not self.staged or self.committing:
            raise AlreadyCommittedError("other processes have completed the extension", where=str(self.path))

    def discard(self) -> bool:
        """Drop the staged extension; return False if none is staged.

        StoreError if the extension is being committed, or other processes fill it.
        """
        if not self.staged:
            return False
        if self.committing:
            raise StoreError(
                "the extension is complete and being committed, so it cannot be dropped",
                where=str(self.path),
                remedy="run flexcache extend with the configuration again to finish it, which takes moments;"
                " flexcache rm can remove sites and layers afterwards",
            )
        with clear_errors(self.path), self._elected(lambda: None, lambda: not self.staged) as worker:
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

    # Steps of a commit, each of which can be repeated

    def _commit_files(self, progress: ProgressCallback) -> None:
        staged, store = Store(self.folder), Store(self.path)
        changed = [pair for unit in range(staged.n_units) if (pair := self._record(staged.ledger, store.ledger, unit))]
        names = [name for record, new in changed for name in new]
        names += changed_plan_files(read_plan_record(self.path), read_plan_record(self.folder))
        commit_files(self.path, self._uncommitted(names, progress))
        for record, _ in changed:
            store.ledger.commit(record)
        for name in ("zarr.json", PLAN_RECORD):
            write_durably(self.path / name, (self.folder / name).read_bytes())

    def _uncommitted(self, names: list[str], progress: ProgressCallback) -> Iterator[tuple[Path, str]]:
        for done, name in enumerate(names):
            if (self.folder / name).exists():
                yield self.folder / name, name
            elif not (self.path / name).exists():  # neither staged nor committed by an earlier process
                raise DamagedError("a file of the extension is missing", where=str(self.folder / name))
            progress(done + 1, len(names))

    def _record(self, staged: Ledger, ledger: Ledger, unit: int) -> tuple[UnitRecord, list[str]] | None:
        """Return the new record of a unit and its new files; None if the unit does not change."""
        new = staged.read_record(unit)
        if not ledger.has(unit):
            return new, list(new.files)
        old = ledger.read_record(unit)
        changed = [name for name, file in new.files.items() if old.files.get(name) != file]
        digests = {**old.virtual, **new.virtual}
        if not changed and old.rows == new.rows and digests == old.virtual:
            return None
        recomputed = old.names <= new.names  # with new rows behind those that the unit had
        fingerprint = new.fingerprint
        if not recomputed and old.fingerprint != new.fingerprint:
            fingerprint = {"merged": [old.fingerprint, new.fingerprint]}
        budget = new.batch_tokens if recomputed else min(old.batch_tokens, new.batch_tokens)
        return UnitRecord(unit, new.rows, budget, fingerprint, {**old.files, **new.files}, digests), changed

    def _remove(self, worker: Worker) -> None:
        runs = self.folder / "runs"
        for run in sorted(runs.glob("*.json")):
            (self.path / "runs").mkdir(exist_ok=True)
            run.replace(self.path / "runs" / run.name)
        self.folder.rename(worker.folder / "growing")
        fsync_folder(self.path)

    # Private

    @contextmanager
    def _elected(self, on_wait: Callable[[], None], done: Callable[[], bool]) -> Iterator[Worker | None]:
        """Yield a worker of the store if this process is elected; None once another process has *done* the work."""
        with working(self.path) as (worker, claims):
            yield worker if elect(worker, claims, "grow", done, on_wait) else None

    def _check_complete(self) -> None:
        staged = Store(self.folder)
        if not staged.complete:
            raise StoreError(
                "the extension is not complete",
                where=str(self.path),
                found=f"{len(staged.committed_units)} of {staged.n_units} units",
                remedy="run flexcache extend with the configuration again",
            )
        check_complete(Store(self.path))

    def _wait_for_others(self, on_wait: Callable[[], None]) -> None:
        """Return once no other process has the staged store open; processes leave it when it is complete."""
        inside = Worker(self.folder)
        try:
            while any(
                alive != inside.alive and alive.exists() and not inside.gone(alive)
                for alive in (self.folder / PARTIAL).glob(f"*/{ALIVE}")
            ):
                on_wait()
                time.sleep(POLL)
        finally:
            inside.close()


class AlreadyCommittedError(StoreError):
    """Other processes have completed an extension, so nothing is left to capture for it."""


def check_not_extending(path: str | StoreLocation, staged: bool = False) -> None:
    """Raise StoreError if an extension is being committed to a store.

    With *staged*, also if one is staged at all, or documents are not planned yet.
    """
    found = parse_location(path)
    if staged and not is_planned(found):
        raise StoreError(
            "documents of the store are not planned yet",
            where=str(path),
            remedy="complete it first, with the capture that began it",
        )
    committing = committing_folder(found) is not None
    if committing or (staged and staged_folder(found) is not None):
        raise StoreError(
            "the store has an unfinished extension",
            where=str(path),
            remedy="finish it with the flexcache extend command that began it"
            + ("" if committing else ", or drop it with flexcache extend --discard"),
        )


def check_complete(store: Store) -> None:
    """Raise StoreError if units of a store that is to be extended are missing."""
    if not store.complete:
        raise StoreError(
            "the store is not complete, so it cannot be extended",
            where=str(store.path),
            found=f"{len(store.committed_units)} of {store.n_units} units committed"
            + (", and documents that are not planned yet" if store.growing else ""),
            remedy="complete it first, with the capture that began it",
        )


def committing_files(path: StoreLocation) -> dict[str, FileRecord]:
    """Return the records of files that are being committed: of an extension, or of a plan that grows."""
    if disk_path(path) is not None and (path / NEXT_PLAN).is_file():
        return read_plan_record(path, NEXT_PLAN)
    folder = committing_folder(path)
    if folder is None:
        return {}
    files = read_plan_record(folder)
    for record in Ledger(folder):
        files |= record.files
    return files
