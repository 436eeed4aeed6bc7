"""Replay of SmolLM2-135M on a CPU: what a forward from block k on costs, and a patching grid beside its peers.

    python -m benchmarks.replay [--documents 100] [--rounds 5] [--only skip|grid]

(1) Forwards without lm_head over the capture's batches, in bfloat16 where that is quick, else in float32: whole, and
going on after block k. The floor is the share of the blocks that run. (2) A grid of 30 layers × 10 positions, one
prompt patched with another's residual stream, in float32, the logit difference of each cell: FlexCache from its
store, 110 cells side by side and one by one; TransformerLens' `get_act_patch_resid_pre`; nnsight, ten and a hundred
invokes a trace. Peers that are not installed are left out: they are no dependency (pip install transformer-lens
nnsight). The store and the peers' caches are made before.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import flexcache
from analysis import replay
from analysis.replay import Engine
from benchmarks.model import DTYPE, smollm2
from benchmarks.timing import interleave, ratio, show
from flexcache.model import ModelSource
from pipelines.demo import assets

AFTER = (4, 9, 14, 19, 24, 28)
POSITIONS = 10
SIDE, ALONE = "flexcache, 110 side by side", "flexcache, one by one"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["skip", "grid"])
    parser.add_argument("--folder", type=Path, default=None, help="where to write; the current folder by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder or Path.cwd(), prefix=".bench-") as folder:
        if options.only in (None, "skip"):
            skip(Path(folder), options.documents, options.rounds)
        if options.only in (None, "grid"):
            grid(Path(folder), options.rounds)


def skip(folder: Path, documents: int, rounds: int) -> None:
    source = smollm2()
    model, path = source.load(), folder / "skip.zarr"
    store = flexcache.capture(
        model, source.tokenizer(), str(assets.vader_sample(documents)), path, layers=list(AFTER), progress=False
    )
    engine = Engine(store, model.model, accept=["weights"])  # the part without lm_head
    batches = list(engine.batches())
    depth = engine.depth

    def forward(after: int | None) -> None:
        start = replay.Start(0) if after is None else engine.start_at("resid_post", after)
        for batch in batches:
            engine.run(batch, start)

    variants: dict[str, Callable[[], None]] = {"whole": lambda: forward(None)}
    variants |= {f"after {k}": lambda k=k: forward(k) for k in AFTER}  # type: ignore[misc]
    seconds = interleave(variants, rounds)
    rows = [
        (
            f"after block {k} ÷ whole",
            f"{ratio(seconds[f'after {k}'], seconds['whole']):.3f}",
            f"≤ {(depth - k - 1) / depth + 0.05:.3f}",
        )
        for k in AFTER
    ]
    show(
        f"replay, {DTYPE}, {len(batches)} batches, {torch.get_num_threads()} threads",
        [*rows, ("whole forward without lm_head", f"{statistics.median(seconds['whole']):.2f} s", "")],
    )


def grid(folder: Path, rounds: int) -> None:
    source = smollm2("float32")
    model, tokenizer = source.load(), source.tokenizer()
    texts = {"clean": "The film was great, so I felt very", "corrupted": "The film was awful, so I felt very"}
    tokens = {name: tokenizer(text)["input_ids"] for name, text in texts.items()}
    count = min(len(ids) for ids in tokens.values())
    assert len({len(ids) for ids in tokens.values()}) == 1
    if count < POSITIONS:
        tokens = {name: [ids[0]] * (POSITIONS - count) + ids for name, ids in tokens.items()}
    tokens = {name: ids[-POSITIONS:] for name, ids in tokens.items()}
    good, bad = (tokenizer(word)["input_ids"][0] for word in (" happy", " sad"))
    documents = [{"id": name, "tokens": ids} for name, ids in tokens.items()]
    store = flexcache.capture(model, None, documents, folder / "grid.zarr", sites=["resid_pre"], progress=False)
    found: dict[str, np.ndarray] = {}

    def ours(copies: int, name: str) -> None:
        sweep = replay.sweep(
            store,
            model,
            replay.grid("resid_pre", positions=list(range(POSITIONS))),
            replay.Patch({"corrupted": "clean"}),
            ["logit_diff"],
            (),
            answers=(good, bad),
            documents=["corrupted"],
            readout="last",
            copies=copies,
            progress=False,
        )
        found[name] = sweep.results["value"].squeeze().transpose("layer", "position").values

    variants: dict[str, Callable[[], Any]] = {
        SIDE: lambda: ours(110, SIDE),
        ALONE: lambda: ours(1, ALONE),
    }
    ids = {name: torch.tensor([line]) for name, line in tokens.items()}
    makers = {"TransformerLens": transformer_lens} | {f"nnsight, {n} a trace": partial(nnsight, n) for n in (10, 100)}
    for name, make in makers.items():
        with contextlib.suppress(ImportError):
            run = make(source, model, tokenizer, ids, (good, bad))
            variants[name] = lambda name=name, run=run: found.__setitem__(name, run())
    missing = [name for name in makers if name not in variants]
    seconds = interleave(variants, rounds)
    exact = found[ALONE]
    rows = [(f"{name} not installed", "–", "") for name in missing]
    for name in makers.keys() & variants.keys():
        rows += [(f"{mine} ÷ {name}", f"{ratio(seconds[mine], seconds[name]):.3f}", "≤ 0.5") for mine in (SIDE, ALONE)]
    for name in variants:
        away = float(np.abs(found[name] - exact).max())
        rows.append((name, f"{statistics.median(seconds[name]):.2f} s, within {away:.1e} of one by one", ""))
    show(f"{exact.shape[0]} × {exact.shape[1]} patching grid, float32, {torch.get_num_threads()} threads", rows)


def transformer_lens(
    source: ModelSource, model: Any, tokenizer: Any, ids: dict[str, torch.Tensor], answer: tuple[int, int]
) -> Callable[[], np.ndarray]:
    from transformer_lens import patching
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(source.name, hf_model=source.load(), tokenizer=tokenizer, device="cpu")
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids["clean"])

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[0, -1, answer[0]] - logits[0, -1, answer[1]]

    def run() -> np.ndarray:
        with torch.no_grad():
            return np.asarray(patching.get_act_patch_resid_pre(bridge, ids["corrupted"], cache, metric).detach())

    return run


def nnsight(
    invokes: int,
    source: ModelSource,
    model: Any,
    tokenizer: Any,
    ids: dict[str, torch.Tensor],
    answer: tuple[int, int],
) -> Callable[[], np.ndarray]:
    from nnsight import LanguageModel

    wrapped = LanguageModel(source.load(), tokenizer=tokenizer)
    depth = len(model.model.layers)
    clean: list[torch.Tensor] = []
    model.eval()
    handles = [
        block.register_forward_pre_hook(lambda _, args: clean.append(args[0].clone())) for block in model.model.layers
    ]
    with torch.no_grad():
        model(ids["clean"])
    for handle in handles:
        handle.remove()
    cells = [(layer, position) for layer in range(depth) for position in range(POSITIONS)]

    def run() -> np.ndarray:
        saved = []
        with torch.no_grad():
            for first in range(0, len(cells), invokes):
                with wrapped.trace() as tracer:
                    for layer, position in cells[first : first + invokes]:
                        with tracer.invoke(ids["corrupted"]):
                            wrapped.model.layers[layer].input[:, position] = clean[layer][:, position]
                            saved.append(wrapped.lm_head.output[0, -1].save())
        differences = [float(logits[answer[0]] - logits[answer[1]]) for logits in saved]
        return np.array(differences).reshape(depth, POSITIONS)

    return run


if __name__ == "__main__":
    main()
