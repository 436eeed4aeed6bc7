"""Share work among processes: each claims a part, and waits while others hold the rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from flexcache.store.storage.location import StoreLocation
from flexcache.store.write.backends import AnyWorker, claims_of, start_work
from flexcache.store.write.claims import Claiming
from flexcache.store.write.worker import HEARTBEAT_TIMEOUT

POLL = 0.2
"""Seconds between two attempts to claim what other processes hold."""

T = TypeVar("T")


@contextmanager
def working(
    root: StoreLocation, finished: Callable[[], bool] = lambda: False, heartbeat_timeout: float = HEARTBEAT_TIMEOUT
) -> Iterator[tuple[AnyWorker, Claiming]]:
    """Start a worker on the store at *root* with its claims, and release and close both at the end.

    Parameters
    ----------
    finished
        Called at the end; if it returns True, stale claims of other workers are removed as well.
    """
    worker = start_work(root, heartbeat_timeout=heartbeat_timeout)
    claims = claims_of(worker)
    try:
        yield worker, claims
    finally:
        try:
            claims.close(finished())
            worker.sweep()
        finally:
            worker.close()


def claim_until_done(
    claim: Callable[[], T | None], left: Callable[[], int], on_wait: Callable[[int], None] = lambda left: None
) -> Iterator[T]:
    """Yield what *claim* returns until nothing is *left*; poll while other processes hold the rest.

    The claims of a process that ends are free for the others, so the loop ends only when all work is done.

    Parameters
    ----------
    on_wait
        Called with the number of parts left before each pause.
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
    worker: AnyWorker,
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
