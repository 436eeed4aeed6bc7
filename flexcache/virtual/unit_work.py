"""Move layers of a complete store between disk and virtual, unit by unit; processes share the units."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexcache.errors import StoreError
from flexcache.progress import ProgressCallback, ignore_progress
from flexcache.store.format.ledger import UnitRecord
from flexcache.store.manage.extension_transaction import check_not_extending
from flexcache.store.manage.layer_change import Kind, LayerChange, unfinished_error
from flexcache.store.read.selection import ArrayKey
from flexcache.store.read.store import Store
from flexcache.store.storage.disk_errors import clear_errors
from flexcache.store.storage.location import local
from flexcache.store.write.election import claim_until_done, working
from flexcache.virtual.cache import PAGE, SHARE

if TYPE_CHECKING:
    from flexcache.store.write.claims import Claiming
    from flexcache.store.write.worker import Worker
    from flexcache.virtual.recomputation import Recomputation


class LayerMove(ABC):
    """A planned move of layers between disk and virtual; `Thinning` and `Filling` say which.

    Attributes
    ----------
    keys : list of (str, int)
        The arrays and layers to move.
    unfinished : bool
        True if an earlier move of the same kind was interrupted, so that this one only finishes it.
    """

    def __init__(self, path: str | Path, kind: Kind, plan: Callable[[Store], LayerChange]) -> None:
        self.path = local(path, f"flexcache {kind}")
        self._store = store = Store(self.path)
        if not store.complete:
            raise StoreError(
                "the capture is incomplete",
                where=str(self.path),
                expected=f"{store.n_units} units",
                found=f"{len(store.committed_units)} units",
                remedy="complete it first: give the command that began it again",
            )
        earlier = LayerChange.read_note(self.path)
        if earlier is not None and earlier.kind != kind:
            raise unfinished_error(earlier)
        self.unfinished = earlier is not None
        self._change = earlier or plan(store)
        self.keys: list[ArrayKey] = list(self._change.keys)

    def run(
        self, model: Any, progress: ProgressCallback = ignore_progress, *, cache_bytes: int | str = "4 GiB"
    ) -> Store:
        """Recompute the layers with the model of the capture, or its name or source, move them, and return the store.

        Parameters
        ----------
        progress
            Called with the units that are proved or written so far, and in total.
        cache_bytes
            Bytes of a temporary cache of recomputed rows.

        Raises
        ------
        MismatchError
            The model is not that of the capture, or recomputed rows differ from it. No layer has moved then.
        PlanError, CaptureError
            The disk has too little free space, or refuses. Units that are proved or written stay so.
        StoreError
            Another process fills or changes the store.
        """
        if not self.unfinished:
            self._prepare(model, progress, cache_bytes)
        self._change.run(shared=True)
        return Store(self.path)

    @abstractmethod
    def _prepare(self, model: Any, progress: ProgressCallback, cache_bytes: int | str) -> None:
        """Recompute all units, and record in the ledger what the layers have after the move."""


class UnitWork:
    """Work on each unit whose record is not *done* yet; each is claimed, so that processes share the units."""

    def __init__(self, store: Store, done: Callable[[UnitRecord], bool], work: Callable[[int], None]) -> None:
        self.store, self._done, self._work = store, done, work

    def pending(self) -> list[int]:
        """Return the units whose records are not done."""
        return [record.unit for record in self.store.ledger if not self._done(record)]

    def run(
        self, progress: ProgressCallback, begin: Callable[[Worker], Callable[[], None]] = lambda worker: lambda: None
    ) -> None:
        """Work until no unit is pending; *progress* is called with the units done so far, and in total.

        *begin* is called with this process as a worker, and returns what is called at the end.
        """
        check_not_extending(self.store.path, staged=True)
        total = self.store.n_units
        left = self.pending()
        progress(total - len(left), total)
        if not left:
            return
        with clear_errors(self.store.path), working(self.store.path) as (worker, claims):
            end = begin(worker)
            try:
                self._claim_all(worker, claims, progress)
            finally:
                end()

    def _claim_all(self, worker: Worker, claims: Claiming, progress: ProgressCallback) -> None:
        def claim() -> str | None:
            worker.sweep()
            return claims.take_claim(self.pending())

        for name in claim_until_done(claim, lambda: len(self.pending())):
            if not self._done(self.store.ledger.read_record(int(name))):
                self._work(int(name))
            claims.release(name)
            progress(self.store.n_units - len(self.pending()), self.store.n_units)


def cache_groups(attached: Recomputation, keys: Iterable[ArrayKey]) -> list[list[ArrayKey]]:
    """Divide sites and layers into groups that a walk can keep in the cache for a whole unit, from the first block up.

    The rows of a group are the starts of the next one.
    """
    groups: list[list[ArrayKey]] = [[]]
    room, filled = SHARE * attached.cache.most_bytes / 2, 0.0
    for name, layer in sorted(keys, key=lambda key: (key[1] or 0, key[0])):
        needed = attached.store.shard_rows * attached.arrays[name].row_bytes + 4 * PAGE
        if groups[-1] and filled + needed > room:
            groups.append([])
            filled = 0.0
        groups[-1].append((name, layer))
        filled += needed
    return groups
