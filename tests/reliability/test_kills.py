from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import pytest
import torch

import flexcache
from flexcache.store.write.worker import describe
from tests.recording.test_recorder import shard_hashes
from tests.reliability.nursery import capture

ROOT = Path(__file__).parents[2]
KILLS, PROCESSES, SECONDS = 50, 3, 240


class Nursery:
    """Processes that capture into one store, forked by `tests.reliability.nursery`."""

    def __init__(self, path: Path, log: Path) -> None:
        self.log = log
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.reliability.nursery", str(path), str(log)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._read() == "ready"

    def start(self, heartbeat_timeout: str = "") -> int:
        assert self._process.stdin is not None
        self._process.stdin.write(f"start {heartbeat_timeout}\n")
        self._process.stdin.flush()
        return int(self._read())

    def step(self, at: int, path: Path) -> None:
        """Run a small capture that is killed at a step, and wait for its end."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"step {at} {path}\n")
        self._process.stdin.flush()
        pid = int(self._read())
        while self.alive(pid):
            time.sleep(0.005)

    def alive(self, pid: int) -> bool:
        with contextlib.suppress(OSError):
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
        return False

    def close(self) -> None:
        self._process.communicate()

    def errors(self) -> str:
        return "\n".join(path.read_text() for path in self.log.parent.glob(f"{self.log.name}.*.error"))

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> flexcache.Store:
    torch.set_num_threads(1)
    return capture(str(tmp_path_factory.mktemp("whole") / "run.zarr"))


def check(path: Path, undisturbed: flexcache.Store, killed: Collection[int] = ()) -> None:
    """Check that the store is as without kills; only processes killed while closing may leave files in progress."""
    store = flexcache.open(path)
    assert store.complete
    assert shard_hashes(path) == shard_hashes(undisturbed.path)
    assert [store.ledger.read_record(unit) for unit in range(store.n_units)] == [
        undisturbed.ledger.read_record(unit) for unit in range(store.n_units)
    ]
    assert flexcache.verify(path).sound
    left = [*path.glob(".claims/*"), *path.glob(".partial/*/alive")]
    assert {describe(file)["pid"] for file in left} <= set(killed)


def test_fifty_kills_and_restarts_of_three_processes_lose_and_change_nothing(
    undisturbed: flexcache.Store, tmp_path: Path
) -> None:
    """At most one unit per kill is computed twice, and the final store is that of one process."""
    dice, kills, began = random.Random(4), 0, time.monotonic()
    for run in range(1000):
        path, log = tmp_path / f"{run}.zarr", tmp_path / f"{run}.log"
        nursery = Nursery(path, log)
        killed, last = Counter[int](), 0
        running: list[int] = []
        while not (path.exists() and flexcache.open(path).complete) and not nursery.errors():
            running = [pid for pid in running if nursery.alive(pid)]
            if kills < KILLS and len(running) == PROCESSES:
                time.sleep(dice.uniform(0.0, 0.15))
                victim = running.pop(dice.randrange(PROCESSES))
                if nursery.alive(victim):
                    os.kill(victim, signal.SIGKILL)
                    killed[victim] += 1
                    kills += 1
            while len(running) < PROCESSES:
                running.append(nursery.start())
            assert time.monotonic() - began < SECONDS
        while any(nursery.alive(pid) for pid in running):
            time.sleep(0.02)
        assert not nursery.errors(), nursery.errors()
        nursery.close()
        check(path, undisturbed, killed)
        begun = [tuple(map(int, line.split())) for line in log.read_text().splitlines()]
        again = len(begun) - undisturbed.n_units
        assert {unit for unit, _ in begun} == set(range(undisturbed.n_units))
        print(f"{sum(killed.values())} kills, {again} units computed again, {undisturbed.n_units} units")
        assert again <= sum(killed.values()), f"{again} units computed again after {sum(killed.values())} kills"
        last = max(Counter(pid for _, pid in begun).values())
        assert last < undisturbed.n_units or not killed, "one process did it all"
        if kills >= KILLS:
            return
    pytest.fail("captures ended before the kills were done")


@pytest.mark.parametrize(
    "processes", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)]
)
def test_several_processes_write_the_bytes_of_one(processes: int, undisturbed: flexcache.Store, tmp_path: Path) -> None:
    path, log = tmp_path / "run.zarr", tmp_path / "log"
    nursery = Nursery(path, log)
    running = [nursery.start() for _ in range(processes)]
    while any(nursery.alive(pid) for pid in running):
        time.sleep(0.02)
    assert not nursery.errors(), nursery.errors()
    nursery.close()
    check(path, undisturbed)
    assert len(log.read_text().splitlines()) == undisturbed.n_units


def test_three_processes_killed_while_the_corpus_is_planned_write_the_bytes_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever process plans, another takes over; units of planned segments are captured meanwhile."""
    monkeypatch.setenv("SEGMENTS", "1")
    dice, whole, path = random.Random(7), tmp_path / "whole.zarr", tmp_path / "run.zarr"
    one = Nursery(whole, tmp_path / "one.log")
    alone = one.start()
    while one.alive(alone):
        time.sleep(0.02)
    assert not one.errors(), one.errors()
    one.close()
    nursery = Nursery(path, tmp_path / "log")
    running = [nursery.start() for _ in range(3)]
    killed = list[int]()
    while any(nursery.alive(pid) for pid in running):
        time.sleep(dice.uniform(0.0, 0.1))
        if len(killed) < 6 and (path / "zarr.json").exists() and flexcache.open(path).growing:
            killed.append(running.pop(dice.randrange(3)))
            os.kill(killed[-1], signal.SIGKILL)
            running.append(nursery.start())
    assert not nursery.errors(), nursery.errors()
    nursery.close()
    check(path, flexcache.open(whole), killed)
    for table in ("documents.parquet", "sequences.parquet"):
        assert (path / table).read_bytes() == (whole / table).read_bytes()
    assert len(killed) > 2, "the plan was whole before processes were killed"


def test_a_process_suspended_beyond_its_timeout_does_no_harm(undisturbed: flexcache.Store, tmp_path: Path) -> None:
    """A worker suspended for longer than the heartbeat timeout loses its unit and files, and takes another unit."""
    path, log = tmp_path / "run.zarr", tmp_path / "log"
    nursery = Nursery(path, log)
    sleeper = nursery.start("0.5")
    while not log.exists() or len(log.read_text().splitlines()) < 3:
        time.sleep(0.002)
    os.kill(sleeper, signal.SIGSTOP)
    held = log.read_text().splitlines()[-1].split()[0]
    committed = flexcache.open(path).committed_units.tolist()
    other = nursery.start("0.5")
    while nursery.alive(other) and str(other) not in log.read_text():
        time.sleep(0.002)
    while nursery.alive(other) and not (int(held) in flexcache.open(path).committed_units or int(held) in committed):
        time.sleep(0.01)
    os.kill(sleeper, signal.SIGCONT)
    while nursery.alive(sleeper) or nursery.alive(other):
        time.sleep(0.02)
    assert not nursery.errors(), nursery.errors()
    nursery.close()
    check(path, undisturbed)
