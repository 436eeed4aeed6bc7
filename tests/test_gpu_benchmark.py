"""The proof for a GPU runs on a CPU as well, where only the device differs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.gpu_measures import shared_time

ROOT = Path(__file__).parents[1]


def test_every_part_passes_on_a_cpu_and_says_what_it_measured(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--dtype", "float32", "--quick", "--folder", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments, "--json", str(tmp_path / "gpu.json")]
    ran = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["errors"] == {}
    assert [table["title"].partition(",")[0] for table in result["tables"]] == list(gpu.PARTS)
    measured = {row[0]: row[1] for table in result["tables"] for row in table["rows"] if row[0]}
    assert measured["two captures"] == "equal"
    assert any(what.startswith("killed after 1 of") and found == "equal" for what, found in measured.items())
    assert measured["batches after running out of memory"].endswith("of 256 tokens; verified")
    assert float(measured["all layers, disk ÷ bare"]) > 0
    assert not [path for path in tmp_path.iterdir() if path.name != "gpu.json"], "folders are left"


def test_a_part_that_fails_says_so_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_: gpu.Bench) -> gpu.Rows:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(gpu, "PARTS", {"broken": broken, "good": lambda bench: [("what", "measured", "target")]})
    monkeypatch.setattr(gpu, "shown", [])
    into = tmp_path / "gpu.json"
    monkeypatch.setattr("sys.argv", ["gpu", "--device", "cpu", "--folder", str(tmp_path), "--json", str(into)])
    assert gpu.main() == 1
    assert json.loads(into.read_text())["errors"] == {"broken": "RuntimeError: no kernel image"}
    assert "1 of 2 parts passed" in capsys.readouterr().out


def test_the_share_of_copies_beside_kernels_counts_no_time_twice() -> None:
    assert shared_time([(0, 10)], [(2, 4), (3, 5), (8, 12)]) == 0.5
    assert shared_time([(0, 1), (4, 6)], [(5, 9)]) == pytest.approx(1 / 3)
    assert shared_time([], [(0, 1)]) is None
