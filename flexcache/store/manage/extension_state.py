"""State of an extension, for commands that must not run while one is staged or being committed."""

from __future__ import annotations

from flexcache.errors import StoreError
from flexcache.store.format.extension import committing_folder, staged_folder
from flexcache.store.format.ledger import FileRecord, Ledger, UnitRecord
from flexcache.store.manage.store_contents import plan_files
from flexcache.store.read.store import Store
from flexcache.store.storage.location import StoreLocation, parse_location


def check_not_extending(path: str | StoreLocation, staged: bool = False) -> None:
    """Raise StoreError if an extension is being committed to a store or, with *staged*, if one is staged at all."""
    found = parse_location(path)
    committing = committing_folder(found) is not None
    if committing or (staged and staged_folder(found) is not None):
        raise StoreError(
            "the store has an unfinished extension",
            where=str(path),
            remedy="finish it with the flexcache extend command that began it"
            + ("" if committing else ", or drop it with flexcache extend --discard"),
        )


def staged_records(path: StoreLocation) -> tuple[dict[str, FileRecord], dict[int, UnitRecord]]:
    """Return the records of an extension that is being committed, of files by name and of units by number."""
    folder = committing_folder(path)
    if folder is None:
        return {}, {}
    ledger = Ledger(folder)
    return plan_files(Store(folder)), {unit: ledger.read_record(unit) for unit in ledger.units()}


def incomplete(store: Store) -> StoreError:
    """Return the error for a store that cannot be extended because units are missing."""
    return StoreError(
        "the store is not complete, so it cannot be extended",
        where=str(store.path),
        found=f"{len(store.committed_units)} of {store.n_units} units committed",
        remedy="complete it first, with the capture that began it",
    )
