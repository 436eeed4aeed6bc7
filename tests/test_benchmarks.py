"""The scoreboard: its page is that of its results, and it says what was missed."""

from __future__ import annotations

import importlib
import json
import re

import pytest

from benchmarks import board, timing


def test_the_page_is_made_of_the_results() -> None:
    again = "write it again: python -m benchmarks --page"
    made = board.page(board.read(), board.REMARKS.read_text(encoding="utf-8"))
    assert board.PAGE.read_text(encoding="utf-8") == made, again


def test_every_benchmark_has_a_module_and_results() -> None:
    modules = {path.stem for path in board.HERE.glob("*.py") if re.search(r"^def main\(", path.read_text(), re.M)}
    assert {benchmark.name for benchmark in board.BOARD} == modules - {
        "__main__",
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


def test_what_is_missed_is_said_on_top_and_figures_stand_below_their_benchmark() -> None:
    tables = [
        timing.Shown("cold", [("ours ÷ raw", "1.7", "≤ 1.2"), ("peer ÷ raw", "3", "a peer"), ("a|b", "1", "≤ 2")])
    ]
    run = board.noted(board.BOARD[0], [table._asdict() for table in tables], 90)
    results = json.loads(json.dumps({"versions": {"torch": "2.13.0"}, "benchmarks": {"capture": run}}))
    page = board.page(results, "## benchmarks\nB\n\n## targets\nT\n\n## peers\nP\n\n## capture\nSaid.\n")
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
