"""Capture of SmolLM2-135M on a CPU over ragged labelled texts, beside its floor and what people do now.

    python -m benchmarks.capture [--documents 300] [--rounds 5]

(a) the bare forward over the plan's batches, without lm_head; (b) FlexCache, all 30 layers, with fsync and hash;
(c) FlexCache, one layer; (d) hooks that clone, and torch.save; (e) output_hidden_states and torch.save; (f) nnsight and
safetensors; (g) TransformerLens' run_with_cache and torch.save; (h) FlexModel 0.1 and torch.save. (d) to (h) save one
file a batch, with padding, as scripts do, and fsync it; (f) to (h) are left out where they are not installed. The floor
of (b) is the larger of (a) and of writing the same bytes with O_DIRECT and one fsync.
"""

from __future__ import annotations

import argparse
import mmap
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from benchmarks.model import DTYPE, smollm2
from benchmarks.peers import hooking
from benchmarks.timing import console, interleave, ratio, show
from flexcache.documents import open_documents
from flexcache.identity.describe import describe_model
from flexcache.identity.tokenizer import describe_tokenizer
from flexcache.recording.forward.batch import Batch
from flexcache.recording.forward.batch_reader import BatchReader
from flexcache.recording.forward.capture_targets import CaptureTargets, find_targets, measure_arrays
from flexcache.recording.planning.planning import PlanInputs
from flexcache.recording.planning.store_plan import plan_store
from flexcache.recording.run.fingerprint import fingerprint
from flexcache.recording.run.forward_loop import run_pending_units
from flexcache.recording.run.recorder import Recorder
from flexcache.recording.run_options import DEFAULT_BUFFER
from flexcache.spec import CaptureSpec
from pipelines.demo import assets

ONE_LAYER = 14
PEERS = {
    "nnsight + safetensors": hooking.nnsight,
    "TransformerLens + torch.save": hooking.transformer_lens,
    "FlexModel 0.1 + torch.save": hooking.flex_model,
}


class Bench:
    """A model, two planned stores (all layers, one layer), and the variants that run over them."""

    def __init__(self, folder: Path, documents: int) -> None:
        self.folder = folder
        source = smollm2()
        self.source, self.model, self.tokenizer = source, source.load(), source.tokenizer()
        tokenizer = self.tokenizer
        self.corpus = open_documents(assets.vader_sample(documents))
        self.targets: dict[str, CaptureTargets] = {}
        for name, layers in (("all", "all"), ("one", [ONE_LAYER])):
            spec = CaptureSpec.model_validate({"sites": {"resid_post": layers}})
            located = find_targets(self.model, spec)
            self.targets[name] = located
            plan = PlanInputs(
                self.corpus,
                tokenizer,
                measure_arrays(self.model, spec, located),
                spec,
                describe_model(self.model),
                describe_tokenizer(tokenizer),
            )
            self.amount = plan_store(folder / f"{name}.planned", plan)
        reader = BatchReader(folder / "all.planned")
        self.batches = [batch for unit in range(self.amount.units) for batch in reader.read_unit(unit)]
        self.bytes = self.amount.rows * 30 * 576 * (2 if DTYPE == "bfloat16" else 4)
        self.depth = len(self.targets["all"].points)
        self.result = folder / "result"

    def inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {
            "input_ids": torch.from_numpy(batch.input_ids(0)),
            "attention_mask": torch.from_numpy(batch.attention_mask()),
        }

    def bare(self) -> None:
        with torch.no_grad():
            for batch in self.batches:
                self.model.model(**self.inputs(batch), use_cache=False)

    def flexcache(self, name: str) -> None:
        shutil.rmtree(self.result, ignore_errors=True)
        shutil.copytree(self.folder / f"{name}.planned", self.result)
        recorder = Recorder(self.result, fingerprint=fingerprint(self.model))
        run_pending_units(self.model, self.targets[name], recorder, 0)

    def hooks_and_save(self) -> None:
        self._fresh()
        for number, batch in enumerate(self.batches):
            self._save(self.hooked(batch), number)

    def hooked(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Return a copy of every block's output."""
        seen: dict[str, torch.Tensor] = {}
        handles = [
            block.register_forward_hook(lambda _m, _i, out, k=k: seen.update({str(k): out.clone()}))
            for k, block in enumerate(self.model.model.layers)
        ]
        with torch.no_grad():
            self.model.model(**self.inputs(batch), use_cache=False)
        for handle in handles:
            handle.remove()
        return seen

    def peers(self) -> tuple[dict[str, Callable[[], None]], dict[str, float]]:
        """Return the peers that are installed, and how far what each gives is from what hooks of torch give."""
        variants, away = {}, {}
        for name, make in PEERS.items():
            try:
                run = make(self.source.load(), self.tokenizer)
            except ImportError:
                continue
            given, expected = run(self.inputs(self.batches[0])).values(), self.hooked(self.batches[0]).values()
            mask = torch.from_numpy(self.batches[0].attention_mask()).bool()
            away[name] = max(
                float((a[mask].float() - b[mask].float()).abs().max()) for a, b in zip(given, expected, strict=True)
            )
            variants[name] = partial(self.run_and_save, run, name)
        return variants, away

    def run_and_save(self, run: hooking.Run, name: str) -> None:
        self._fresh()
        for number, batch in enumerate(self.batches):
            self._save(run(self.inputs(batch)), number, "safetensors" in name)

    def hidden_states_and_save(self) -> None:
        self._fresh()
        for number, batch in enumerate(self.batches):
            with torch.no_grad():
                out = self.model(**self.inputs(batch), use_cache=False, output_hidden_states=True)
            self._save({str(k): state for k, state in enumerate(out.hidden_states)}, number)

    def disk(self) -> None:
        self._fresh()
        slab = mmap.mmap(-1, 4 << 20)
        slab.write(np.random.default_rng(0).bytes(4 << 20))
        handle = os.open(self.result / "raw", os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
        for _ in range(self.bytes >> 22):
            os.write(handle, slab)
        os.fsync(handle)
        os.close(handle)

    def _fresh(self) -> None:
        shutil.rmtree(self.result, ignore_errors=True)
        self.result.mkdir()

    def _save(self, tensors: dict[str, torch.Tensor], number: int, safe: bool = False) -> None:
        path = self.result / f"{number}.pt"
        if safe:
            safetensors.torch.save_file(tensors, path)
        else:
            torch.save(tensors, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; the current folder by default")
    parser.add_argument("--peak", choices=["bare", "all"], help="run one variant and print the peak RSS in bytes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder or Path.cwd(), prefix=".bench-") as folder:
        bench = Bench(Path(folder), options.documents)
        if options.peak:
            bench.bare()
            if options.peak == "all":
                bench.flexcache("all")
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
            return
        compare(bench, options.rounds)
    peaks = {name: peak(name, options.documents) for name in ("bare", "all")}
    more = f"{(peaks['all'] - peaks['bare']) / 2**20:.0f} MiB"
    show(
        "memory", [("peak of capture above that of the bare forward", more, f"the buffer, {DEFAULT_BUFFER >> 20} MiB")]
    )


def compare(bench: Bench, rounds: int) -> None:
    console.print(
        f"{bench.amount.tokens:,} tokens in {len(bench.batches)} batches, {bench.bytes / 1e6:.0f} MB, "
        f"{torch.get_num_threads()} threads"
    )
    peers, away = bench.peers()
    peers = {
        "hooks + torch.save": bench.hooks_and_save,
        "output_hidden_states + torch.save": bench.hidden_states_and_save,
        **peers,
    }
    seconds = interleave(
        {
            "bare": bench.bare,
            "flexcache, all layers": lambda: bench.flexcache("all"),
            "flexcache, one layer": lambda: bench.flexcache("one"),
            **peers,
            "disk": bench.disk,
        },
        rounds,
    )
    floor = [max(a, b) for a, b in zip(seconds["bare"], seconds["disk"], strict=True)]
    share = (ONE_LAYER + 1) / bench.depth
    show(
        f"capture, SmolLM2-135M {DTYPE} on CPU (medians of ratios, round by round)",
        [
            ("all layers ÷ floor", f"{ratio(seconds['flexcache, all layers'], floor):.3f}", "≤ 1.06"),
            (
                f"layer {ONE_LAYER} alone ÷ forward without lm_head",
                f"{ratio(seconds['flexcache, one layer'], seconds['bare']):.3f}",
                f"≤ {share + 0.05:.2f}",
            ),
            *((f"{name} ÷ floor", f"{ratio(seconds[name], floor):.3f}", "a peer") for name in peers),
            *((f"{name}: away from hooks of torch by", f"{far:.3g}", "0") for name, far in away.items()),
            ("disk alone ÷ bare forward", f"{ratio(seconds['disk'], seconds['bare']):.3f}", ""),
            ("bare forward", f"{statistics.median(seconds['bare']):.2f} s", ""),
        ],
    )


def peak(name: str, documents: int) -> int:
    command = [sys.executable, "-m", "benchmarks.capture", "--peak", name, "--documents", str(documents)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


if __name__ == "__main__":
    main()
