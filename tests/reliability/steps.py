"""Count the steps of a process on the file system, so that it can be killed or fail at any of them."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EVENTS = {
    "open": "open",
    "os.rename": "rename",
    "os.link": "link",
    "os.remove": "remove",
    "os.mkdir": "mkdir",
    "os.rmdir": "rmdir",
}
CALLS = ("pwrite", "fsync", "ftruncate", "copy_file_range")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Steps:
    """Counter of steps below a folder; calls *act* with the name of step *at* before it happens."""

    def __init__(self, root: Path, at: int = -1, act: Callable[[str], None] = lambda name: None) -> None:
        self.root, self.at, self.act = str(root), at, act
        self.taken: list[str] = []
        self._paths: dict[int, str] = {}

    def step(self, name: str) -> None:
        number = len(self.taken)
        self.taken.append(name)
        if number == self.at:
            self.act(name)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        path = arguments[0]
        if isinstance(path, bytes | str | os.PathLike) and os.fspath(path).startswith(self.root):  # type: ignore[arg-type]
            reads = event == "open" and not (arguments[2] or 0) & WRITING
            if not reads:
                self.step(EVENTS[event])


_current: list[Steps] = []
_hooked: list[bool] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _current and event in EVENTS:
        _current[0].audit(event, arguments)


@contextmanager
def counted(steps: Steps) -> Iterator[Steps]:
    """Count the steps of this process while open. The audit hook stays, since it cannot be removed."""
    if not _hooked:
        sys.addaudithook(_audit)
        _hooked.append(True)
    originals = {name: getattr(os, name) for name in CALLS}

    def wrapped(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            steps.step(name)
            return originals[name](*arguments)

        return call

    _current[:] = [steps]
    for name in CALLS:
        setattr(os, name, wrapped(name))
    try:
        yield steps
    finally:
        _current.clear()
        for name, original in originals.items():
            setattr(os, name, original)


def killed(name: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refused(number: int) -> Callable[[str], None]:
    """Return an act that raises an error of the operating system."""

    def act(name: str) -> None:
        raise OSError(number, os.strerror(number))

    return act


FULL, BROKEN = refused(errno.ENOSPC), refused(errno.EIO)
