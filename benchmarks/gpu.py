"""Proof on a GPU: what differs from a CPU, in one command of at most five minutes, with random models and no downloads.

    python -m benchmarks.gpu [--json gpu.json] [--folder .] [--memory /dev/shm] [--only cost …]
    python -m benchmarks.gpu --device cpu --quick       # as the tests run it

Each part stands alone: one that fails prints its error, the others go on, and the command ends with status 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

import flexcache
from analysis.replay import Engine
from benchmarks.gpu_measures import device_to_host, forward_memory, overlap, timed, write_speed
from benchmarks.timing import Shown, console, show, shown
from flexcache.recording.forward.batch import Batch
from flexcache.recording.forward.batch_reader import BatchReader

VOCABULARY = 32_000
Rows = list[tuple[str, str, str]]


@dataclass(frozen=True)
class Bench:
    """A device, a large and a small model on it, and two folders: on a disk and in memory."""

    device: torch.device
    dtype: torch.dtype
    quick: bool
    disk: Path
    memory: Path

    @cached_property
    def large(self) -> nn.Module:
        """Some 10⁹ parameters; 10⁵ if quick."""
        return self._llama(64, 4, 4) if self.quick else self._llama(2048, 16, 32)

    @cached_property
    def small(self) -> nn.Module:
        return self._llama(64, 4, 4) if self.quick else self._llama(256, 8, 8)

    def _llama(self, hidden: int, layers: int, heads: int) -> nn.Module:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=500 if self.quick else VOCABULARY,
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 4),
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
        with self.device:
            return transformers.LlamaForCausalLM(config).to(self.dtype).eval()

    def documents(self, count: int, longest: int) -> list[dict[str, Any]]:
        """Ragged random tokens; fewer and shorter ones if quick."""
        count, longest = (min(count, 40), min(longest, 24)) if self.quick else (count, longest)
        random = np.random.default_rng(0)
        lengths = random.integers(longest // 4, longest + 1, count)
        high = 500 if self.quick else VOCABULARY
        return [{"id": str(k), "tokens": random.integers(3, high, n).tolist()} for k, n in enumerate(lengths)]

    def capture(self, model: nn.Module, path: Path, documents: list[dict[str, Any]], **fields: Any) -> flexcache.Store:
        shutil.rmtree(path, ignore_errors=True)
        return self.resume(model, path, documents, **fields)

    def resume(self, model: nn.Module, path: Path, documents: list[dict[str, Any]], **fields: Any) -> flexcache.Store:
        tokens = 128 if self.quick else 16_384
        return flexcache.capture(model, None, documents, path, **{"batch_tokens": tokens, "progress": False} | fields)

    def inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        arrays = {"input_ids": batch.input_ids(0), "attention_mask": batch.attention_mask()}
        return {name: torch.from_numpy(values).to(self.device) for name, values in arrays.items()}

    def timed(self, run: Callable[[], Any], rounds: int = 3) -> float:
        return timed(run, self.device, 1 if self.quick else rounds)


def batches_of(store: flexcache.Store) -> list[Batch]:
    return [batch for unit in range(store.n_units) for batch in BatchReader(store.path).read_unit(unit)]


def require(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(what)


def digests(path: Path) -> dict[str, str]:
    """Return the digest of every shard of a store."""
    files = (file for file in sorted(path.glob("*/c/**/*")) if file.is_file())
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def plain_rows(bench: Bench, model: nn.Module, store: flexcache.Store) -> list[np.ndarray]:
    """Return the outputs of every block by hooks of torch, in the order of a store's rows, as float32."""
    kept: list[list[np.ndarray]] = [[] for _ in model.model.layers]
    batch: Batch | None = None

    def keep(layer: int, _: nn.Module, args: Any, output: torch.Tensor) -> None:
        assert batch is not None
        kept[layer] += [output[line, first:last].float().cpu().numpy() for line, (first, last) in enumerate(batch.keep)]

    handles = [block.register_forward_hook(partial(keep, layer)) for layer, block in enumerate(model.model.layers)]
    with torch.no_grad():
        for batch in batches_of(store):
            model.model(**bench.inputs(batch), use_cache=False)
    for handle in handles:
        handle.remove()
    return [np.concatenate(rows) for rows in kept]


def exact(bench: Bench) -> Rows:
    """Compare stored rows with those of hooks of torch, a second capture, and one that was killed."""
    documents = bench.documents(600, 256)
    store = bench.capture(bench.small, bench.memory / "a.zarr", documents)
    require(store.n_units > 1, "the store has several units")
    for layer, rows in enumerate(plain_rows(bench, bench.small, store)):
        require(np.array_equal(np.asarray(store.read("resid_post", layer), np.float32), rows), f"layer {layer} differs")
    whole = digests(bench.memory / "a.zarr")
    bench.capture(bench.small, bench.memory / "b.zarr", documents)
    require(digests(bench.memory / "b.zarr") == whole, "two captures differ")
    killed = bench.memory / "c.zarr"
    arguments = ["--device", str(bench.device), "--dtype", str(bench.dtype).removeprefix("torch.")]
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments, "--killed", str(killed)]
    ran = subprocess.run(command + ["--quick"] * bench.quick, capture_output=True, text=True, check=False)
    require(ran.returncode == -signal.SIGKILL, f"the capture was not killed: {ran.stderr[-2000:]}")
    before = flexcache.open(killed).committed_units.tolist()
    require(0 < len(before) < store.n_units, f"{len(before)} of {store.n_units} units were committed")
    bench.resume(bench.small, killed, documents)
    require(digests(killed) == whole, "a killed and resumed capture differs")
    return [
        (
            f"rows of {store.n_rows:,} tokens × {len(bench.small.model.layers)} layers, and hooks of torch",
            "equal",
            "equal",
        ),
        ("two captures", "equal", "equal"),
        (f"killed after {len(before)} of {store.n_units} units, and resumed", "equal", "equal"),
    ]


def kill_oneself(bench: Bench, path: Path) -> None:
    """Capture as `exact` does, until a unit is committed and the next forward begins."""

    def end(*_: Any) -> None:
        if list((path / "ledger").glob("*/*.json")):
            signal.raise_signal(signal.SIGKILL)

    bench.small.register_forward_pre_hook(end)
    bench.capture(bench.small, path, bench.documents(600, 256))


def run_seconds(store: flexcache.Store) -> float:
    """Return the seconds of the last run of a capture from its first unit to the end, without plan and checks."""
    log = json.loads(max((Path(str(store.path)) / "runs").glob("*.json")).read_text())
    return sum(log[name] for name in ("forward", "claiming", "committing"))


def cost(bench: Bench) -> Rows:
    """Time captures, and compare them with the bare forward, the bus and the disk."""
    model, documents, depth = bench.large, bench.documents(128, 512), len(bench.large.model.layers)
    plan = bench.capture(model, bench.memory / "cost.zarr", documents, sites={"resid_post": [0]})
    batches = batches_of(plan)

    def bare() -> None:
        with torch.no_grad():
            for batch in batches:
                model.model(**bench.inputs(batch), use_cache=False)

    seconds = bench.timed(bare)
    size = (8 if bench.quick else 512) << 20
    bus, disk, memory = (
        device_to_host(bench.device, size),
        write_speed(bench.disk, size),
        write_speed(bench.memory, size),
    )
    rows: Rows = [
        (f"bare forward, {plan.n_rows:,} tokens", f"{seconds:.3f} s", ""),
        ("device to pinned host", f"{bus / 1e9:.1f} GB/s", "the limit"),
        ("disk; memory", f"{disk / 1e9:.1f}; {memory / 1e9:.1f} GB/s", "the limit"),
    ]
    wanted: dict[str, dict[str, Any]] = {
        "one layer": {"sites": {"resid_post": [depth // 2]}},
        "all layers": {"sites": ["resid_post"]},
        "all layers + mlp_post": {"sites": ["resid_post", "mlp_post"]},
    }
    for name, fields in wanted.items():
        for place, folder in (("disk", bench.disk), ("memory", bench.memory)):
            run = partial(bench.capture, model, folder / "cost.zarr", documents, **fields)
            took = bench.timed(run, 2)
            store = flexcache.open(folder / "cost.zarr")
            arrays = store.arrays.values()
            size = store.n_rows * sum(array.row_bytes * len(array.slices) for array in arrays)
            running = run_seconds(store)
            rows += [
                (f"{name}, {place} ÷ bare", f"{running / seconds:.2f}", "≤ 1.06 where the limits allow it"),
                ("", f"{size / running / 1e9:.2f} GB/s; {took - running:.1f} s of plan and checks", ""),
            ]
            shutil.rmtree(folder / "cost.zarr")
    run = partial(bench.capture, model, bench.memory / "cost.zarr", documents)
    share = overlap(run, bench.device)
    rows.append(("copies to the host that overlap with kernels", "–" if share is None else f"{share:.0%}", ""))
    more = forward_memory(run, bench.device) - forward_memory(bare, bench.device)
    return [*rows, ("peak device memory above the forward's", f"{more / 2**20:.0f} MiB", "")]


@contextmanager
def little_memory(bench: Bench, run: Callable[[], Any]) -> Iterator[None]:
    """Leave a model about half the memory that *run* takes; on a CPU, fail as a device does."""
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        run()
        peak = torch.cuda.max_memory_reserved()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(bench.device).total_memory
        torch.cuda.set_per_process_memory_fraction((before + (peak - before) / 2) / total)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return

    def fail(_: nn.Module, args: Any, given: dict[str, Any]) -> None:
        if given["input_ids"].numel() > 130:
            raise torch.OutOfMemoryError("no room")

    handle = bench.large.register_forward_pre_hook(fail, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def halving(bench: Bench) -> Rows:
    """Capture with too little memory for the planned batches."""
    documents, tokens = bench.documents(512, 512), 256 if bench.quick else 131_072
    fields: dict[str, Any] = {"sites": {"resid_post": [-1]}, "batch_tokens": tokens}
    run = partial(bench.capture, bench.large, bench.memory / "oom.zarr", documents, **fields)
    with little_memory(bench, run):
        store = run()
    lowest = min(store.ledger.read_record(unit).batch_tokens for unit in range(store.n_units))
    require(lowest < tokens, "nothing was halved")
    require(flexcache.verify(store.path).sound, "the store is not sound")
    return [("batches after running out of memory", f"{lowest:,} of {tokens:,} tokens; verified", "fewer")]


def flex_model(bench: Bench) -> Rows:
    """Compare FlexModel's reads and edits with hooks of torch."""
    model, depth = bench.large, len(bench.large.model.layers)
    ids = torch.randint(3, 500, (2, 16) if bench.quick else (8, 512), device=bench.device)
    kept: list[torch.Tensor] = []

    def forward(run: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return run(input_ids=ids, use_cache=False, logits_to_keep=1).logits

    bare = bench.timed(lambda: forward(model))
    handles = [block.register_forward_hook(lambda m, a, out: kept.append(out.cpu())) for block in model.model.layers]
    forward(model)
    expected = [*kept]
    cloning = bench.timed(lambda: (kept.clear(), forward(model)))
    for handle in handles:
        handle.remove()
    found: dict[str, list[torch.Tensor]] = {}
    flex = flexcache.FlexModel(model, found)
    for layer in range(depth):
        flex.register_forward_hook(flexcache.HookFunction(f"model.layers.{layer}"))
    forward(flex)
    for layer, rows in enumerate(expected):
        require(torch.equal(found[f"model.layers.{layer}"][0], rows), f"layer {layer} differs")
    reading = bench.timed(lambda: (found.clear(), forward(flex)))
    flex.restore()
    handle = model.model.layers[1].register_forward_hook(lambda m, a, out: out * 2)
    theirs = forward(model)
    handle.remove()
    edited = flexcache.FlexModel(model, {})
    edited.register_forward_hook(
        flexcache.HookFunction("model.layers.1", editing_function=lambda module, x, save_ctx, modules: x * 2)
    )
    ours = forward(edited)
    edited.restore()
    require(torch.equal(ours, theirs), "an edit differs from that of a hook of torch")
    return [
        ("reads of all blocks, and an edit", "equal", "equal"),
        ("reads to the host ÷ bare forward", f"{reading / bare:.2f}", f"hooks of torch: {cloning / bare:.2f}"),
    ]


def replaying(bench: Bench) -> Rows:
    """Time a replay from a stored residual stream, and compare it with the whole forward."""
    model, depth = bench.large, len(bench.large.model.layers)
    store = bench.capture(model, bench.memory / "replay.zarr", bench.documents(64, 512))
    engine, rows = Engine(store, model), []
    batches = list(engine.batches())

    def run(after: int | None) -> list[torch.Tensor]:
        start = () if after is None else (engine.start_at("resid_post", after),)
        last = [np.array([[len(tokens) - 1] for tokens in batch.tokens]) for batch in batches]
        return [engine.run(batch, *start, read=read).logits for batch, read in zip(batches, last, strict=True)]

    whole, seconds = run(None), bench.timed(lambda: run(None))
    for after in dict.fromkeys((0, depth // 2, depth - 2)):
        away = max(float((a.float() - b.float()).abs().max()) for a, b in zip(run(after), whole, strict=True))
        took = bench.timed(partial(run, after)) / seconds
        target = f"{(depth - after - 1) / depth:.2f}; 0"
        rows.append((f"after block {after} ÷ whole; away by", f"{took:.2f}; {away:.3g}", target))
        require(away <= 1e-2 * float(whole[0].float().abs().max()), f"replay after block {after} is away by {away:.3g}")
    return rows


def streaming(bench: Bench) -> Rows:
    """Move shuffled batches to the device."""
    store = bench.capture(bench.small, bench.memory / "stream.zarr", bench.documents(2000, 512))
    pinned = bench.device.type == "cuda"
    size = 64 if bench.quick else 4096
    tokens = flexcache.training.stream(store, "resid_post", layer=1, batch_size=size, return_tokens=True)
    expected, seen = torch.from_numpy(np.asarray(store.read("resid_post", 1), np.float32)), []
    for batch in tokens.loader(pin_memory=pinned):
        moved = batch["activations"].to(bench.device, non_blocking=True)
        require(torch.equal(moved.float().cpu(), expected[batch["row"]]), "a batch on the device has other rows")
        seen.append(batch["row"])
    require(torch.equal(torch.cat(seen).sort().values, torch.arange(store.n_rows)), "a row is missing or given twice")
    plain = flexcache.training.stream(store, "resid_post", layer=1, batch_size=size).loader(pin_memory=pinned)

    def move() -> None:
        for batch in plain:
            batch.to(bench.device, non_blocking=True)

    rate = store.n_rows / bench.timed(move)
    width = store.arrays["resid_post"].row_bytes
    return [
        (f"each of {store.n_rows:,} rows once, on the device", "equal", "equal"),
        ("rows a second", f"{rate:,.0f}, {rate * width / 1e9:.2f} GB/s", ""),
    ]


def small_and_gradients(bench: Bench) -> Rows:
    """Store int8 and gradients."""
    model, documents = bench.small, bench.documents(100, 128)
    wide = bench.capture(model, bench.memory / "wide.zarr", documents)
    narrow = bench.capture(model, bench.memory / "int8.zarr", documents, dtype="int8")
    a, b = (np.asarray(store.read("resid_post", 1), np.float32) for store in (wide, narrow))
    error = float((np.abs(a - b).max(1) / np.abs(a).max(1)).max())
    require(error <= 1 / 100, f"int8 is away by {error:.3g} of the largest value of a row")
    store = bench.capture(
        model, bench.memory / "grad.zarr", documents, sites=["resid_post.grad"], objective=flexcache.NextTokenLoss()
    )
    found: list[torch.Tensor] = []
    kept: list[torch.Tensor] = []

    def keep(_: nn.Module, args: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        kept[:] = [output]

    for batch in batches_of(store):
        handle = model.model.layers[1].register_forward_hook(keep)
        logits = model(**bench.inputs(batch), use_cache=False).logits
        handle.remove()
        labels = torch.from_numpy(batch.input_ids(-100)[:, 1:]).long().to(bench.device)
        nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
        ).backward()
        grad = kept[0].grad
        assert grad is not None
        found += [grad[line, first:last].float().cpu() for line, (first, last) in enumerate(batch.keep)]
        model.zero_grad()
    expected, ours = torch.cat(found).numpy(), np.asarray(store.read("resid_post.grad", 1), np.float32)
    away = float(np.linalg.norm(ours - expected) / np.linalg.norm(expected))
    require(away <= 2e-2, f"gradients are away by {away:.3g} of their norm")
    return [
        ("int8, error ÷ largest value of the row", f"{error:.4f}", "≤ 0.01"),
        ("gradients, away from autograd's by, of their norm", f"{away:.3g}", "≤ 0.02"),
    ]


PARTS: dict[str, Callable[[Bench], Rows]] = {
    "exact": exact,
    "cost": cost,
    "halving": halving,
    "flexmodel": flex_model,
    "replay": replaying,
    "stream": streaming,
    "int8-gradients": small_and_gradients,
}


def run_part(name: str, bench: Bench) -> str | None:
    """Run a part and show its table; return its error, if it has one."""
    began = time.perf_counter()
    try:
        rows = PARTS[name](bench)
        show(f"{name}, {time.perf_counter() - began:.0f} s", rows)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of the models")
    parser.add_argument("--quick", action="store_true", help="tiny models and few tokens")
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="on the disk that is measured")
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm"), help="a folder in memory (tmpfs)")
    parser.add_argument("--only", nargs="*", choices=[*PARTS], default=[*PARTS])
    parser.add_argument("--json", type=Path, help="where to write what was measured")
    parser.add_argument("--killed", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(dir=options.folder, prefix=".bench-") as disk,
        tempfile.TemporaryDirectory(dir=options.memory, prefix=".bench-") as memory,
    ):
        dtype = getattr(torch, options.dtype)
        bench = Bench(torch.device(options.device), dtype, options.quick, Path(disk), Path(memory))
        if options.killed:
            kill_oneself(bench, options.killed)
            return 1
        errors = {name: error for name in options.only if (error := run_part(name, bench))}
    on_gpu = bench.device.type == "cuda"
    device = torch.cuda.get_device_name(bench.device) if on_gpu else "CPU"
    tables = [Shown(*table)._asdict() for table in shown]
    if options.json:
        result = {"device": device, "torch": torch.__version__, "tables": tables, "errors": errors}
        options.json.write_text(json.dumps(result, indent=1, ensure_ascii=False))
    for name, error in errors.items():
        console.print(f"{name} failed: {error}", style="bold red", markup=False)
    console.print(f"{device}: {len(options.only) - len(errors)} of {len(options.only)} parts passed")
    return int(bool(errors))


if __name__ == "__main__":
    sys.exit(main())
