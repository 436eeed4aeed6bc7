"""Change the code in one place at a time, and list the changes that no test notices.

    python -m tests.mutation probes --count 100 --seed 0

Comparisons, arithmetic, constants and conditions of the modules of a room are changed: ``<`` to ``<=``, ``+`` to
``-``, ``0`` to ``1``, ``and`` to ``or``, ``not x`` to ``x``. Each change is tested in a forked process, in which the
libraries are imported already. Text, annotations and docstrings are left alone. A change that makes the tests hang
counts as noticed.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

ROOT = Path(__file__).parents[1]
LIBRARIES = ("torch", "transformers", "sklearn.linear_model", "xarray", "dask.array", "pandas", "pyarrow", "pytest")
QUIET = ("-W", "ignore::pytest.PytestAssertRewriteWarning")
"""Libraries that are imported already cannot be rewritten by pytest, which need not be said."""
ROOMS = {
    "replay": (
        ["analysis/replay/metrics.py", *(f"analysis/replay/sweeps/{name}.py" for name in ("results", "effects"))]
        + [f"analysis/replay/sweeps/{name}.py" for name in ("inference", "grid", "arguments", "table")],
        [f"tests/analysis/replay/test_{name}.py" for name in ("inference", "arguments", "readout", "sweep")],
    ),
    "probes": (
        [f"analysis/probes/evaluation/{name}.py" for name in ("score", "folds", "pooled_metrics", "layer_scores")]
        + [f"analysis/probes/{name}.py" for name in ("transfer", "direction", "class_pairs", "comparison")],
        [
            *(f"tests/analysis/test_{name}.py" for name in ("pooled_metrics", "score", "folds", "transfer")),
            *(f"tests/analysis/test_{name}.py" for name in ("comparison", "probe_use", "probe_dataset", "sweep")),
        ],
    ),
    "sequences": (
        ["flexcache/sequences", "flexcache/plan.py"],
        ["tests/test_plan.py", "tests/sequences"],
    ),
}
"""Modules that are changed, and the tests that should notice, the quickest first."""

OPERATORS: dict[type, type] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


@dataclass(frozen=True)
class Change:
    """One change of a module: the line, the code before and after, and the whole changed module."""

    path: Path
    line: int
    before: str
    after: str
    code: CodeType

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}: {self.before}  →  {self.after}"


def changed_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the changed forms of one node, if it has any."""
    if isinstance(node, ast.Compare):
        for number, operator in enumerate(node.ops):
            if type(operator) in OPERATORS:
                compared = copy.deepcopy(node)
                compared.ops[number] = OPERATORS[type(operator)]()
                yield compared
    elif isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in OPERATORS:
        made: Any = copy.deepcopy(node)
        made.op = OPERATORS[type(node.op)]()
        yield made
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield copy.deepcopy(node.operand)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield ast.Constant(node.value + 1)


def left_alone(node: ast.AST, name: str) -> bool:
    """Return True for annotations, texts, and types of a union."""
    return (
        name in ("annotation", "returns", "decorator_list", "bases")
        or isinstance(node, ast.JoinedStr)
        or (isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr))
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    )


def changes_of(path: Path) -> list[Change]:
    """Return every change of a module."""
    tree = ast.parse(path.read_text("utf-8"))
    found: list[Change] = []

    def visit(parent: ast.AST, statement: ast.AST) -> None:
        for name, value in ast.iter_fields(parent):
            for number, node in enumerate(value if isinstance(value, list) else [value]):
                if not isinstance(node, ast.AST) or left_alone(node, name):
                    continue
                for made in changed_nodes(node):
                    place(parent, name, number, made)
                    after = _short(statement)
                    code = compile(ast.fix_missing_locations(tree), str(path), "exec", dont_inherit=True)
                    place(parent, name, number, node)
                    found.append(Change(path, getattr(node, "lineno", 0), _short(node), after, code))
                visit(node, node if isinstance(node, ast.stmt) else statement)

    visit(tree, tree)
    return found


def place(parent: ast.AST, name: str, number: int, node: ast.AST) -> None:
    """Put a node into its parent."""
    value = getattr(parent, name)
    if isinstance(value, list):
        value[number] = node
    else:
        setattr(parent, name, node)


def _short(node: ast.AST) -> str:
    return " ".join(ast.unparse(node).split())[:110]


class Tests:
    """The tests of a room, run in forked processes."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths
        self.limit = 3600.0
        began = time.perf_counter()
        if not self.pass_with(None):
            raise SystemExit("the tests fail without a change")
        self.limit = 30 + 4 * (time.perf_counter() - began)

    def start(self, change: Change | None) -> int:
        """Start the tests with a change in a child, and return the number of its process."""
        child = os.fork()
        if child:
            return child
        os.setsid()
        os._exit(int(run_tests(self.paths, change)))

    def pass_with(self, change: Change | None) -> bool:
        """Return True if all tests pass with a change."""
        child, began = self.start(change), time.perf_counter()
        while time.perf_counter() - began < self.limit:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status) == 0
            time.sleep(0.05)
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return False


def run_tests(paths: list[str], change: Change | None) -> int:
    """Run tests in this process, with a changed module, and return the exit code of pytest."""
    import pytest

    if change is not None:
        load = SourceFileLoader.get_code

        def get_code(loader: SourceFileLoader, name: str) -> CodeType | None:
            return change.code if loader.path == str(change.path) else load(loader, name)

        SourceFileLoader.get_code = get_code  # type: ignore[method-assign]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    return pytest.main(["-x", "-q", "--assert=plain", "-p", "no:cacheprovider", *QUIET, *paths])


def main() -> int:
    """Test a sample of changes, and print those that all tests pass with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("room", choices=ROOMS)
    parser.add_argument("--count", type=int, default=100, help="changes to test, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw")
    parser.add_argument("--only", default="", help="part of the paths of the modules to change")
    given = parser.parse_args()
    os.chdir(ROOT)
    os.environ["HF_HUB_OFFLINE"] = "1"
    modules, paths = ROOMS[given.room]
    files = [
        file for name in modules for file in ([ROOT / name] if name.endswith(".py") else (ROOT / name).glob("*.py"))
    ]
    every = [change for file in sorted(files) if given.only in str(file) for change in changes_of(file)]
    chosen = random.Random(given.seed).sample(every, min(given.count, len(every)))
    for name in LIBRARIES:
        importlib.import_module(name)
    tests, left = Tests(paths), 0
    for number, change in enumerate(chosen, 1):
        if tests.pass_with(change):
            left += 1
            print(f"not noticed: {change}", flush=True)
        print(f"{number} of {len(chosen)}, {left} not noticed", end="\r", file=sys.stderr, flush=True)
    print(f"{given.room}: {len(chosen)} of {len(every)} changes tested, {len(chosen) - left} noticed, {left} not")
    return 0


if __name__ == "__main__":
    sys.exit(main())
