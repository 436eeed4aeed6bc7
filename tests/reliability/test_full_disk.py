"""Full disks and file size limits that are real, not injected."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp

import pytest

import flexcache
from flexcache.errors import CaptureError, PlanError
from flexcache.recording.run.recorder import Recorder
from tests.reliability.test_steps import capture, check_resumed, committed

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 8 MiB in memory; only root may mount it."""
    place = Path(mkdtemp(prefix="flexcache-disk-"))
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        place.rmdir()
        pytest.skip(f"no file system can be mounted: {mounted.stderr.decode().strip()[:80]}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)  # files of the store may still be mapped
    place.rmdir()


@pytest.mark.parametrize("room", [0, 4096, 20_000, 60_000])
def test_a_full_disk_raises_one_error_and_the_run_resumes_with_free_space(
    room: int, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process fills the disk except *room* bytes when the second unit begins."""
    whole = capture(tmp_path / "whole.zarr")
    path, ballast, begin = small_disk / "run.zarr", small_disk / "ballast", Recorder.begin_unit

    def filled(self: Recorder, unit: int) -> object:
        if unit == 1:
            with ballast.open("wb") as file:
                file.write(bytes(shutil.disk_usage(small_disk).free - room))
        return begin(self, unit)

    monkeypatch.setattr(Recorder, "begin_unit", filled)
    with pytest.raises(CaptureError) as refused:
        capture(path)
    assert "the disk is full" in str(refused.value)
    assert "make room" in str(refused.value)
    monkeypatch.setattr(Recorder, "begin_unit", begin)
    before = committed(path)
    assert before, "the first unit was committed"
    with pytest.raises((CaptureError, PlanError)):
        capture(path)
    assert committed(path) == before
    assert flexcache.verify(path).sound
    ballast.unlink()
    capture(path)
    check_resumed(path, whole, before)


def test_a_file_size_limit_raises_one_error_and_the_run_resumes_without_it(tmp_path: Path) -> None:
    whole = capture(tmp_path / "whole.zarr")
    path = tmp_path / "run.zarr"
    largest = max(file.stat().st_size for file in (whole.path / "resid_post").rglob("0") if file.is_file())
    code = f"""
import resource, signal, sys
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from tests.reliability.test_steps import capture
from flexcache.errors import CaptureError, PlanError
from flexcache.recording.run.recorder import Recorder
resource.setrlimit(resource.RLIMIT_FSIZE, ({largest // 2}, {largest // 2}))
try:
    capture(Path({str(path)!r}))
except CaptureError as error:
    print("refused:", str(error).splitlines()[0])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "refused: the disk refused a write" in done.stdout
    before = committed(path)
    capture(path)
    check_resumed(path, whole, before)
