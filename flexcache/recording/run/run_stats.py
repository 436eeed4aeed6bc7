"""Where the time of a recording went, kept in the store's run log."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime

from flexcache.errors import UnreachableError
from flexcache.store.storage.atomic_files import write_json
from flexcache.store.storage.location import Place


@dataclass
class RunStats:
    """Where the time of a recording went, in seconds, and what came of it."""

    began: float = field(default_factory=time.perf_counter)
    units: int = 0
    rows: int = 0
    tokens: int = 0
    bytes: int = 0
    forward: float = 0.0
    copying: float = 0.0
    waiting: float = 0.0
    writing: float = 0.0
    claiming: float = 0.0
    committing: float = 0.0

    def write(self, root: Place, error: BaseException | None, direct: bool) -> None:
        """Write the run log of a store; it is not part of the content, and a failed run keeps its own error."""
        seconds = time.perf_counter() - self.began
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
        outcome = "finished" if error is None else f"{type(error).__name__}: {error}".splitlines()[0]
        figures = {name: round(value, 3) for name, value in vars(self).items() if name != "began"}
        try:
            (root / "runs").mkdir(exist_ok=True)
            write_json(
                root / "runs" / f"{stamp}-{os.getpid()}.json",
                {
                    "host": socket.gethostname(),
                    "outcome": outcome,
                    "seconds": round(seconds, 3),
                    "direct_io": direct,
                    **figures,
                },
            )
        except (OSError, UnreachableError):
            if error is None:
                raise
