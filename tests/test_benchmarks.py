"""The scoreboard: its page is that of its results, and it says what was missed."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import board, timing

BENCHMARKS = {benchmark.name: benchmark for benchmark in board.BOARD}


def test_the_page_is_made_of_the_results() -> None:
    again = "write it again: python -m benchmarks --page"
    made = board.page(board.read(), board.REMARKS.read_text(encoding="utf-8"))
    assert board.PAGE.read_text(encoding="utf-8") == made, again


def test_every_benchmark_has_a_module_and_results() -> None:
    modules = {path.stem for path in board.HERE.glob("*.py") if re.search(r"^def main\(", path.read_text(), re.M)}
    assert {benchmark.name for benchmark in board.BOARD} == modules - {
        "__main__",
        "gpu",
        "replay_pictures",
        "interval_coverage",
    }
    assert board.read()["benchmarks"].keys() <= modules


@pytest.mark.parametrize(
    ("measured", "target", "met"),
    [
        ("0.60", "≥ 0.6", True),
        ("0.599", "≥ 0.6", False),
        ("1,310", "≤ 1,200", False),
        ("1.31 (a busy machine)", "≤ 1.2", False),
        ("1.5e-05", "≤ 0.000016", True),
        ("0.9", "a peer", None),
        ("–", "≤ 1.2", None),
    ],
)
def test_a_target_in_numbers_is_met_or_not(measured: str, target: str, met: bool | None) -> None:
    assert board.met(measured, target) is met


@pytest.mark.parametrize(
    ("title", "rows", "lost"),
    [
        ("capture", [("all ÷ floor", "1.1", "≤ 1.06")], [("all ÷ floor", "≤ 1.06", "1.1")]),
        ("capture", [("all ÷ floor", "1.05", "≤ 1.06")], []),
        (
            "capture",
            [
                ("14 ÷ forward", "2", ""),
                ("all ÷ floor", "1.1", ""),
                ("x ÷ floor", "1.0", "a peer"),
                ("y ÷ floor", "1.2", "a peer"),
            ],
            [("x ÷ floor", "a peer: 1.0", "1.1")],
        ),
        (
            "layer",
            [("us ÷ blocks", "1.4", ""), ("x ÷ the same", "0.9", "a peer")],
            [("x ÷ the same", "a peer: 0.9", "1.4")],
        ),
        (
            "per hook",
            [("empty", "3 µs", "the floor"), ("clone", "8.5 µs", "a peer"), ("us", "37 µs, 4 × it", "")],
            [("clone", "a peer: 8.5 µs", "37 µs, 4 × it")],
        ),
        ("scan ÷ the file", [("us", "1.7", ""), ("us, float32", "2", ""), ("x", "1.8", "a peer")], []),
        ("PCA ÷ flexcache", [("x", "0.6–1.5", "a peer"), ("y", "6", "a peer")], [("x", "a peer: 0.6–1.5", "1")]),
        (
            "time",
            [("us ÷ SAELens", "1.3", ""), ("us ÷ lmprobe", "0.6", ""), ("with ÷ without", "2", "")],
            [("us ÷ SAELens", "a peer: 1", "1.3")],
        ),
        (
            "rows a second",
            [("us ÷ annbatch", "0.9", ""), ("us ÷ SAELens", "13", "")],
            [("us ÷ annbatch", "a peer: 1", "0.9")],
        ),
        ("GB a second", [("us", "2", ""), ("x", "3", "a peer"), ("y", "1", "a peer")], [("x", "a peer: 3", "2")]),
    ],
)
def test_a_missed_target_and_a_better_peer_are_losses(
    title: str, rows: list[tuple[str, str, str]], lost: list[tuple[str, str, str]]
) -> None:
    assert board.losses(title, rows) == lost


def test_the_losses_on_the_page_are_those_of_its_targets_and_more() -> None:
    page = board.PAGE.read_text(encoding="utf-8")
    losses = page.split("## Where we lose")[1].split("## ")[0]
    missed = re.findall(r"^\| (.*?) \| (.*?) \| (\S+).* \*\*missed\*\* \|", page, re.M)
    assert missed
    assert all(any(what in line and ours in line for line in losses.splitlines()) for _, what, ours in missed)
    assert page.index("## Where we lose") < page.index("## Targets")


def test_a_run_notes_its_commit_and_the_page_says_how_many_changed_its_code_since(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        user = ("-c", "user.name=n", "-c", "user.email=e@example.org")
        subprocess.run(["git", *user, *arguments], cwd=tmp_path, check=True, capture_output=True)

    def commit(name: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
        git("add", name)
        git("commit", "-m", name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(board, "HERE", tmp_path / "benchmarks")
        for place in ("RESULTS", "PAGE"):
            patch.setattr(board, place, tmp_path / place)
        git("init")
        commit("flexcache/hooks/a.py")
        run = board.noted(BENCHMARKS["capture"], [], 90)
        results = {"benchmarks": {"capture": run, "replay": {**run, "commit": ""}}}
        assert subprocess.check_output(["git", "rev-parse", run["commit"]], cwd=tmp_path) == subprocess.check_output(
            ["git", "rev-parse", "HEAD"], cwd=tmp_path
        )
        board.write(results)
        assert f" at {run['commit']}, 2 minutes, on " in board.PAGE.read_text()
        assert "Since then" not in board.PAGE.read_text()
        commit("flexcache/hooks/b.py")
        commit("analysis/c.py")
        board.write(results)
        assert "Since then 1 commit changed the code that it measures." in board.PAGE.read_text()
        commit("flexcache/store/d.py")
        board.write(results)
        assert "Since then 2 commits changed the code that it measures." in board.PAGE.read_text()


def test_the_code_that_a_benchmark_measures_exists() -> None:
    for benchmark in board.BOARD:
        assert all((board.HERE.parent / path).exists() for path in benchmark.code), benchmark.name


def test_what_is_missed_is_said_on_top_and_figures_stand_below_their_benchmark() -> None:
    tables = [
        timing.Shown("cold", [("ours ÷ raw", "1.7", "≤ 1.2"), ("peer ÷ raw", "3", "a peer"), ("a|b", "1", "≤ 2")])
    ]
    run = board.noted(board.BOARD[0], [table._asdict() for table in tables], 90)
    results = json.loads(json.dumps({"versions": {"torch": "2.13.0"}, "benchmarks": {"capture": run}}))
    page = board.page(
        results, "## benchmarks\nB\n\n## losses\nL\n\n## targets\nT\n\n## peers\nP\n\n## capture\nSaid.\n"
    )
    top, below = page.split("## What peers do not do")
    assert "| Capture | cold: ours ÷ raw | 1.7 **missed** | ≤ 1.2 |" in top
    assert "| Capture | cold: a\\|b | 1 | ≤ 2 |" in top
    assert "peer ÷ raw" not in top
    assert "| peer ÷ raw | 3 | a peer |" in below
    assert "torch 2.13.0" in top
    assert "2 minutes, on " in below
    assert below.rstrip().endswith("Said.")


def test_what_is_shown_is_noted() -> None:
    importlib.reload(timing)
    timing.show("title", [("what", "1.0", "≤ 2")])
    assert timing.shown == [("title", [("what", "1.0", "≤ 2")])]
