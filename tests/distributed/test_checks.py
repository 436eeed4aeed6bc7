"""One launch for each world size, by the first of pytest's workers; its checks are told apart here."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.distributed.registry import checks

ROOT = Path(__file__).parents[2]


@cache
def results_of(world: int, slow: bool, shared: Path) -> dict[str, list[str]]:
    """Return, by check, what each rank says of it; launched once, other workers wait for it."""
    told = shared / f"distributed-{world}-{slow}.json"
    with told.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not told.exists():
            told.write_text(json.dumps(launch(world, slow)))
    return json.loads(told.read_text())


def launch(world: int, slow: bool) -> dict[str, list[str]]:
    with TemporaryDirectory() as folder:
        run = subprocess.run(
            [sys.executable, "-m", "tests.distributed.worker", folder, str(world), *["--slow"][: int(slow)]],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"},
            capture_output=True,
            text=True,
            timeout=900,
        )
        found = [Path(folder) / f"{rank}.json" for rank in range(world)]
        told = [json.loads(path.read_text()) if path.exists() else {} for path in found]
    tail = run.stderr[-4000:]
    return {name: [ranks.get(name, f"did not finish\n{tail}") for ranks in told] for name in checks(world, slow)}


def check_results(world: int, name: str, slow: bool, factory: pytest.TempPathFactory) -> None:
    base = factory.getbasetemp()
    results = results_of(world, slow, base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)[name]
    if all(result.startswith("skipped") for result in results):
        pytest.skip(results[0])
    failed = {f"rank {rank}": result for rank, result in enumerate(results) if result != "passed"}
    assert not failed, "\n\n".join(f"{rank}:\n{result}" for rank, result in failed.items())


@pytest.mark.parametrize(("world", "name"), [(world, name) for world in (2, 3, 4) for name in sorted(checks(world))])
def test_check(world: int, name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    check_results(world, name, False, tmp_path_factory)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(checks(2, slow=True)))
def test_a_check_that_compiles(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """DeepSpeed (`pip install '.[deepspeed]'`) compiles its communication kernel when it is first used."""
    check_results(2, name, True, tmp_path_factory)
