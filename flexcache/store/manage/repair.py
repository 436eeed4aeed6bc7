"""Repair: units that a damaged file belongs to are taken back, to be computed again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flexcache.errors import StoreError
from flexcache.store.format.ledger import Ledger
from flexcache.store.manage.verify import Finding, Verification, verify
from flexcache.store.storage.location import StoreLocation, parse_location


@dataclass(frozen=True)
class Repair:
    """What `repair` did.

    Attributes
    ----------
    found : Verification
        The state before.
    units : tuple of int
        Taken back: no longer committed, so that the next capture computes these units and no others again.
    beyond : tuple of Finding
        Damage to the plan, metadata or tables, which no capture writes again.
    """

    found: Verification
    units: tuple[int, ...]
    beyond: tuple[Finding, ...]


def repair(path: str | StoreLocation, progress: Callable[[int, int], None] = lambda files, size: None) -> Repair:
    """Verify a store, and take back every unit of which a file or the record is damaged.

    Only ledger records of damaged units are removed. Their files are replaced when the unit is computed again, by the
    same capture as before; until then readers count these units as not there.

    Parameters
    ----------
    progress
        Called with the files and bytes checked so far.

    Raises
    ------
    StoreError
        The path is no store at all, or a record cannot be removed.
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
