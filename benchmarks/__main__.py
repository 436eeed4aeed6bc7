"""Run benchmarks, one after the other, and write what they measured into docs/benchmarks.md.

    python -m benchmarks [NAMES …]        all of them, or some; the results of the others stay
    python -m benchmarks --page           only the page, of the results that are there

Each runs in a process of its own, as its command does by itself. Give it a quiet machine and two hours; what a
benchmark measured is kept as soon as it ends. Where one fails, the others go on, and the command ends with status 1.
"""

from __future__ import annotations

import argparse
import json
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import board, timing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=", ".join(benchmark.name for benchmark in board.BOARD))
    parser.add_argument("--page", action="store_true", help="make the page again, and measure nothing")
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args()
    if options.into:
        return alone(options.names[0], options.into, rest)
    known = [benchmark.name for benchmark in board.BOARD]
    if unknown := sorted({*options.names} - {*known}):
        parser.error(f"no benchmark named {', '.join(unknown)}; there are {', '.join(known)}")
    results, failed = board.read(), []
    for benchmark in [] if options.page else board.BOARD:
        if options.names and benchmark.name not in options.names:
            continue
        timing.console.rule(benchmark.command)
        ran = measured(benchmark)
        if ran is None:
            failed.append(benchmark.name)
            continue
        results["benchmarks"][benchmark.name] = ran
        results["versions"] = board.versions()
        board.write(results)
    board.write(results)
    if failed:
        timing.console.print(f"failed: {', '.join(failed)}", style="bold red")
    return int(bool(failed))


def measured(benchmark: board.Benchmark) -> dict | None:
    """Run a benchmark in a process of its own; return what it showed, or None where it failed."""
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder) / "shown.json"
        command = [sys.executable, "-m", "benchmarks", benchmark.name, "--into", str(into)]
        began = time.perf_counter()
        if subprocess.run([*command, *benchmark.arguments.split()], check=False).returncode:
            return None
        return board.noted(benchmark, json.loads(into.read_text()), time.perf_counter() - began)


def alone(name: str, into: Path, arguments: list[str]) -> int:
    """Run one benchmark in this process, as `python -m` would, and write what it shows."""
    sys.argv = [f"benchmarks.{name}", *arguments]
    runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)
    into.write_text(json.dumps([table._asdict() for table in timing.shown]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
