"""Share work among processes: each claims a part, and waits while others hold the rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from flexcache.store.write.backends import AnyWorker
from flexcache.store.write.claims import Claiming

POLL = 0.1
"""Seconds between two attempts to claim what other processes hold."""

T = TypeVar("T")


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
