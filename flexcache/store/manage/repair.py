"""Repair a store: take damaged units back, so that a capture recomputes them."""

from __future__ import annotations

from dataclasses import dataclass

from flexcache.errors import StoreError
from flexcache.progress import ProgressCallback, ignore_progress
from flexcache.store.format.ledger import Ledger
from flexcache.store.manage.verify import Finding, Verification, verify
from flexcache.store.storage.location import StoreLocation, parse_location


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
