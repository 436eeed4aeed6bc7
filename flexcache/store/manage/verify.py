"""Verify every file of a store against the size and checksum with which it was written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flexcache.errors import DamagedError
from flexcache.progress import ProgressCallback, ignore_progress
from flexcache.store.format.extension import STAGED
from flexcache.store.format.label_table import LABEL_RECORDS, list_label_tables, read_label_table
from flexcache.store.format.ledger import FileRecord, measure_file
from flexcache.store.format.plan_record import read_plan_record
from flexcache.store.format.schema import PLAN_RECORD
from flexcache.store.format.shard import shard_name
from flexcache.store.manage.extension_state import staged_records
from flexcache.store.manage.remove import NOTE
from flexcache.store.read.store import Store
from flexcache.store.storage.atomic_files import is_temporary
from flexcache.store.storage.backend import disk_path, relative_files
from flexcache.store.storage.location import StoreLocation
from flexcache.store.storage.path_safety import check_inside
from flexcache.store.write.claims import CLAIMS
from flexcache.store.write.worker import PARTIAL


@dataclass(frozen=True)
class Finding:
    """A problem of a file, with its unit if it belongs to one.

    A *stray* file is in no record; it does no harm.
    """

    file: str
    unit: int | None
    problem: str
    stray: bool = False


@dataclass(frozen=True)
class Verification:
    """Result of `verify`.

    ::

        for finding in flexcache.verify("run.zarr").findings:
            print(finding.file, finding.problem)

    Attributes
    ----------
    files, bytes : int
        Number and size of the files that were checked.
    units, committed : int
        Number of units in the plan, and of committed units.
    findings : tuple of Finding
        Problems; empty if the store is sound.
    """

    files: int
    bytes: int
    units: int
    committed: int
    findings: tuple[Finding, ...]

    @property
    def sound(self) -> bool:
        """True if there are no findings. A store can be sound and incomplete."""
        return not self.findings


def verify(path: str | StoreLocation, progress: ProgressCallback = ignore_progress) -> Verification:
    """Read every file of a store and compare it with its record; memory is one mebibyte.

    ::

        assert flexcache.verify("run.zarr").sound

    Parameters
    ----------
    progress
        Called with the files and bytes checked so far.

    Raises
    ------
    StoreError
        There is no store at *path*.
    """
    store = Store(path)
    findings: list[Finding] = []
    known: set[str] = set()
    files = size = 0
    committing = _committing_files(store.path)
    for unit, name, record in _records(store, findings):
        if name in known:
            findings.append(Finding(name, unit, "is named by two records"))
        known.add(name)
        problem = _problem(store.path, name, record)
        if problem and name in committing and _problem(store.path, name, committing[name]) is None:
            problem = None
        if problem:
            findings.append(Finding(name, unit, problem))
        files += 1
        size += record.size
        progress(files, size)
    committed = set(store.committed_units.tolist())
    begun = {name for unit in range(store.n_units) if unit not in committed for name in _expected(store, unit)}
    missing = [
        (unit, name)
        for unit in store.committed_units.tolist()
        for name in _expected(store, unit)
        if name not in known and not any(finding.unit == unit for finding in findings)
    ]
    findings += [Finding(name, unit, "is not named by its unit's record") for unit, name in missing]
    begun |= set(committing)  # with files of a unit whose process ended before it wrote the record
    for name in relative_files(store.path, skip=("ledger", "runs", PARTIAL, CLAIMS, STAGED)):
        if name == NOTE:
            findings.append(Finding(name, None, "a removal is unfinished: run flexcache rm to finish it"))
        elif name not in known and name not in begun and not is_temporary(name):
            findings.append(Finding(name, None, "is in no record, so it is not part of the store", stray=True))
    return Verification(files, size, store.n_units, len(store.committed_units), tuple(findings))


def _records(store: Store, findings: list[Finding]) -> Iterator[tuple[int | None, str, FileRecord]]:
    try:
        listed = read_plan_record(store.path)
    except (DamagedError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        findings.append(Finding(PLAN_RECORD, None, f"cannot be read: {type(error).__name__}: {error}"))
        listed = {}
    for name, record in listed.items():
        yield None, name, record
    for table in list_label_tables(store.path):
        try:
            found = read_label_table(store.path, table)
            yield None, found.path, found.file
        except DamagedError as error:
            findings.append(
                Finding(f"{LABEL_RECORDS}/{table}.json", None, f"cannot be read: {error.found or error.message}")
            )
    for unit in store.committed_units.tolist():
        try:
            for name, record in store.ledger.read_record(unit).files.items():
                yield unit, name, record
        except DamagedError as error:
            findings.append(Finding(f"ledger/0/{unit}.json", unit, f"cannot be read: {error.found or error.message}"))


def _committing_files(path: StoreLocation) -> dict[str, FileRecord]:
    """Return the records of the files of an extension that is being committed."""
    files, units = staged_records(path)
    return {**files, **{name: file for record in units.values() for name, file in record.files.items()}}


def _expected(store: Store, unit: int) -> Iterator[str]:
    for name, array in store.arrays.items():
        for layer in array.slices:
            yield shard_name(name, layer, unit)


def _inside(root: StoreLocation, path: StoreLocation) -> bool:
    folder, file = disk_path(root), disk_path(path)
    return folder is None or file is None or file.resolve().is_relative_to(folder.resolve())


def _problem(root: StoreLocation, name: str, record: FileRecord) -> str | None:
    path = root / name
    if ".." in Path(name).parts or Path(name).is_absolute() or not _inside(root, path):
        return "leads out of the store"
    try:
        check_inside(root, path)
    except DamagedError as error:
        return error.message.removeprefix("a file of the store ")
    try:
        found = measure_file(path)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    if found is None:
        return "is missing"
    if found.size != record.size:
        return f"has {found.size} bytes instead of {record.size}"
    return None if found == record else "has other bytes than were written (checksum)"
