"""Disturb a command by a kill or an error, check its store, then repeat the command undisturbed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flexcache.errors import FlexCacheError
from tests.reliability.commands import COMMANDS, content, lost
from tests.reliability.forked import Outcome, fork


@dataclass(frozen=True)
class Result:
    """Result of a disturbed command.

    Attributes
    ----------
    outcome, again : Outcome
        Outcomes of the disturbed command and of its repetition.
    lost : int
        Bytes that were wrong or missing after either of them.
    """

    outcome: Outcome
    again: Outcome
    lost: int

    @property
    def clear(self) -> bool:
        """True if all errors were clear to a user, and the repetition succeeded."""
        return not (self.outcome.failure or self.again.failure or self.again.error)


class Trial:
    """A command, with its result when nothing disturbs it.

    Attributes
    ----------
    steps : list of str
        Steps of the command on the file system.
    seconds : float
        Duration of the command.
    """

    def __init__(self, name: str, base: Path, folder: Path) -> None:
        self.command, self._base, self._folder = COMMANDS[name], base, folder
        self._repairs = name == "repair"
        self._prepare()
        undisturbed = fork(self._run, folder)
        assert not undisturbed.error + undisturbed.failure, undisturbed
        self.steps, self.seconds = undisturbed.steps, undisturbed.seconds
        self._whole, self._sources = content(folder / self.command.target), self._read()
        shutil.rmtree(folder)

    def disturb(
        self, at: int = -1, how: Callable[[str], None] = lambda name: None, kill_after: float | None = None
    ) -> Result:
        """Run the command with *how* at its step *at*, or kill it after *kill_after* seconds; then run it again."""
        self._prepare()
        target = self._folder / self.command.target
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
        self.command.prepare(self._base, self._folder)

    def _run(self) -> None:
        self.command.run(self._folder)

    def _run_on(self) -> None:
        """Run the command, and again in the same process if it failed."""
        try:
            self._run()
        except FlexCacheError:
            self._run()
            raise

    def _read(self) -> dict[str, dict[str, str]]:
        return {path.name: content(path) for path in self._folder.glob(self.command.source)}
