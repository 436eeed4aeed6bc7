"""Share the work on a store among processes: each claims a part, and waits while others hold the rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from flexcache.store.storage.backend import disk_path
from flexcache.store.storage.location import StoreLocation
from flexcache.store.write.claims import Claiming, Claims
from flexcache.store.write.object_worker import ObjectClaims, ObjectWorker
from flexcache.store.write.object_writer import ObjectWriter
from flexcache.store.write.shard_file import WriterThread
from flexcache.store.write.shard_writer import Writer
from flexcache.store.write.slabs import SlabPool
from flexcache.store.write.worker import HEARTBEAT_TIMEOUT, Worker

POLL = 0.2
"""Seconds between two attempts to claim what other processes hold."""
T = TypeVar("T")


class working:  # noqa: N801  # used as a context manager, like contextlib.closing
    """Start a worker on the store at *root* with its claims, and release and close both at the end.

    If *finished* then returns True, stale claims of other workers are removed as well. Other workers can read the
    *conditions* of its forwards. This is no generator: one that is abandoned would release its claims when it is
    garbage collected, although its writer thread still writes.
    """

    def __init__(
        self,
        root: StoreLocation,
        finished: Callable[[], bool] = lambda: False,
        heartbeat_timeout: float = HEARTBEAT_TIMEOUT,
        conditions: dict[str, Any] | None = None,
    ) -> None:
        self._root, self._finished = root, finished
        self._heartbeat_timeout, self._conditions = heartbeat_timeout, conditions

    def __enter__(self) -> tuple[Worker, Claiming]:
        kind = ObjectWorker if disk_path(self._root) is None else Worker
        worker = kind(self._root, self._conditions, self._heartbeat_timeout)
        claims: Claiming = ObjectClaims(worker) if isinstance(worker, ObjectWorker) else Claims(worker)
        self._opened = worker, claims
        return self._opened

    def __exit__(self, *raised: object) -> None:
        worker, claims = self._opened
        try:
            claims.close(self._finished())
            worker.sweep()
        finally:
            worker.close()


def start_writer(worker: Worker, pool: SlabPool) -> WriterThread:
    """Start the writer of a worker."""
    return ObjectWriter(worker, pool) if isinstance(worker, ObjectWorker) else Writer(worker, pool)


def claim_until_done(
    claim: Callable[[], T | None], left: Callable[[], int], on_wait: Callable[[int], None] = lambda left: None
) -> Iterator[T]:
    """Yield what *claim* returns until nothing is *left*; poll while other processes hold the rest.

    The claims of a process that ends are free for the others, so the loop ends only when all work is done. *on_wait* is
    called with the number of parts left before each pause.
    """
    while True:
        claimed = claim()
        if claimed is not None:
            yield claimed
        elif count := left():
            on_wait(count)
            time.sleep(POLL)
        else:
            return


def elect(
    worker: Worker,
    claims: Claiming,
    name: str,
    done: Callable[[], bool],
    on_wait: Callable[[], None] = lambda: None,
) -> bool:
    """Return True if this process holds claim *name* and must do the work; False once another process has *done* it.

    The claim is kept until the caller releases it or closes *claims*.
    """

    def claim() -> str | None:
        worker.sweep()
        return None if done() else claims.take_claim([name])

    for _ in claim_until_done(claim, lambda: not done(), lambda left: on_wait()):
        return not done()
    return False
