"""Every command that creates or changes a store is killed and fails at its steps on the file system."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp

import pytest

from flexcache.errors import FlexCacheError
from tests.reliability.commands import COMMANDS, make_base
from tests.reliability.forked import fork
from tests.reliability.steps import BROKEN, FULL, killed
from tests.reliability.trial import Trial

TRIES = 3
"""Steps tried of each command by default, for each disturbance; the marker `slow` tries every one."""


@pytest.fixture(scope="module")
def base() -> Iterator[Path]:
    """A store in memory if there is room, since its copies are flushed hundreds of times."""
    memory = Path("/dev/shm")
    folder = Path(mkdtemp(dir=memory if os.access(memory, os.W_OK) else None))
    yield make_base(folder / "base.zarr")
    shutil.rmtree(folder)


@pytest.mark.parametrize("tries", [TRIES, pytest.param(10**6, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", list(COMMANDS))
def test_a_command_killed_or_refused_at_any_step_loses_nothing_and_resumes_to_the_same_bytes(
    name: str, tries: int, base: Path
) -> None:
    trial = Trial(name, base, base.with_name("work"))
    count = min(tries, len(trial.steps))
    for number in range(count):
        at = round((number + 0.5) * len(trial.steps) / count)
        for how in (killed, FULL, BROKEN):
            result = trial.disturb(at, how)
            place = f"{name}, step {at} of {len(trial.steps)}, {how}: {result}"
            assert result.clear, place
            assert not result.lost, place
            assert result.outcome.killed or how is not killed or at >= len(trial.steps), place
            assert not result.outcome.error or "run the same command again" in result.outcome.error, place


@pytest.mark.parametrize("name", ["capture", "copy"])
def test_a_process_without_permission_to_delete_does_not_wait_for_itself(name: str, base: Path) -> None:
    """A claim that a process could not release must not look like that of another live process when it starts again."""
    folder, command = base.with_name("work"), COMMANDS[name]
    for at, step in enumerate(Trial(name, base, folder).steps):
        if step == "remove":
            folder.mkdir()
            command.prepare(base, folder)

            def twice() -> None:
                with contextlib.suppress(FlexCacheError):
                    command.run(folder)
                shutil.rmtree(folder / command.target, ignore_errors=True)
                command.run(folder)

            outcome = fork(twice, folder, at, BROKEN)
            assert not outcome.error + outcome.failure, outcome
            shutil.rmtree(folder)
