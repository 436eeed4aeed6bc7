"""Run a function in a forked process, which can be killed or fail at any of its steps."""

from __future__ import annotations

import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

from flexcache.errors import FlexCacheError
from tests.reliability.steps import Steps, counted

LONGEST = 60.0
"""Seconds after which a forked process counts as hanging."""


@dataclass(frozen=True)
class Outcome:
    """Result of a forked process.

    Attributes
    ----------
    killed : bool
    error : str
        Text of a FlexCacheError.
    failure : str
        Traceback of any other exception.
    steps : list of str
        Steps on the file system, if it was not killed.
    seconds : float
    """

    killed: bool
    error: str
    failure: str
    steps: list[str]
    seconds: float


def fork(
    call: Callable[[], object],
    root: Path,
    at: int = -1,
    act: Callable[[str], None] = lambda name: None,
    kill_after: float | None = None,
) -> Outcome:
    """Run *call* with *act* at its step *at* below *root*, or kill it after *kill_after* seconds."""
    with TemporaryFile("w+") as told, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads, which are not used after it
        began = time.perf_counter()
        pid = os.fork()
        if pid == 0:
            _child(call, Steps(root, at, act), told.fileno())
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(pid, signal.SIGKILL)
        status = _wait(pid, began)
        seconds = time.perf_counter() - began
        told.seek(0)
        steps, error, failure = (told.read() or "\0\0").split("\0")
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return Outcome(True, "", "", [], seconds)
    return Outcome(False, error, failure, steps.split(), seconds)


def _child(call: Callable[[], object], steps: Steps, told: int) -> None:
    error = failure = ""
    try:
        with counted(steps):
            call()
    except FlexCacheError as raised:
        error = str(raised)
    except BaseException:
        failure = traceback.format_exc()
    os.write(told, f"{' '.join(steps.taken)}\0{error}\0{failure}".encode())
    os._exit(0)


def _wait(pid: int, began: float) -> int:
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status
        if time.perf_counter() - began > LONGEST:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise TimeoutError(f"a forked process did not end within {LONGEST:.0f} s")
        time.sleep(0.001)
