"""Contents of a store by its records: files, checksum of the ledger, differences from another store."""

from __future__ import annotations

from typing import Any

import xxhash

from flexcache.store.format.ledger import FileRecord, read_plan_record
from flexcache.store.format.schema import PLAN_RECORD
from flexcache.store.format.text import shorten
from flexcache.store.read.store import Store


def shared_files(store: Store) -> dict[str, FileRecord]:
    """Return the records of tables and coordinates, which all stores over one plan have in common."""
    own = {"zarr.json", "README.md", *(f"{name}/zarr.json" for name in store.arrays)}
    return {name: record for name, record in read_plan_record(store.path).items() if name not in own}


def differing_tables(one: Store, other: Store) -> list[str]:
    """Return one line of text for each table or coordinate that differs between two stores."""
    first, second = shared_files(one), shared_files(other)
    return [
        f"{name} differs ({shorten(first.get(name))} and {shorten(second.get(name))})"
        for name in sorted({*first, *second})
        if first.get(name) != second.get(name)
    ]


def ledger_digest(store: Store) -> str:
    """Return the XXH3-128 of a store's plan record and of the records of its committed units."""
    hasher = xxhash.xxh3_128((store.path / PLAN_RECORD).read_bytes())
    for unit in store.committed_units.tolist():
        hasher.update(store.ledger.path(unit).read_bytes())
    return hasher.hexdigest()


def describe_origin(store: Store) -> dict[str, Any]:
    """Return the provenance entry for a store that another store is made from."""
    return {
        "store": store.path.name,
        "ledger_xxh3_128": ledger_digest(store),
        "units_committed": len(store.committed_units),
    }
