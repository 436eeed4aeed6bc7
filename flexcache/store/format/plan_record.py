"""Read and write the plan record, ``ledger/plan.json``: size and checksum of every file of a store except shards."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from flexcache.store.format.ledger import FileRecord, measure_file
from flexcache.store.format.schema import PLAN_RECORD
from flexcache.store.format.self_checksum import check_checksum, with_checksum
from flexcache.store.storage.atomic_files import write_json
from flexcache.store.storage.location import StoreLocation
from flexcache.store.storage.path_safety import MOST_JSON, check_inside

_KEYS = ("schema", "files")


def write_plan_record(store: Path, names: Iterable[str]) -> None:
    """Write the record for files that exist."""
    files = {name: asdict(record) for name in names if (record := measure_file(store / name)) is not None}
    write_json(store / PLAN_RECORD, with_checksum({"schema": 1, "files": files}))


def read_plan_record(root: StoreLocation) -> dict[str, FileRecord]:
    """Return the records of files by their names.

    Raises
    ------
    DamagedError
        The plan record leads out of the store or is not a regular file.
    OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError
        The plan record is missing or damaged.
    """
    path = root / PLAN_RECORD
    check_inside(root, path, MOST_JSON)
    written = path.read_bytes()
    data = json.loads(written)
    check_checksum(data, written, _KEYS)
    if data["schema"] != 1:
        raise ValueError(f"its schema is {data['schema']}")
    return {str(name): FileRecord(int(f["size"]), str(f["xxh3_128"])) for name, f in data["files"].items()}
