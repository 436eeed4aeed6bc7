"""Cache the committed units of a store, as of the last listing of its ledger."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from flexcache.errors import UncommittedError
from flexcache.store.format.ledger import Ledger
from flexcache.store.format.reference import StoreReference
from flexcache.store.storage.location import StoreLocation


class CommittedUnits:
    """The committed units of a store; the ledger is listed at the first use, and by `refresh`.

    *check* is called before the first listing; it raises an error if another store is at the path.
    """

    def __init__(self, path: StoreLocation, n_units: int, check: Callable[[], None] | None = None) -> None:
        self.path, self.n_units = path, n_units
        self.ledger = Ledger(path)
        self._check = check
        self._mask: np.ndarray | None = None

    @property
    def mask(self) -> np.ndarray:
        """Mask of the committed units, bool of shape (units,)."""
        if self._mask is None:
            self.refresh()
        assert self._mask is not None
        return self._mask

    def refresh(self) -> None:
        """List the ledger."""
        if self._check is not None:
            self._check()
            self._check = None
        mask = np.zeros(self.n_units, dtype=bool)
        mask[np.array([unit for unit in self.ledger.units() if unit < self.n_units], dtype=np.int64)] = True
        self._mask = mask

    def require(self, units: np.ndarray) -> None:
        """Raise UncommittedError if one of these units is not committed, even after listing the ledger again."""
        if self.mask[units].all():
            return
        self.refresh()
        missing = units[~self.mask[units]]
        if len(missing):
            raise UncommittedError(
                f"{len(missing)} of the units to be read are not committed, the first is unit {missing[0]}",
                where=str(self.path),
                expected="committed units",
                found=f"{np.count_nonzero(self.mask)} of {self.n_units} units are committed",
                remedy="run the same capture again to complete the store, or read store.committed_rows only"
                " (store.dataset(committed=True))",
            )


@lru_cache(maxsize=32)
def shared_units(reference: StoreReference) -> CommittedUnits:
    """Return the committed units of an unpickled store, one object for all its readers in a process.

    Nothing is read yet, since a scheduler unpickles tasks too and may not reach the store.
    """
    return CommittedUnits(reference.path, reference.n_units, reference.check)
