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


@dataclass(frozen=True)
class Benchmark:
    """A module of this package, how it is run, and what it is about."""

    name: str
    heading: str
    arguments: str = ""

    @property
    def command(self) -> str:
        return f"python -m benchmarks.{self.name} {self.arguments}".strip()


BOARD = [
    Benchmark("capture", "Capture", "--documents 120 --rounds 5"),
    Benchmark("runners", "Capture beside the runners of other tools", "--contexts 64 --documents 120"),
    Benchmark("scaling", "Capture by two processes"),
    Benchmark("decoding", "Capture while generating", "--rounds 3"),
    Benchmark("hooks", "Hooks, in memory"),
    Benchmark("read", "Reading"),
    Benchmark("stream", "Training stream", "--rounds 5"),
    Benchmark("statistics", "Statistics"),
    Benchmark("probes", "Probes"),
    Benchmark("replay", "Replay"),
    Benchmark("moving", "Copy and export"),
    Benchmark("reliability", "Reliability"),
    Benchmark("identity", "Knowing a model"),
    Benchmark("growth", "Growth", "--plan 1e8 --stand-in 1e10 --rows 0"),
]

Results = dict[str, Any]
"""``{"machine", "versions", "benchmarks": {name: {"command", "date", "seconds", "machine", "tables"}}}``"""


def read() -> Results:
    """Return the results so far."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"benchmarks": {}}


def write(results: Results) -> None:
    """Keep results, and make the page of them."""
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(page(results, REMARKS.read_text()))


def noted(benchmark: Benchmark, tables: list[Any], seconds: float) -> dict[str, Any]:
    """Return what is kept of one run."""
    return {
        "command": benchmark.command,
        "date": datetime.now(UTC).date().isoformat(),
        "seconds": round(seconds),
        "machine": machine(),
        "tables": tables,
    }


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
    bound = re.match(r"([≤≥]) ([\d.,]+)", target)
    value = re.match(r"-?[\d.,]+(e-?\d+)?", measured)
    if bound is None or value is None:
        return None
    number, limit = float(value[0].replace(",", "")), float(bound[2].replace(",", ""))
    return number <= limit if bound[1] == "≤" else number >= limit


def page(results: Results, remarks: str) -> str:
    """Return the page of results, in Markdown."""
    said = _sections(remarks)
    versions = ", ".join(f"{name} {version}" for name, version in results.get("versions", {}).items())
    parts = [
        "<!-- Made by `python -m benchmarks` of benchmarks/results.json and benchmarks/remarks.md. -->",
        "# Benchmarks",
        said["benchmarks"],
        f"Versions: {versions}." if versions else "",
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
    return f"`{run['command']}`, {run['date']}, {minutes} minutes, on {run['machine']}."


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
