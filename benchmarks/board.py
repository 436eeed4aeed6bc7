"""The scoreboard: which benchmarks there are, and the page that is made of what they measured.

`python -m benchmarks` runs them and writes `benchmarks/results.json`, from which `docs/benchmarks.md` is made together
with `benchmarks/remarks.md`: what people should know who read the figures.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS, REMARKS, PAGE = HERE / "results.json", HERE / "remarks.md", HERE.parent / "docs" / "benchmarks.md"
PACKAGES = (
    *("torch", "transformers", "accelerate", "zarr", "tensorstore", "numpy", "scikit-learn", "dask", "safetensors"),
    *("nnsight", "sae-lens", "transformer-lens", "lmprobe", "flex-model"),
)
PEERS = ("nnsight", "SAELens", "TransformerLens", "lmprobe", "annbatch", "zarr-python", "tensorstore", "scikit-learn")
"""Names that a row has after its ``÷`` where the peer itself is what our figure is divided by."""


@dataclass(frozen=True)
class Benchmark:
    """A module of this package, how it is run, what it is about, and the code whose speed it measures."""

    name: str
    heading: str
    arguments: str = ""
    code: tuple[str, ...] = ("flexcache",)

    @property
    def command(self) -> str:
        return f"python -m benchmarks.{self.name} {self.arguments}".strip()


RECORDING = ("flexcache/recording", "flexcache/hooks", "flexcache/store")
BOARD = [
    Benchmark("capture", "Capture", "--documents 120 --rounds 5", RECORDING),
    Benchmark("runners", "Capture beside the runners of other tools", "--contexts 64 --documents 120", RECORDING),
    Benchmark("scaling", "Capture by two processes", "", RECORDING),
    Benchmark("decoding", "Capture while generating", "--rounds 3", RECORDING),
    Benchmark("hooks", "Hooks, in memory", "", ("flexcache/hooks", "flexcache/parallel")),
    Benchmark("read", "Reading", "", ("flexcache/store/read", "flexcache/store/format")),
    Benchmark("virtual", "Virtual layers", "", ("flexcache/virtual", "flexcache/store/read")),
    Benchmark("stream", "Training stream", "--rounds 5", ("flexcache/training", "flexcache/store/read")),
    Benchmark("statistics", "Statistics", "", ("analysis/statistics", "flexcache/store/read")),
    Benchmark("probes", "Probes", "", ("analysis/probes",)),
    Benchmark("replay", "Replay", "", ("analysis/replay",)),
    Benchmark("moving", "Copy and export", "", ("flexcache/store/manage", "flexcache/exchange")),
    Benchmark("reliability", "Reliability", "", ("flexcache/store",)),
    Benchmark("identity", "Knowing a model", "", ("flexcache/identity",)),
    Benchmark("growth", "Growth", "--plan 1e8 --stand-in 1e10 --rows 0", ("flexcache/store", "flexcache/plan.py")),
]

Results = dict[str, Any]
"""``{"versions", "benchmarks": {name: {"command", "date", "commit", "behind", "seconds", "machine", "tables"}}}``"""


def read() -> Results:
    """Return the results so far."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"benchmarks": {}}


def write(results: Results) -> None:
    """Keep results with the commits that they are behind, and make the page of them."""
    for benchmark in BOARD:
        run = results["benchmarks"].get(benchmark.name, {})
        if run.get("commit"):
            log = _git("log", "--oneline", f"{run['commit']}..HEAD", "--", *benchmark.code)
            run["behind"] = len(log.splitlines())
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(page(results, REMARKS.read_text()))


def noted(benchmark: Benchmark, tables: list[Any], seconds: float) -> dict[str, Any]:
    """Return what is kept of one run."""
    return {
        "command": benchmark.command,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "seconds": round(seconds),
        "machine": machine(),
        "tables": tables,
    }


def _git(*arguments: str) -> str:
    """Return what git prints of this repository; nothing where there is no git, no repository, or no such commit."""
    try:
        ran = subprocess.run(["git", *arguments], cwd=HERE.parent, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return "" if ran.returncode else ran.stdout.strip()


def machine() -> str:
    """Return the processor, its instructions, its cores, the memory and the system, in a line."""
    import torch

    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (found := re.search(r"^model name\s*: (.*)$", cpuinfo.read_text(), re.M)):
        processor = found[1]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{processor} ({instructions}), {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()}, no GPU"


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Return the versions of the packages that are installed, among those that matter here."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def met(measured: str, target: str) -> bool | None:
    """Return whether what was measured meets a target ``≤ x`` or ``≥ x``; None where either is no number.

    >>> met("0.60", "≥ 0.6"), met("1.31 (a busy machine)", "≤ 1.2"), met("0.9", "a peer")
    (True, False, None)
    """
    bound, value = re.match(r"([≤≥]) (.*)", target), _number(measured)
    limit = _number(bound[2]) if bound else None
    if bound is None or value is None or limit is None:
        return None
    return value <= limit if bound[1] == "≤" else value >= limit


def _number(cell: str) -> float | None:
    """Return the number that a cell begins with; the lower end of a range."""
    found = re.match(r"-?[\d.,]+(e-?\d+)?", cell)
    return float(found[0].replace(",", "")) if found and re.search(r"\d", found[0]) else None


Loss = tuple[str, str, str]
"""A row of *Where we lose*: the measurement, the target or figure of the peer, and ours."""


def losses(title: str, rows: list[Any]) -> list[Loss]:
    """Return the rows of a table that miss a target, or in which a peer is better.

    A peer's row has the target ``a peer``; it is compared with our first row that has the same text after ``÷``, or,
    where the title ends with ``÷ flexcache``, with 1. A row ``ours ÷ peer`` is compared with 1. Less is better, but
    in tables whose title ends with ``a second``.
    """
    more = title.endswith(" a second")
    found: list[Loss] = []
    for what, measured, target in rows:
        value, below = _number(measured), what.partition(" ÷ ")[2]
        if met(measured, target) is False:
            found.append((what, target, measured))
        elif value is None:
            continue
        elif target == "a peer":
            ours = "1" if title.endswith("÷ flexcache") else _ours(rows, below)
            bar = _number(ours)
            if bar is not None and (value > bar if more else value < bar):
                found.append((what, f"a peer: {measured}", ours))
        elif not target and any(peer in below for peer in PEERS) and (value < 1 if more else value > 1):
            found.append((what, "a peer: 1", measured))
    return found


def _ours(rows: list[Any], below: str) -> str:
    """Return the figure of our first row that has a text after its ``÷``."""
    for what, measured, target in rows:
        divided = what.partition(" ÷ ")[2]
        if target not in ("a peer", "the floor") and (divided == below or (divided and below == "the same")):
            return measured
    return ""


def page(results: Results, remarks: str) -> str:
    """Return the page of results, in Markdown."""
    said = _sections(remarks)
    versions = ", ".join(f"{name} {version}" for name, version in results.get("versions", {}).items())
    parts = [
        "<!-- Made by `python -m benchmarks` of benchmarks/results.json and benchmarks/remarks.md. -->",
        "# Benchmarks",
        said["benchmarks"],
        f"Versions: {versions}." if versions else "",
        "## Where we lose",
        said["losses"],
        _losses(results),
        "## Targets",
        said["targets"],
        _targets(results),
        "## What peers do not do",
        said["peers"],
    ]
    for benchmark in BOARD:
        run = results["benchmarks"].get(benchmark.name)
        if run is None:
            continue
        parts += [f"## {benchmark.heading}", _ran(run)]
        parts += [_table(table["title"], table["rows"]) for table in run["tables"]]
        parts += [said[benchmark.name]] if benchmark.name in said else []
    return "\n\n".join(part for part in parts if part) + "\n"


def _ran(run: dict[str, Any]) -> str:
    minutes = max(1, round(run["seconds"] / 60))
    at = f" at {run['commit']}" if run.get("commit") else ""
    behind = run.get("behind", 0)
    commits = "1 commit" if behind == 1 else f"{behind} commits"
    since = f" Since then {commits} changed the code that it measures." if behind else ""
    return f"`{run['command']}`, {run['date']}{at}, {minutes} minutes, on {run['machine']}.{since}"


def _losses(results: Results) -> str:
    rows = [
        (benchmark.heading, f"{table['title']}: {what}", bar, ours)
        for benchmark in BOARD
        for table in results["benchmarks"].get(benchmark.name, {"tables": []})["tables"]
        for what, bar, ours in losses(table["title"], table["rows"])
    ]
    return _table("", rows, ("benchmark", "what", "peer or target", "ours")) if rows else ""


def _targets(results: Results) -> str:
    rows = []
    for benchmark in BOARD:
        for table in results["benchmarks"].get(benchmark.name, {"tables": []})["tables"]:
            for what, measured, target in table["rows"]:
                passed = met(measured, target)
                if passed is not None:
                    mark = "" if passed else " **missed**"
                    rows.append((benchmark.heading, f"{table['title']}: {what}", measured + mark, target))
    return _table("", rows, ("benchmark", "what", "measured", "target"))


def _table(title: str, rows: list[Any], columns: tuple[str, ...] = ("what", "measured", "target")) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([*([f"**{title}**", ""] if title else []), *lines])


def _sections(remarks: str) -> dict[str, str]:
    """Return the text below each heading ``## name``."""
    parts = re.split(r"^## (.+)$\n", remarks, flags=re.M)[1:]
    return {name.strip(): text.strip() for name, text in zip(parts[::2], parts[1::2], strict=True)}
