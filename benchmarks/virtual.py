"""Virtual layers of SmolLM2-135M beside a store of all layers, and beside the bare blocks that have to run.

    python -m benchmarks.virtual [--texts 1000] [--rounds 3]

Rated reviews, the residual stream of 30 blocks: all on disk, or every sixth. (1) Bytes, and captures. (2) A probe sweep
over all layers at the last token, from each store: the scores must be equal to the last bit. The bare forward is that
of the model without lm_head, over the batches of the capture. (3) All rows of blocks 6 to 10, recomputed, beside these
blocks alone. (4) 64 random rows of the MLPs of blocks 6 to 11, one to six blocks above the residual stream on disk,
in stores of at most 250 texts: beside a read from disk, and beside the blocks alone on the same batches. All files are
in the page cache, and the cache of recomputed rows is empty.

The bare blocks are called one after the other, with inputs, masks and positions that were made before. Figures are CPU
seconds of the process, so that other processes of the machine count less. What is done once, attaching a model and
opening a store, is not in them, except in captures.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import flexcache
from analysis import probes
from analysis.replay import Engine
from benchmarks.model import DTYPE, smollm2
from benchmarks.timing import interleave, ratio, show
from flexcache.recording.forward.batch import Batch
from pipelines.demo import assets

KEPT, RANGE, READS = 5, range(6, 11), range(6, 12)
ROWS, READ_TEXTS = 64, 250
BlockInput = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional and the named arguments of a block, for one batch."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3, help="of (3) and (4); captures and sweeps run once")
    options = parser.parse_args()
    source = smollm2()
    model, tokenizer = source.load(), source.tokenizer()
    text = f"{DTYPE}, {torch.get_num_threads()} threads; CPU seconds"
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as folder:
        base = Path(folder)

        def capture(name: str, count: int, **settings: Any) -> flexcache.Store:
            texts = str(assets.vader_sample(count))
            return flexcache.capture(model, tokenizer, texts, base / name, progress=False, **settings)

        full, kept = capture_both(base, capture, options.texts, text)
        sweep(full, kept, model, text)
        recompute(kept, model, options.rounds, text)
        read_at_random(capture, min(READ_TEXTS, options.texts), model, options.rounds, text)


def capture_both(
    base: Path, capture: Callable[..., flexcache.Store], texts: int, text: str
) -> tuple[flexcache.Store, flexcache.Store]:
    """Capture all layers and every sixth; return both stores."""
    made: dict[str, flexcache.Store] = {}

    def run(name: str, **settings: Any) -> float:
        return cpu_seconds(lambda: made.update({name: capture(name, texts, sites=["resid_post"], **settings)}))

    capture("warm", min(60, texts), sites=["resid_post"])
    variants: dict[str, Callable[[], float]] = {
        "full": partial(run, "full"),
        "kept": partial(run, "kept", keep={"resid_post": "every 6"}),
    }
    seconds = interleave(variants, 1, warm=False)
    full, kept = made["full"], made["kept"]
    share = folder_bytes(kept.path) / folder_bytes(full.path)
    rows = [
        ("bytes of every sixth layer ÷ all layers", f"{share:.3f}", "≤ 0.21"),
        ("capture of every sixth layer ÷ all layers", f"{ratio(seconds['kept'], seconds['full']):.2f}", ""),
        ("capture of all layers", f"{statistics.median(seconds['full']):.2f} s", ""),
    ]
    show(f"virtual layers, {texts:,} texts, {text}", rows)
    return full, kept


def sweep(full: flexcache.Store, kept: flexcache.Store, model: Any, text: str) -> None:
    """Compare a sweep over virtual layers with one from disk."""
    found: dict[str, Any] = {}
    batches = batches_of(kept, model)

    def run(name: str, store: flexcache.Store, layers: Any = "all") -> float:
        def scores() -> None:
            found[name] = probes.sweep(store, "label", "resid_post", rows="last", layers=layers, progress=False)

        return cpu_seconds(scores)

    def virtual() -> float:
        with flexcache.attach(kept, model) as attached:
            return run("virtual", attached)

    def forward() -> float:
        return cpu_seconds(lambda: [call(model.model, batch) for batch in batches])

    run("warm", full, 0)
    variants: dict[str, Callable[[], float]] = {
        "disk": partial(run, "disk", full),
        "virtual": virtual,
        "forward": forward,
    }
    seconds = interleave(variants, 1, warm=False)
    results = {name: found[name].results for name in ("disk", "virtual")}
    if not results["virtual"].identical(results["disk"]):
        raise AssertionError("a sweep over virtual layers has other scores than one from disk")
    share = ratio(seconds["forward"], seconds["disk"])
    rows = [
        (
            "from virtual layers ÷ from disk",
            f"{ratio(seconds['virtual'], seconds['disk']):.2f}",
            f"≤ {share + 1.3:.2f}",
        ),
        ("bare forward ÷ from disk", f"{share:.2f}", ""),
        ("layers with the same scores, to the last bit", f"{results['disk'].sizes['layer']} of 30", ""),
        ("from disk", f"{statistics.median(seconds['disk']):.2f} s", ""),
    ]
    show(f"probe sweep of 30 layers, {len(kept.documents):,} texts, {text}", rows)


def recompute(kept: flexcache.Store, model: Any, rounds: int, text: str) -> None:
    """Compare rows of a range of layers, recomputed, with the blocks alone."""
    inputs = block_inputs(model, batches_of(kept, model))

    def ours() -> float:
        with flexcache.attach(kept, model) as store:
            return cpu_seconds(lambda: store.prefetch("resid_post", layers=list(RANGE)))

    seconds = interleave({"ours": ours, "bare": lambda: cpu_seconds(lambda: run_blocks(model, inputs, RANGE))}, rounds)
    rows = [
        ("blocks 6 to 10, all rows ÷ the bare blocks", f"{ratio(seconds['ours'], seconds['bare']):.3f}", "≤ 1.15"),
        ("the bare blocks", f"{statistics.median(seconds['bare']):.2f} s", ""),
    ]
    show(f"recomputation, {len(kept.documents):,} texts, {text}", rows)


def read_at_random(capture: Callable[..., flexcache.Store], texts: int, model: Any, rounds: int, text: str) -> None:
    """Compare reads of random rows with reads from disk, and with the blocks alone, by the number of blocks."""
    sites = {"resid_post": [KEPT], "mlp_post": list(READS)}
    disk = capture("disk", texts, sites=sites)
    kept = capture("virtual", texts, sites=sites, keep={"resid_post": [KEPT]})
    draws = np.random.default_rng(0)
    inputs: list[BlockInput] = []
    batches = batches_of(kept, model)
    numbers: list[int] = []

    def read(layer: int) -> tuple[float, float, float]:
        with flexcache.attach(kept, model) as store:
            virtual = cpu_seconds(lambda: store.read("mlp_post", layer, numbers))
        stored = [cpu_seconds(lambda: disk.read("mlp_post", layer, numbers)) for _ in range(5)]
        bare = cpu_seconds(lambda: run_blocks(model, inputs, range(KEPT + 1, layer + 1)))
        return virtual, statistics.median(stored), bare

    def one_round() -> dict[int, tuple[float, float, float]]:
        numbers[:] = np.sort(draws.choice(kept.n_rows, ROWS, replace=False)).tolist()
        chosen = [batch for batch in batches if np.isin(numbers, batch.rows).any()]
        inputs[:] = block_inputs(model, chosen)
        return {layer: read(layer) for layer in READS}

    one_round()
    found = [one_round() for _ in range(rounds)]
    rows = []
    for layer in READS:
        ours, theirs, bare = (list(part) for part in zip(*(one[layer] for one in found), strict=True))
        name = f"{layer - KEPT} block{'s' * (layer > KEPT + 1)}"
        rows.append((f"{name} ÷ from disk", f"{ratio(ours, theirs):,.0f}", ""))
        rows.append((f"{name} ÷ the bare blocks", f"{ratio(ours, bare):.2f}", ""))
    plan = kept.explain("mlp_post", layers=READS[0], rows=numbers)
    rows.append((f"batches that hold the rows, of {len(batches)}", f"{plan.batches}", ""))
    show(f"{ROWS} random rows of {kept.n_rows:,}, {text}", rows)


def cpu_seconds(run: Callable[[], Any]) -> float:
    """Return the CPU seconds that a call takes, of all threads of the process."""
    began = time.process_time()
    run()
    return time.process_time() - began


def folder_bytes(path: Any) -> int:
    """Return the bytes of all files of a folder."""
    return sum(file.stat().st_size for file in Path(str(path)).rglob("*") if file.is_file())


def batches_of(store: flexcache.Store, model: Any) -> list[Batch]:
    """Return the batches of a capture, as they were padded."""
    return list(Engine(store, model, accept=["weights"]).batches())


@torch.inference_mode()
def call(model: Any, batch: Batch) -> None:
    """Run a model on a batch."""
    ids, mask = (torch.from_numpy(values) for values in (batch.input_ids(), batch.attention_mask()))
    model(input_ids=ids, attention_mask=mask, use_cache=False)


class StoppedError(Exception):
    """The forward was stopped: the inputs of the block are there."""


def block_inputs(model: Any, batches: Iterable[Batch]) -> list[BlockInput]:
    """Return what the first block after the kept layer is called with, for each batch."""
    found: list[BlockInput] = []

    def keep(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.append((given, named))
        raise StoppedError

    handle = model.model.layers[KEPT + 1].register_forward_pre_hook(keep, with_kwargs=True)
    for batch in batches:
        try:
            call(model.model, batch)
        except StoppedError:
            continue
    handle.remove()
    return found


@torch.inference_mode()
def run_blocks(model: Any, inputs: Iterable[BlockInput], blocks: range) -> None:
    """Run blocks one after the other on the inputs of the first."""
    for (residual, *others), named in inputs:
        for number in blocks:
            output = model.model.layers[number](residual, *others, **named)
            residual = output if isinstance(output, torch.Tensor) else output[0]


if __name__ == "__main__":
    main()
