"""Compare a capture while completions are generated with a generation and then a run over the whole text.

    python -m benchmarks.decoding [--prompts 32] [--tokens 96] [--new 32] [--rounds 3]

SmolLM2-135M, random prompts in one batch, resid_post of all layers and of three; the floor is a generation of which
nothing is stored. The figures are CPU seconds of the
process, so that other processes of the machine count less. What every capture does once, such as the checks of the
model, is measured by a capture of one prompt and one token, and taken off.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import flexcache
from benchmarks.model import smollm2
from benchmarks.timing import interleave, ratio, show

LAYERS: dict[str, Any] = {"all layers": "all", "3 layers": [9, 19, 29]}
WAYS = {"while it generates": True, "generate, then capture": False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=96, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens of a completion")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model = smollm2().load()
    model.generation_config.eos_token_id = None  # completions of one length
    shape = (options.prompts, options.tokens)
    prompts = [{"tokens": tokens} for tokens in np.random.default_rng(0).integers(100, 40_000, shape).tolist()]

    def seconds(layers: Any, capture: bool, count: int, new: int) -> float:
        generation = {"max_new_tokens": new, "batch": options.prompts, "capture": capture}
        with tempfile.TemporaryDirectory() as folder:
            began = time.process_time()
            path = Path(folder) / "run.zarr"
            flexcache.capture(model, None, prompts[:count], path, layers=layers, generate=generation, progress=False)
            return time.process_time() - began

    def measured(layers: Any, capture: bool) -> Callable[[], float]:
        return lambda: seconds(layers, capture, options.prompts, options.new) - seconds(layers, capture, 1, 1)

    def generate(count: int, new: int) -> float:
        ids = torch.tensor([prompt["tokens"] for prompt in prompts[:count]])
        settings = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        began = time.process_time()
        with torch.inference_mode():
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
        return time.process_time() - began

    bare = "generation alone"
    variants = {bare: lambda: generate(options.prompts, options.new) - generate(1, 1)} | {
        f"{name}: {way}": measured(layers, capture) for name, layers in LAYERS.items() for way, capture in WAYS.items()
    }
    found = interleave(variants, options.rounds, warm=False)
    text = f"{options.prompts} × ({options.tokens} + {options.new}) tokens, {torch.get_num_threads()} threads"
    rows = []
    for name in LAYERS:
        one, two = (found[f"{name}: {way}"] for way in WAYS)
        of = "÷ generate, then capture"
        rows.append((f"{name}: captured while it generates {of}", f"{ratio(one, two):.2f}", "≤ 0.6"))
        rows.append((f"{name}: {bare} {of} (floor)", f"{ratio(found[bare], two):.2f}", ""))
    show(f"completions of SmolLM2-135M: {text}; CPU seconds", rows)


if __name__ == "__main__":
    main()
