"""Share the work on a store among processes: each claims a part, and waits while others hold the rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@contextmanager
def working(
    root: StoreLocation,
    finished: Callable[[], bool] = lambda: False,
    heartbeat_timeout: float = HEARTBEAT_TIMEOUT,
    conditions: dict[str, Any] | None = None,
) -> Iterator[tuple[Worker, Claiming]]:
    """Start a worker on the store at *root* with its claims, and release and close both at the end.

    If *finished* then returns True, stale claims of other workers are removed as well. Other workers can read the
    *conditions* of its forwards.
    """
    kind = ObjectWorker if disk_path(root) is None else Worker
    worker = kind(root, conditions, heartbeat_timeout)
    claims = ObjectClaims(worker) if isinstance(worker, ObjectWorker) else Claims(worker)
    try:
        yield worker, claims
    finally:
        try:
            claims.close(finished())
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
