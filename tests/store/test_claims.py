from __future__ import annotations

import errno
import gc
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from flexcache.store.write.claims import CLAIMS, Claims
from flexcache.store.write.election import working
from flexcache.store.write.worker import ALIVE, PARTIAL, Worker, describe

ROOT = Path(__file__).parents[2]
CLAIM_AND_WAIT = """
import sys, time
from pathlib import Path
from flexcache.store.write.claims import Claims
from flexcache.store.write.worker import Worker
worker = Worker(Path(sys.argv[1]), {"threads": 3})
print(Claims(worker).take_claim(range(3)), flush=True)
time.sleep(600)
"""


def claimer(folder: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", CLAIM_AND_WAIT, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "0"
    return process


def test_claims_of_abandoned_work_stay_until_its_process_ends(tmp_path: Path) -> None:
    work = working(tmp_path)
    worker, claims = work.__enter__()
    assert claims.take_claim(range(3)) == "0"
    del work, claims
    gc.collect()
    assert len([*(tmp_path / CLAIMS).iterdir()]) == 1
    worker.close()


def test_each_unit_is_claimed_by_exactly_one_of_many_workers(tmp_path: Path) -> None:
    workers = [Worker(tmp_path) for _ in range(6)]
    found: list[str] = []
    barrier = threading.Barrier(len(workers))

    def run(worker: Worker) -> None:
        claims = Claims(worker)
        barrier.wait()
        while (name := claims.take_claim(range(40))) is not None:
            found.append(name)

    threads = [threading.Thread(target=run, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(found) == Counter(map(str, range(40)))
    for worker in workers:
        worker.close()
    assert [path.name for path in tmp_path.iterdir()] == [CLAIMS]


def test_a_killed_process_is_gone_at_once_and_a_living_one_is_not(tmp_path: Path) -> None:
    process = claimer(tmp_path)
    worker = Worker(tmp_path, heartbeat_timeout=1e6)
    claims = Claims(worker)
    assert claims.take_claim([0]) is None
    assert [other["conditions"] for other in claims.others()] == [{"threads": 3}]
    process.send_signal(signal.SIGKILL)
    while claims.take_claim([0]) is None:  # a zombie counts as ended, so nobody waits for it
        pass
    assert (tmp_path / CLAIMS / "0.1").exists()
    assert claims.holds(0)
    assert not list(claims.others())
    worker.sweep()
    assert [path.name for path in (tmp_path / PARTIAL).iterdir()] == [worker.id]
    process.communicate()
    claims.release(0)
    assert not list((tmp_path / CLAIMS).iterdir())
    worker.close()


def from_elsewhere(folder: Path, name: str) -> Path:
    """Write the claim of a process on another machine."""
    other = folder / PARTIAL / "elsewhere" / ALIVE
    other.parent.mkdir(parents=True)
    other.write_text(json.dumps({"host": "far", "machine": "boot pid:[1]", "pid": os.getpid(), "started": "7"}))
    (folder / CLAIMS).mkdir(exist_ok=True)
    os.link(other, folder / CLAIMS / name)
    return other


def test_a_claim_from_another_machine_times_out_on_the_observers_clock(tmp_path: Path) -> None:
    other = from_elsewhere(tmp_path, "5.0")
    worker = Worker(tmp_path, heartbeat_timeout=100)
    claims, now = Claims(worker), 1000.0
    with patch("flexcache.store.write.worker.time.monotonic", lambda: now):
        assert claims.take_claim([5]) is None
        now += 99
        assert claims.take_claim([5]) is None
        os.utime(other, (1, 1))  # its clock may show any time; only changes count
        assert claims.take_claim([5]) is None
        now += 99
        worker.sweep()
        assert claims.take_claim([5]) is None
        assert other.exists()
        now += 2
        assert claims.take_claim([5]) == "5"
        worker.sweep()
        now += 101
        worker.sweep()
    assert not other.exists()
    worker.close()


def test_an_unreadable_claim_is_kept_until_it_times_out(tmp_path: Path) -> None:
    (tmp_path / CLAIMS).mkdir()
    worker = Worker(tmp_path, heartbeat_timeout=10)
    claims, now = Claims(worker), 0.0
    for content in (b"", b"{", b"[]", b"null", b'{"machine": 3, "pid": "x", "started": []}'):
        (tmp_path / CLAIMS / "1.0").write_bytes(content)
        with patch("flexcache.store.write.worker.time.monotonic", lambda: now):
            assert claims.take_claim([1]) is None
            assert all(isinstance(told, dict) for told in claims.others())
    with patch("flexcache.store.write.worker.time.monotonic", lambda: now + 11):
        assert claims.take_claim([1]) == "1"
    (tmp_path / CLAIMS / "notes.txt").touch()
    assert claims.take_claim([1]) is None
    worker.close()


def test_without_hard_links_claims_are_separate_files_with_a_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    first, second = Worker(tmp_path, {"a": 1}, heartbeat_timeout=0.06), Worker(tmp_path)
    claims = Claims(first)
    assert claims.take_claim([1]) == "1"
    assert Claims(second).take_claim([1]) is None
    path = tmp_path / CLAIMS / "1.0"
    assert describe(path)["conditions"] == {"a": 1}
    before = path.stat().st_mtime_ns
    while path.stat().st_mtime_ns == before:
        pass
    claims.release(1)
    assert not first.touches
    first.close()
    second.close()


def test_a_worker_detects_that_its_folder_was_removed(tmp_path: Path) -> None:
    worker, other = Worker(tmp_path), Worker(tmp_path)
    assert not worker.lost
    claims = Claims(worker)
    assert claims.take_claim([3]) == "3"
    for path in worker.folder.iterdir():
        path.unlink()
    worker.folder.rmdir()
    assert worker.lost
    assert claims.take_claim([4]) is None
    worker.close()
    other.close()


class Machine(RuleBasedStateMachine):
    """Workers claim, finish, get suspended and resumed; their heartbeat advances only while they run."""

    @initialize()
    def start(self) -> None:
        self.folder = TemporaryDirectory()
        self.now = 0.0
        self.clock = patch("flexcache.store.write.worker.time.monotonic", lambda: self.now)
        self.clock.start()
        self.workers = [Worker(Path(self.folder.name), heartbeat_timeout=100) for _ in range(3)]
        self.claims = [Claims(worker) for worker in self.workers]
        self.asleep: set[int] = set()
        self.committed: set[str] = set()
        self.begun: list[set[str]] = [set(), set(), set()]
        self.slept: set[int] = set()
        self.ticks = 0

    @rule(who=st.integers(0, 2))
    def take(self, who: int) -> None:
        if who in self.asleep:
            return
        name = self.claims[who].take_claim(n for n in range(3) if str(n) not in self.committed)
        if name is not None:
            # a suspended worker may lose its claim, and take it again from one suspended since
            assert name not in self.begun[who] or who in self.slept
            awake = [w for w in range(3) if w != who and w not in self.asleep and w not in self.slept]
            assert not any(name in self.begun[w] for w in awake), "taken from one that was never asleep"
            self.begun[who].add(name)

    @rule(who=st.integers(0, 2))
    def finish(self, who: int) -> None:
        if who not in self.asleep and self.begun[who]:
            name = min(self.begun[who])
            self.begun[who].remove(name)
            if self.claims[who].holds(name):
                assert name not in self.committed
                self.committed.add(name)
            self.claims[who].release(name)

    @rule(who=st.integers(0, 2))
    def sleep(self, who: int) -> None:
        self.asleep.add(who)
        self.slept.add(who)

    @rule(who=st.integers(0, 2))
    def wake(self, who: int) -> None:
        self.asleep.discard(who)

    @rule(seconds=st.sampled_from([1, 60, 101]))
    def tick(self, seconds: int) -> None:
        for _ in range(seconds // 20 + 1):
            self.now += seconds / (seconds // 20 + 1)
            self.ticks += 1
            for who, worker in enumerate(self.workers):
                if who not in self.asleep:
                    os.utime(worker.alive, (self.ticks, self.ticks))
            for who, claims in enumerate(self.claims):
                if who not in self.asleep:
                    list(claims.others())

    @invariant()
    def nobody_shares_a_claim(self) -> None:
        if hasattr(self, "claims"):
            for name in map(str, range(3)):
                assert sum(claims.holds(name) for claims in self.claims) <= 1

    def teardown(self) -> None:
        if hasattr(self, "claims"):
            self.clock.stop()
            for worker in self.workers:
                worker.close()
            self.folder.cleanup()


TestClaimsInAnyOrder = Machine.TestCase
TestClaimsInAnyOrder.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_starting_worker_does_not_count_as_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder gets its final name last; others may look before that."""
    watcher, rename = Worker(tmp_path), Path.rename

    def late(self: Path, target: Path) -> Path:
        watcher.sweep()
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    worker = Worker(tmp_path)
    assert not worker.lost
    worker.close()
    watcher.close()
