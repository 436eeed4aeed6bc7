"""Verify every file of a store against its record, and take damaged units back, so that a capture recomputes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyarrow import ArrowException

from flexcache.errors import DamagedError, StoreError
from flexcache.progress import ProgressCallback, ignore_progress
from flexcache.store.format.label_table import LABEL_RECORDS, list_label_tables, read_label_table
from flexcache.store.format.ledger import FileRecord, Ledger, measure_file, read_plan_record
from flexcache.store.format.schema import PLAN_RECORD, STAGED
from flexcache.store.format.shard import shard_name
from flexcache.store.manage.extension_transaction import committing_files
from flexcache.store.manage.layer_change import NOTE, describe_note
from flexcache.store.read.batch_rows import batch_rows
from flexcache.store.read.selection import ArrayKey, keys
from flexcache.store.read.store import Store
from flexcache.store.storage.atomic_files import is_temporary
from flexcache.store.storage.backend import disk_path, relative_files
from flexcache.store.storage.location import StoreLocation, parse_location
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
    virtual : int
        Number of shards of virtual layers that have digests; only a model can recompute their rows.
    findings : tuple of Finding
        Problems; empty if the store is sound.
    """

    files: int
    bytes: int
    units: int
    committed: int
    findings: tuple[Finding, ...]
    virtual: int = 0

    @property
    def sound(self) -> bool:
        """True if there are no findings. A store can be sound and incomplete."""
        return not self.findings


@dataclass(frozen=True)
class Repair:
    """Result of `repair`.

    ::

        repaired = flexcache.repair("run.zarr")
        print(repaired.units, repaired.beyond)

    Attributes
    ----------
    found : Verification
        State before the repair.
    units : tuple of int
        Units that are no longer committed, so that the next capture recomputes them and no others.
    beyond : tuple of Finding
        Damage to the plan, metadata or tables, which no capture repairs.
    """

    found: Verification
    units: tuple[int, ...]
    beyond: tuple[Finding, ...]


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
    committing = committing_files(store.path)
    for unit, name, record in _records(store, findings):
        if name in known:
            findings.append(Finding(name, unit, "is named by two records"))
        known.add(name)
        problem = _problem(store.path, name, record)
        if problem and not (name in committing and _problem(store.path, name, committing[name]) is None):
            findings.append(Finding(name, unit, problem))
        files += 1
        size += record.size
        progress(files, size)
    virtual_keys = [(array.name, layer) for array in store.arrays.values() for layer in array.virtual]
    virtual = _check_digests(store, virtual_keys, findings)
    begun = set(committing)  # and files of units whose process ended before it wrote the record
    for unit in range(store.n_units):
        expected = _expected(store, unit)
        begun.update(shard_name(*key, unit) for key in virtual_keys)  # layers that are being filled
        if not store.committed[unit]:
            begun.update(expected)
        elif missing := [name for name in expected if name not in known]:
            known_problem = any(finding.unit == unit for finding in findings)
            findings += [
                Finding(name, unit, "is not named by its unit's record") for name in missing if not known_problem
            ]
    for name in relative_files(store.path, skip=("ledger", "runs", PARTIAL, CLAIMS, STAGED)):
        if name == NOTE:
            findings.append(Finding(name, None, describe_note(store)))
        elif name not in known and name not in begun and not is_temporary(name):
            findings.append(Finding(name, None, "is in no record, so it is not part of the store", stray=True))
    return Verification(files, size, store.n_units, len(store.committed_units), tuple(findings), virtual)


def repair(path: str | StoreLocation, progress: ProgressCallback = ignore_progress) -> Repair:
    """Verify a store, and take back each unit whose files or ledger record are damaged.

    ::

        flexcache.repair("run.zarr")
        flexcache.capture(...)      # the same call as before recomputes the damaged units

    Only ledger records are removed. The files of a unit are replaced when the same capture recomputes it; until then,
    the unit counts as not committed.

    Parameters
    ----------
    progress
        Called with the files and bytes checked so far.

    Raises
    ------
    StoreError
        There is no store at *path*, or a record cannot be removed.
    """
    found = verify(path, progress)
    units = tuple(sorted({finding.unit for finding in found.findings if finding.unit is not None}))
    ledger = Ledger(parse_location(path))
    try:
        for unit in units:
            ledger.take_back(unit)
    except OSError as error:
        raise StoreError(
            "a damaged unit cannot be taken back", where=str(error.filename), found=error.strerror or str(error)
        ) from error
    beyond = tuple(finding for finding in found.findings if finding.unit is None and not finding.stray)
    return Repair(found, units, beyond)


def _records(store: Store, findings: list[Finding]) -> Iterator[tuple[int | None, str, FileRecord]]:
    """Yield unit, name and record of each file; records that cannot be read are added to *findings*."""
    for table in list_label_tables(store.path):
        try:
            found = read_label_table(store.path, table)
            yield None, found.path, found.file
        except DamagedError as error:
            record = f"{LABEL_RECORDS}/{table}.json"
            findings.append(Finding(record, None, f"cannot be read: {error.found or error.message}"))
    for unit in (None, *store.committed_units.tolist()):
        try:
            listed = read_plan_record(store.path) if unit is None else store.ledger.read_record(unit).files
        except DamagedError as error:
            record = PLAN_RECORD if unit is None else f"ledger/0/{unit}.json"
            findings.append(Finding(record, unit, f"cannot be read: {error.found or error.message}"))
            continue
        for name, file in listed.items():
            yield unit, name, file


def _check_digests(store: Store, wanted: Sequence[ArrayKey], findings: list[Finding]) -> int:
    """Count the shards of virtual layers that have a digest for each batch; add the others to *findings*."""
    count = 0
    for unit in store.committed_units.tolist() if wanted else ():
        try:
            record = store.ledger.read_record(unit)
            batches = len(batch_rows(store, unit, record.batch_tokens))
        except (DamagedError, OSError, ArrowException):
            continue  # found above
        for name in [shard_name(*key, unit) for key in wanted]:
            held = len(record.virtual.get(name, ()))
            count += held == batches
            if held != batches:
                problem = f"has {held or 'no'} digests in its unit's record, which ran {batches} batches"
                findings.append(Finding(name, unit, problem))
    return count


def _expected(store: Store, unit: int) -> list[str]:
    return [shard_name(*key, unit) for key in keys(store.arrays.values())]


def _problem(root: StoreLocation, name: str, record: FileRecord) -> str | None:
    path, folder = root / name, disk_path(root)
    if ".." in Path(name).parts or Path(name).is_absolute():
        return "leads out of the store"
    if folder is not None and not (folder / name).resolve().is_relative_to(folder.resolve()):
        return "leads out of the store"
    try:
        check_inside(root, path)
        found = measure_file(path)
    except DamagedError as error:
        return error.message.removeprefix("a file of the store ")
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    if found is None:
        return "is missing"
    if found.size != record.size:
        return f"has {found.size} bytes instead of {record.size}"
    return None if found == record else "has other bytes than were written (checksum)"
