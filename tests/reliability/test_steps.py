"""A capture is killed, or the disk fails, at every step on the file system."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch

import flexcache
from flexcache.errors import CaptureError
from tests.models import tiny
from tests.recording.test_recorder import shard_hashes
from tests.reliability.nursery import DOCUMENTS, SMALL
from tests.reliability.steps import BROKEN, FULL, Steps, counted
from tests.reliability.test_kills import Nursery

KILLS, FAULTS = 16, 24
"""Steps tried by default, spread over all of them; the marker `slow` tries every one."""
FORGIVEN = ("mkdir", "rmdir", "remove", "open")
"""Steps that may fail without harm: folders that are there, cleaning up, the trial whether writes can be direct."""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory if there is one, since hundreds of captures are flushed here."""
    memory = Path("/dev/shm")
    path = Path(mkdtemp(dir=memory)) if os.access(memory, os.W_OK) else tmp_path
    yield path
    shutil.rmtree(path)


def capture(path: Path) -> flexcache.Store:
    torch.set_num_threads(1)
    return flexcache.capture(tiny("llama"), None, DOCUMENTS[:60], path, **SMALL)


def some(count: int, wanted: int) -> list[int]:
    return sorted({round(i * (count - 1) / (wanted - 1)) for i in range(wanted)})


def committed(path: Path) -> dict[str, int]:
    """Return the times at which the files of committed units were written."""
    if not (path / "zarr.json").exists():
        return {}
    store = flexcache.open(path)
    records = [store.ledger.read_record(unit) for unit in store.committed_units.tolist()]
    return {name: (path / name).stat().st_mtime_ns for record in records for name in record.files}


def check_resumed(path: Path, whole: flexcache.Store, before: dict[str, int]) -> None:
    assert shard_hashes(path) == shard_hashes(whole.path)
    assert flexcache.verify(path).sound
    store = flexcache.open(path)
    assert store.complete
    assert list(store.ledger) == list(whole.ledger)
    assert {name: (path / name).stat().st_mtime_ns for name in before} == before, "a committed unit was written again"


def test_a_capture_killed_while_the_corpus_is_planned_resumes_to_the_same_bytes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEGMENTS", "1")
    nursery, path, growing = Nursery(folder / "none.zarr", folder / "log"), folder / "run.zarr", 0
    nursery.step(-1, folder / "whole.zarr")
    whole = flexcache.open(folder / "whole.zarr")
    for at in some(len((folder / "whole.zarr.steps").read_text().split()), KILLS // 2):
        nursery.step(at, path)
        before = committed(path)
        if (path / "zarr.json").exists():
            assert flexcache.verify(path).sound, f"killed before step {at}"
            growing += flexcache.open(path).growing
        nursery.step(-1, path)
        check_resumed(path, whole, before)
        for table in ("documents.parquet", "sequences.parquet"):
            assert (path / table).read_bytes() == (whole.path / table).read_bytes()
        shutil.rmtree(path)
    nursery.close()
    assert growing > 2, "the plan was whole whenever a process was killed"


def killed_at(folder: Path, wanted: int | None) -> dict[str, int]:
    whole = capture(folder / "whole.zarr")
    nursery = Nursery(folder / "none.zarr", folder / "log")
    nursery.step(-1, folder / "counted.zarr")
    steps = (folder / "counted.zarr.steps").read_text().split()
    found = {"kills": 0, "units kept": 0}
    for at in range(len(steps)) if wanted is None else some(len(steps), wanted):
        path = folder / "run.zarr"
        nursery.step(at, path)
        assert not Path(f"{path}.steps").exists(), "it was not killed"
        before = committed(path)
        if before:
            assert flexcache.verify(path).sound, f"killed before step {at}, {steps[at]}"
        nursery.step(-1, path)
        check_resumed(path, whole, before)
        found["kills"] += 1
        found["units kept"] += len(before) // 2
        shutil.rmtree(path)
        Path(f"{path}.steps").unlink()
    nursery.close()
    return found


def refused_at(folder: Path, wanted: int | None) -> dict[str, int]:
    whole = capture(folder / "whole.zarr")
    with counted(Steps(folder)) as all_steps:
        capture(folder / "counted.zarr")
    found = {"faults": 0, "errors": 0}
    for number, at in enumerate(range(len(all_steps.taken)) if wanted is None else some(len(all_steps.taken), wanted)):
        path = folder / "run.zarr"
        error, steps = "", Steps(folder, at, (FULL, BROKEN)[number % 2])
        try:
            with counted(steps):
                capture(path)
        except CaptureError as raised:  # any other error is not clear
            error = str(raised)
        assert "run the same command again" in error or at >= len(steps.taken) or steps.taken[at] in FORGIVEN
        before = committed(path)
        if before:
            assert flexcache.verify(path).sound
        capture(path)
        check_resumed(path, whole, before)
        found["faults"] += 1
        found["errors"] += bool(error)
        shutil.rmtree(path)
    return found


def test_a_capture_killed_at_any_step_resumes_to_the_same_bytes_and_recomputes_no_committed_unit(
    folder: Path,
) -> None:
    found = killed_at(folder, KILLS)
    assert found["units kept"] > KILLS / 2


def test_a_disk_that_refuses_any_step_raises_one_clear_error_and_loses_nothing(folder: Path) -> None:
    found = refused_at(folder, FAULTS)
    assert found["errors"] > FAULTS / 2


@pytest.mark.slow
def test_every_step(folder: Path) -> None:
    for trial in (killed_at, refused_at):
        (folder / trial.__name__).mkdir()
        found: dict[str, Any] = trial(folder / trial.__name__, None)
        assert max(found.values()) > 150
