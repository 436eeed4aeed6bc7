"""An act that is killed or refused at a step, or killed at a moment; looked at, and then done again undisturbed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flexcache.errors import FlexCacheError
from tests.reliability.acts import ACTS, content, lost
from tests.reliability.forked import Outcome, fork


@dataclass(frozen=True)
class Result:
    """What came of a disturbance.

    Attributes
    ----------
    outcome, again : Outcome
        Of the act that was disturbed, and of the same one after it.
    lost : int
        Bytes that were wrong or missing after the one or the other.
    """

    outcome: Outcome
    again: Outcome
    lost: int

    @property
    def clear(self) -> bool:
        """Whether every error was one that a user understands, and the act came to its end."""
        return not (self.outcome.failure or self.again.failure or self.again.error)


class Trial:
    """An act, with what it comes to when nobody disturbs it.

    Attributes
    ----------
    steps : list of str
        That it takes on the file system.
    seconds : float
        That it takes.
    """

    def __init__(self, name: str, base: Path, folder: Path) -> None:
        self.act, self._base, self._folder = ACTS[name], base, folder
        self._repairs = name == "repair"
        self._prepare()
        undisturbed = fork(self._run, folder)
        assert not undisturbed.error + undisturbed.failure, undisturbed
        self.steps, self.seconds = undisturbed.steps, undisturbed.seconds
        self._whole, self._sources = content(folder / self.act.target), self._read()
        shutil.rmtree(folder)

    def disturb(
        self, at: int = -1, how: Callable[[str], None] = lambda name: None, kill_after: float | None = None
    ) -> Result:
        """Do the act with *how* at its step *at*, or killed *kill_after* seconds; then do it again."""
        self._prepare()
        target = self._folder / self.act.target
        outcome = fork(self._run_on, self._folder, at, how, kill_after)
        gone = 0 if self._repairs else lost(target)
        again = fork(self._run, self._folder)
        found = content(target)
        gone += sum(
            (target / name).stat().st_size if (target / name).exists() else 1
            for name in {*found, *self._whole}
            if found.get(name) != self._whole.get(name)
        )
        gone += lost(target) + (self._read() != self._sources)
        shutil.rmtree(self._folder)
        return Result(outcome, again, gone)

    def _prepare(self) -> None:
        self._folder.mkdir()
        self.act.prepare(self._base, self._folder)

    def _run(self) -> None:
        self.act.run(self._folder)

    def _run_on(self) -> None:
        """Do it, and once more in the same process where it was refused."""
        try:
            self._run()
        except FlexCacheError:
            self._run()
            raise

    def _read(self) -> dict[str, dict[str, str]]:
        return {path.name: content(path) for path in self._folder.glob(self.act.source)}
