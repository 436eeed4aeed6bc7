"""What grows with a store, and how fast: planning, opening, the ledger, a claim and a commit, first reads, memory.

    python -m benchmarks.growth [--plan 1e9] [--stand-in 1e11] [--rows 1e7] [--features 512]

(1) Plans of 10⁷ tokens and more, made by the planner itself, of documents of about 2,048 tokens that are all the same
token, so that little is on the disk: as a whole, and until the units of the first segment can be captured. (2) Stand-
ins for complete stores of 10⁷ tokens and more: description, ledger, documents and coordinates as large as those of
the real thing in units of 65,536 rows, one layer of 16 features; records of the ledger are hard links to a few,
coordinates are not written (zero to a reader), and only the first units have shards and sequences. (3) A store of 10⁷
rows of 512 bfloat16 on the disk, 10 GB, written and read by units.

Each figure is of a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr

import flexcache
from benchmarks.timing import console, show
from flexcache.array_spec import ArraySpec
from flexcache.store.format.ledger import Ledger
from flexcache.store.format.schema import ATTRIBUTE, COORDINATES
from flexcache.store.write.skeleton import create_arrays, create_coordinate

UNIT = 65_536
"""Rows of a unit of 2,048 bfloat16 features: 256 MiB."""
LENGTH = 2048
REAL_UNITS = 8
LINKS = 60_000
"""Hard links to one file; ext4 allows 65,000."""

MEASURED = """
import json, resource, sys, time
from pathlib import Path
import flexcache, flexcache.store.read.store
def kibibytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
path = sys.argv[1]
{before}
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
held, began = kibibytes("VmRSS"), time.perf_counter()
{run}
print(json.dumps([time.perf_counter() - began, (kibibytes("VmHWM") - held) / 1024]))
"""

FIRST_SEGMENT = """
from flexcache.recording.planning.planning import PlanInputs
from flexcache.recording.planning.store_plan import BackgroundPlan
from flexcache.array_spec import ArraySpec
from flexcache.spec import CaptureSpec
from flexcache.store.storage.location import parse_location
documents = flexcache.open_documents(str(Path(path).parent / "corpus.parquet"))
arrays = [ArraySpec("resid_post", "resid_post", (0,), 1, 16, "hidden", "bfloat16")]
spec = CaptureSpec(sites=["resid_post"], batch_tokens=16384)
plan = BackgroundPlan(parse_location(path), PlanInputs(documents, None, arrays, spec, {"name": "stand-in"}, {}))
"""
OPEN = "store = flexcache.open(path)"
STEPS: dict[str, tuple[str, str]] = {
    "open": ("", OPEN),
    "what it shows of itself": (OPEN, "repr(store)"),
    "flexcache info": (
        "from pipelines import info\nfrom rich.console import Console",
        "info.run(Path(path), Console(quiet=True))",
    ),
    "first row": (OPEN, "store.read('resid_post', layer=0, rows=[5])"),
    "first rows by xarray": (
        OPEN + "\nimport dask.array",
        "store['resid_post'].isel(layer=0, token=slice(0, 10)).compute()",
    ),
    "rows of a document": (OPEN, "store.rows(document='d7', position=-1)"),
    "first batch of the stream": (
        OPEN + "\nimport flexcache.training, torch",
        "next(iter(flexcache.training.stream(store, 'resid_post', 0, rows=range(65536))))",
    ),
    "claim and commit a unit": (
        "from flexcache.recording.run.recorder import Recorder\nimport numpy as np\n"
        "values = np.zeros((65536, 16), np.float32)\n"
        "recorder = Recorder(path, buffer_bytes=8 << 20)\nrecorder.__enter__()\nlast = recorder.claim_unit()",
        "unit = last\nfor batch in recorder.begin_unit(unit):\n"
        "    with recorder.unit_writer.fill_batch(batch):\n"
        "        recorder.put('resid_post', values[: len(batch.rows)], rows=batch.rows, layer=0)\n"
        "assert recorder.commit_unit()\nrecorder.claim_unit()",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=float, default=1e9, help="tokens of the largest plan; 0 to leave it out")
    parser.add_argument(
        "--stand-in", type=float, default=1e11, help="tokens of the largest stand-in; 0 to leave it out"
    )
    parser.add_argument("--rows", type=float, default=1e7, help="of the store on the disk; 0 to leave it out")
    parser.add_argument("--steps", default="", help="only these steps, by commas")
    parser.add_argument("--features", type=int, default=512, help="of the store on the disk")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as folder:
        place = Path(folder)
        if options.plan:
            tabulate("planning", {f"{size:.0e}": planned(place, size) for size in sizes(options.plan)})
        if options.stand_in:
            chosen = [name for name in STEPS if not options.steps or name in options.steps.split(",")]
            tabulate("stand-ins", {f"{size:.0e}": opened(place, size, chosen) for size in sizes(options.stand_in)})
        if options.rows:
            on_disk(place, int(options.rows), options.features)


def sizes(largest: float) -> list[int]:
    """Return powers of ten from 10⁷ to *largest*."""
    return [10**power for power in range(7, round(np.log10(largest)) + 1)]


def tabulate(title: str, figures: dict[str, dict[str, list[float]]]) -> None:
    for name in next(iter(figures.values())):
        rows = [
            (f"{name}, {size} tokens", f"{told[name][0]:.3f} s, {told[name][1]:,.0f} MiB", "")
            for size, told in figures.items()
        ]
        show(f"{title}: {name}", rows)


def measured(path: Path, before: str, run: str) -> list[float]:
    """Return the seconds of *run* after *before*, and the mebibytes that it adds at its peak."""
    code = MEASURED.format(before=textwrap.dedent(before), run=textwrap.dedent(run))
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    seconds, mebibytes = json.loads(done.stdout.splitlines()[-1])
    return [seconds, mebibytes]


# Plans


def planned(place: Path, tokens: int) -> dict[str, list[float]]:
    """Plan a store of so many tokens as a whole, and open it; and plan its first segment."""
    corpus, store = place / "corpus.parquet", place / "planned.zarr"
    write_corpus(corpus, tokens)
    run = (
        "flexcache.record(path, str(Path(path).parent / 'corpus.parquet'), sites={'resid_post': (1, 16)},"
        " model='stand-in', batch_tokens=16384)"
    )
    found = {"plan": measured(store, "", run)}
    found["bytes of the plan, MB"] = [sum(f.stat().st_size for f in store.rglob("*") if f.is_file()) / 1e6, 0.0]
    found["open, and its first batch"] = measured(
        store,
        "",
        "from flexcache.recording.run.recorder import Recorder\n"
        "recorder = Recorder(path)\nrecorder.largest_batch()\n"
        "with recorder:\n    recorder.begin_unit(recorder.claim_unit())\n    recorder.abandon_unit()",
    )
    shutil.rmtree(store)
    found["first units can be captured"] = measured(store, FIRST_SEGMENT, "plan.begin()\nplan.close()")
    console.print(f"{tokens:.0e}: {found}", style="dim", highlight=False)
    shutil.rmtree(store)
    corpus.unlink()
    return found


def write_corpus(path: Path, tokens: int) -> None:
    """Write documents of 1,024 to 3,072 tokens, all of them token 7."""
    rng, left, number = np.random.default_rng(0), tokens, 0
    schema = pa.schema([("id", pa.string()), ("tokens", pa.list_(pa.int32()))])
    with pq.ParquetWriter(path, schema) as out:
        while left > 0:
            lengths = rng.integers(LENGTH // 2, LENGTH * 3 // 2, 2048)
            lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), left)) + 1]
            offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
            lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.full(offsets[-1], 7, np.int32)))
            ids = pa.array([f"d{number + i}" for i in range(len(lengths))])
            out.write_table(pa.table({"id": ids, "tokens": lists}, schema=schema))
            left -= int(offsets[-1])
            number += len(lengths)


# Stand-ins


def opened(place: Path, tokens: int, chosen: list[str]) -> dict[str, list[float]]:
    """Make a stand-in for a complete store of so many tokens, and take every step on it."""
    path = stand_in(place, tokens)
    found = {}
    for name in chosen:
        found[name] = measured(path, *STEPS[name])
        console.print(f"{tokens:.0e}: {name} {found[name]}", style="dim", highlight=False)
    shutil.rmtree(path)
    return found


def stand_in(place: Path, tokens: int) -> Path:
    """Return a store with the description, ledger and tables of one of so many tokens; see above."""
    small, path = place / "small.zarr", place / "large.zarr"
    if not small.exists():
        documents = [{"id": f"d{i}", "tokens": [7] * LENGTH} for i in range(REAL_UNITS * UNIT // LENGTH)]
        flexcache.record(small, documents, sites={"resid_post": (1, 16)}, model="stand-in", batch_tokens=UNIT // 4)
    attributes = json.loads((small / "zarr.json").read_bytes())["attributes"]
    plan = attributes[ATTRIBUTE]["plan"]
    assert plan["shard_rows"] == UNIT
    units = tokens // UNIT
    plan |= {"rows": units * UNIT, "units": units, "documents": units * UNIT // LENGTH, "files": units}
    group = zarr.create_group(zarr.storage.LocalStore(path), zarr_format=3)
    create_arrays(
        group, [ArraySpec("resid_post", "resid_post", (0,), 1, 16, "hidden", "bfloat16")], plan["rows"], UNIT, "none"
    )
    for name in COORDINATES:
        create_coordinate(group, name, plan["rows"])
    group.attrs.update(attributes)
    shutil.copy(small / "sequences.parquet", path)
    write_documents(path / "documents.parquet", plan["documents"])
    shutil.copytree(small / "ledger", path / "ledger")
    link_records(path, units)
    return path


def write_documents(path: Path, count: int) -> None:
    with pq.ParquetWriter(path, documents_table(0, 1).schema, compression="zstd") as out:
        for start in range(0, count, 1 << 20):
            out.write_table(documents_table(start, min(count, start + (1 << 20))))


def documents_table(start: int, stop: int) -> pa.Table:
    numbers = np.arange(start, stop)
    ids = pa.array(numbers).cast(pa.string())
    return pa.table(
        {
            "id": pa.compute.binary_join_element_wise("d", ids, ""),
            "source_index": numbers,
            "n_tokens": np.full(len(numbers), LENGTH, np.int32),
            "text_xxh3_128": pa.compute.binary_join_element_wise("0123456789abcdef0123456789", ids, ""),
            "row_start": numbers * LENGTH,
            "n_rows": np.full(len(numbers), LENGTH, np.int64),
        }
    )


def link_records(path: Path, units: int) -> None:
    """Commit every unit: the first ones by recorders, the last by a record of its own, the others by links to it."""
    ledger = Ledger(path)
    for unit in (0, 1, 2, 3):
        commit(path, unit)
    record = ledger.read_record(0)
    for first in range(REAL_UNITS, units, LINKS):
        ledger.commit(replace(record, unit=first))
        for unit in range(first + 1, min(first + LINKS, units)):
            os.link(ledger.path(first), ledger.path(unit))
    ledger.path(units - 1).unlink()
    ledger.commit(replace(record, unit=units - 1))


def commit(path: Path, unit: int) -> None:
    values = np.random.default_rng(unit).standard_normal((UNIT, 16)).astype(np.float32)
    with flexcache.Recorder(path, buffer_bytes=8 << 20) as recorder:
        assert recorder.claim_unit() == unit
        for batch in recorder.begin_unit(unit):
            with recorder.unit_writer.fill_batch(batch):
                recorder.put("resid_post", values[: len(batch.rows)], rows=batch.rows, layer=0)
        assert recorder.commit_unit()


# On the disk


def on_disk(place: Path, rows: int, features: int) -> None:
    """Write a store of so many rows by units, and read it; say whether late units cost more than early ones."""
    documents = pa.table(
        {
            "id": [f"d{i}" for i in range(rows // LENGTH)],
            "tokens": pa.FixedSizeListArray.from_arrays(
                pa.array(np.full(rows // LENGTH * LENGTH, 7, np.int32)), LENGTH
            ),
        }
    )
    values = np.random.default_rng(0).standard_normal((16_384, features)).astype("bfloat16")
    began, per_unit = time.perf_counter(), []
    with flexcache.record(
        place / "run.zarr", documents, sites={"resid_post": (1, features)}, model="noise", batch_tokens=16_384
    ) as recorder:
        planning = time.perf_counter() - began
        for unit in recorder.claim_units():
            start = time.perf_counter()
            for batch in recorder.begin_unit(unit):
                with recorder.unit_writer.fill_batch(batch):
                    recorder.put("resid_post", values[: len(batch.rows)], rows=batch.rows, layer=0)
            recorder.commit_unit()
            per_unit.append(time.perf_counter() - start)
    store = flexcache.open(place / "run.zarr")
    assert store.complete
    tenth = max(1, len(per_unit) // 10)
    scan = time.perf_counter()
    for _ in store.scan("resid_post", layer=0, raw=True):
        pass
    scan = time.perf_counter() - scan
    held = sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file())
    figures = {
        "rows": store.n_rows,
        "units": store.n_units,
        "GB": held / 1e9,
        "planning, s": planning,
        "writing, GB/s": held / 1e9 / sum(per_unit),
        "seconds of a late unit ÷ an early one": statistics.median(per_unit[-tenth - 1 : -1])
        / statistics.median(per_unit[:tenth]),
        "scan, GB/s": held / 1e9 / scan,
    }
    for name, step in STEPS.items():
        if name != "claim and commit a unit":
            figures[f"{name}, s"], figures[f"{name}, MiB"] = measured(store.path, *step)
    show(
        f"a store of {features} features on the disk", [(name, f"{value:,.3f}", "") for name, value in figures.items()]
    )


if __name__ == "__main__":
    main()
