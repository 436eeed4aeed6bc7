"""Keep the records of a store: size and checksum of each file of its committed units, and of all its other files."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from flexcache.errors import DamagedError
from flexcache.store.format.schema import COORDINATES, DOCUMENTS, PLAN_RECORD, SEQUENCES
from flexcache.store.format.shard import shard_name
from flexcache.store.storage.atomic_files import json_bytes, write_json
from flexcache.store.storage.backend import storage_of
from flexcache.store.storage.location import StoreLocation
from flexcache.store.storage.path_safety import MOST_JSON, check_inside

CHECKSUM = "xxh3_128"
"""Key of the XXH3-128 of the rest of a record, so that any changed byte is detected. The first stores have none."""
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""Errors that reading a missing or damaged file of JSON raises."""
_KEYS = ("schema", "unit", "rows", "batch_tokens", "fingerprint", "files", "virtual")
_DIGEST = re.compile(r"[0-9a-f]{32}")
_RECORD = re.compile(r"([0-9]+)\.json")


@dataclass(frozen=True)
class FileRecord:
    """One file of a committed unit: its size in bytes and the XXH3-128 of its content, in hex."""

    size: int
    xxh3_128: str

    def __str__(self) -> str:
        return f"{self.size} bytes with XXH3-128 {self.xxh3_128}"


def measure_file(path: StoreLocation) -> FileRecord | None:
    """Return the size and checksum of a file, None if it is missing; memory is 1 MiB, or 32 on object storage."""
    hasher, size = xxhash.xxh3_128(), 0
    try:
        if not path.is_file():
            return None
        for block in storage_of(path.parent).read_blocks(path.name):
            hasher.update(block)
            size += len(block)
    except FileNotFoundError:  # removed meanwhile
        return None
    return FileRecord(size, hasher.hexdigest())


def check_file(path: StoreLocation, record: FileRecord, remedy: str | None = None) -> None:
    """Raise DamagedError if a file is missing or its bytes are not those of its record."""
    found = measure_file(path)
    if found != record:
        raise damaged_file(path, record, found, remedy)


def damaged_file(
    path: StoreLocation, record: FileRecord, found: FileRecord | None, remedy: str | None = None
) -> DamagedError:
    """Return the error for a file that is missing, or whose bytes are not those of its record."""
    return DamagedError(
        "a file of the store is missing" if found is None else "a file of the store has other bytes than were written",
        where=str(path),
        expected=str(record),
        found="no file" if found is None else str(found),
        remedy=remedy
        or "run flexcache verify to see what else is damaged; after flexcache repair, the capture recomputes"
        " a damaged unit",
    )


@dataclass(frozen=True)
class UnitRecord:
    """Record of a committed unit. It does not depend on time or machine, so equal units have equal records.

    Attributes
    ----------
    unit : int
    rows : tuple of int
        First row, and the row after the last.
    batch_tokens : int
        Token budget of the batches: that of the plan, or a smaller one if memory was short.
    fingerprint : dict
        Conditions that the bytes depend on in addition to the plan: device, versions, threads, attention kernel.
    files : dict
        Records of the shards, by path relative to the store.
    virtual : dict
        Digests of the shards of virtual layers, by the path that each would have: one XXH3-128 in hex for the rows of
        each batch, in the order of the batches within *batch_tokens*.
    """

    unit: int
    rows: tuple[int, int]
    batch_tokens: int
    fingerprint: dict[str, Any]
    files: dict[str, FileRecord]
    virtual: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        """Paths of the shards that the record describes, on disk or virtual."""
        return {*self.files, *self.virtual}


def digests_of(record: UnitRecord, key: tuple[str, int | None]) -> tuple[str, ...]:
    """Return the digests of a virtual layer, given by array and layer; raise DamagedError if the record lacks them."""
    name = shard_name(*key, record.unit)
    if name not in record.virtual:
        raise DamagedError(
            "a ledger record has no digests of a virtual layer",
            where=f"unit {record.unit}",
            expected=f"digests of {name}",
            remedy="run flexcache repair, then the same capture again: it recomputes this unit alone",
        )
    return record.virtual[name]


@dataclass(frozen=True)
class UnitContent:
    """The records of a unit's files, and the digests of its virtual shards, as in `UnitRecord`."""

    files: dict[str, FileRecord]
    virtual: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __or__(self, other: UnitContent) -> UnitContent:
        return UnitContent(self.files | other.files, self.virtual | other.virtual)


def record_json(record: UnitRecord) -> dict[str, Any]:
    """Return the JSON content of the file of a record."""
    content = asdict(record)
    if not record.virtual:
        del content["virtual"]
    return with_checksum({"schema": 1, **content})


class Ledger:
    """The records of one pass, one JSON file per unit; writing a record commits its unit.

    Records are only added, except that `take_back` removes those of damaged units. Any number of processes may read
    while others write.
    """

    def __init__(self, root: StoreLocation, pass_name: str = "0") -> None:
        self.root = root
        self.folder = root / "ledger" / pass_name
        self._storage = storage_of(self.folder)

    def path(self, unit: int) -> StoreLocation:
        """Return the path of the record of a unit, which need not exist."""
        return self.folder / f"{unit}.json"

    def units(self) -> list[int]:
        """Return the committed units, sorted, by the file names alone."""
        return sorted(int(match[1]) for name in self._storage.list_names() if (match := _RECORD.fullmatch(name)))

    def has(self, unit: int) -> bool:
        """Return True if a unit is committed."""
        return self.path(unit).is_file()

    def commit(self, record: UnitRecord) -> None:
        """Commit a unit: write its record durably and atomically."""
        self._storage.write_bytes(f"{record.unit}.json", json_bytes(record_json(record)))

    def take_back(self, unit: int) -> None:
        """Remove the record of a unit durably, so that the unit is no longer committed."""
        self._storage.delete(f"{unit}.json")

    def read_record(self, unit: int) -> UnitRecord:
        """Return the record of a unit; raise DamagedError if it cannot be read or is malformed."""
        path = self.path(unit)
        remedy = "delete this record and run the same capture again: it recomputes this unit alone"
        with reading(f"the ledger record of unit {unit}", path, remedy):
            data = read_checked_json(self.root, path, _KEYS)
            start, stop = data["rows"]
            rows, batch_tokens = (int(start), int(stop)), int(data["batch_tokens"])
            record = UnitRecord(
                int(data["unit"]), rows, batch_tokens, dict(data["fingerprint"]), _files(data), _digests(data)
            )
            if record.unit != unit:
                raise ValueError(f"the record is of unit {record.unit}")
            return record

    def __iter__(self) -> Iterator[UnitRecord]:
        return (self.read_record(unit) for unit in self.units())


def write_plan_record(store: Path, names: Iterable[str]) -> None:
    """Write ``ledger/plan.json``, the record of the files of a store except shards, for those that exist."""
    files = {name: asdict(record) for name in names if (record := measure_file(store / name)) is not None}
    write_json(store / PLAN_RECORD, with_checksum({"schema": 1, "files": files}))


def read_plan_record(root: StoreLocation, name: str = PLAN_RECORD) -> dict[str, FileRecord]:
    """Return the records of all files of a store except shards; raise DamagedError if they cannot be read."""
    path = root / name
    with reading("the plan record", path, "run flexcache verify to see what else is damaged"):
        data = read_checked_json(root, path, ("schema", "files"))
        if data["schema"] != 1:
            raise ValueError(f"its schema is {data['schema']}")
        return _files(data)


def changed_plan_files(before: dict[str, FileRecord], after: dict[str, FileRecord]) -> list[str]:
    """Return the changed files except shards and the root metadata, in an order in which they may change."""
    changed = {name for name, record in after.items() if before.get(name) != record and name != "zarr.json"}
    last = [*(f"{name}/zarr.json" for name in COORDINATES), SEQUENCES, DOCUMENTS, "README.md"]
    chunks = sorted(name for name in changed if name.partition("/")[0] in COORDINATES and name not in last)
    arrays = sorted(changed - set(chunks) - set(last))
    return [*chunks, *arrays, *(name for name in last if name in changed)]


@contextmanager
def reading(what: str, path: StoreLocation, remedy: str) -> Iterator[None]:
    """Raise DamagedError for an error of `UNREADABLE`: a record is missing, or is not what was written."""
    try:
        yield
    except UNREADABLE as error:
        found = f"{type(error).__name__}: {error}"
        raise DamagedError(f"{what} cannot be read", where=str(path), found=found, remedy=remedy) from error


def read_checked_json(root: StoreLocation, path: StoreLocation, keys: Collection[str]) -> dict[str, Any]:
    """Return a record with these *keys*; raise ValueError if it has others, or its bytes do not match its checksum."""
    check_inside(root, path, MOST_JSON)
    written = path.read_bytes()
    data: dict[str, Any] = json.loads(written)
    if unknown := set(data) - {*keys, CHECKSUM}:
        raise ValueError(f"it has {', '.join(sorted(unknown))}")
    content = {name: value for name, value in data.items() if name != CHECKSUM}
    if written != json_bytes(data) or data.get(CHECKSUM) not in (None, with_checksum(content)[CHECKSUM]):
        raise ValueError("it has other bytes than were written (checksum)")
    return data


def with_checksum(content: dict[str, Any]) -> dict[str, Any]:
    """Return a record with the checksum of its own content."""
    return {**content, CHECKSUM: xxhash.xxh3_128_hexdigest(json_bytes(content))}


def _files(data: dict[str, Any]) -> dict[str, FileRecord]:
    return {str(name): FileRecord(int(file["size"]), str(file["xxh3_128"])) for name, file in data["files"].items()}


def _digests(data: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    found = {str(name): tuple(map(str, digests)) for name, digests in data.get("virtual", {}).items()}
    if not all(_DIGEST.fullmatch(digest) for digests in found.values() for digest in digests):
        raise ValueError("a digest of virtual rows is not 32 hexadecimal digits")
    return found
