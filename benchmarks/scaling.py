"""Two data-parallel processes beside one, one thread each, into one store: wall time, and what claims and commits cost.

    python -m benchmarks.scaling [--documents 1000] [--rounds 3]

SmolLM2-135M on a CPU over ragged labelled texts, all 30 layers, with fsync and hash. Processes have loaded the
model and wait for a signal; the clock runs from the signal until the last of them returns from the complete store. The
plan is made beforehand, with units small enough that the last one does not decide the figure.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.model import DTYPE, smollm2
from benchmarks.timing import console, interleave, ratio, show
from flexcache.documents import open_documents
from flexcache.identity.describe import describe_model
from flexcache.identity.tokenizer import describe_tokenizer
from flexcache.recording.forward.capture_targets import CaptureTargets, find_targets, measure_arrays
from flexcache.recording.planning.planning import PlanInputs
from flexcache.recording.planning.store_plan import plan_store
from flexcache.recording.run.fingerprint import fingerprint
from flexcache.recording.run.forward_loop import run_pending_units
from flexcache.recording.run.recorder import Recorder
from flexcache.spec import CaptureSpec
from pipelines.demo import assets


def prepared() -> tuple[torch.nn.Module, Any, CaptureSpec, CaptureTargets]:
    torch.set_num_threads(1)
    source = smollm2()
    model = source.load()
    spec = CaptureSpec.model_validate({"sites": {"resid_post": "all"}, "batch_tokens": 1024})
    return model, source.tokenizer(), spec, find_targets(model, spec)


def work() -> None:
    """Capture into each store that a line names; answer with the seconds of the tally."""
    model, _, _, targets = prepared()
    print("ready", flush=True)
    for line in sys.stdin:
        recorder = Recorder(line.strip(), fingerprint=fingerprint(model))
        run_pending_units(model, targets, recorder, 0)
        stats = recorder.stats
        print(
            json.dumps({"units": stats.units, "claiming": stats.claiming, "committing": stats.committing}), flush=True
        )


class Workers:
    """Processes that wait for the name of a store."""

    def __init__(self, count: int) -> None:
        command = [sys.executable, "-m", "benchmarks.scaling", "--work"]
        self._processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)
        ]
        for process in self._processes:
            self._read(process)

    def capture(self, store: Path, count: int) -> tuple[float, list[dict[str, float]]]:
        began = time.perf_counter()
        for process in self._processes[:count]:
            assert process.stdin is not None
            process.stdin.write(f"{store}\n")
            process.stdin.flush()
        told = [json.loads(self._read(process)) for process in self._processes[:count]]
        return time.perf_counter() - began, told

    def close(self) -> None:
        for process in self._processes:
            process.communicate()

    @staticmethod
    def _read(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError("a process ended early")
        return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; the current folder by default")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work()
        return
    with tempfile.TemporaryDirectory(dir=options.folder or Path.cwd(), prefix=".bench-") as folder:
        compare(Path(folder), options.documents, options.rounds)


def compare(folder: Path, documents: int, rounds: int) -> None:
    model, tokenizer, spec, targets = prepared()
    source = PlanInputs(
        open_documents(assets.vader_sample(documents)),
        tokenizer,
        measure_arrays(model, spec, targets),
        spec,
        describe_model(model),
        describe_tokenizer(tokenizer),
    )
    amount = plan_store(folder / "planned", source)
    assert amount is not None
    del model
    workers = Workers(2)
    told: dict[int, list[list[dict[str, float]]]] = {1: [], 2: []}

    def capture(count: int) -> float:
        store = folder / "run.zarr"
        shutil.rmtree(store, ignore_errors=True)
        shutil.copytree(folder / "planned", store)
        seconds, tallies = workers.capture(store, count)
        told[count].append(tallies)
        return seconds

    console.print(f"{amount.tokens:,} tokens, {amount.units} units of {amount.shard_rows} rows, one thread a process")
    seconds = interleave({"one process": lambda: capture(1), "two processes": lambda: capture(2)}, rounds)
    workers.close()
    alone = [tallies[0] for tallies in told[1]]
    claiming = statistics.median(stats["claiming"] / stats["units"] for stats in alone)
    committing = statistics.median(stats["committing"] / stats["units"] for stats in alone)
    unit = statistics.median(seconds["one process"]) / amount.units
    units = ", ".join("+".join(str(int(stats["units"])) for stats in tallies) for tallies in told[2])
    show(
        f"two data-parallel processes, SmolLM2-135M {DTYPE} on CPU (medians of ratios, round by round)",
        [
            ("two processes ÷ one", f"{ratio(seconds['two processes'], seconds['one process']):.3f}", "≤ 0.55"),
            ("claim of a unit ÷ the unit", f"{claiming / unit:.4f} ({claiming * 1e3:.1f} ms)", ""),
            (
                "commit of a unit (30 files, fsync) ÷ the unit",
                f"{committing / unit:.4f} ({committing * 1e3:.0f} ms)",
                "",
            ),
            ("units of each process", units, ""),
        ],
    )


if __name__ == "__main__":
    main()
