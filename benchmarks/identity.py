"""Measure what it costs to know a model: every value digested, and one small forward, in seconds.

    python -m benchmarks.identity [--rounds 5]

Models: SmolLM2-135M, and random weights with the sizes of Llama 3.2 1B, both in float32. The floor is reading the same
bytes once (their sum); the peer is SHA-256, by which hubs know files of weights; "before" is a digest of 64 values a
tensor, as earlier versions took it.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
from collections.abc import Callable

import torch
import transformers

from benchmarks.timing import interleave, ratio, show
from flexcache.identity.behavior import record_behavior
from flexcache.identity.describe import describe_model, sample_digest
from flexcache.identity.weights import digest_tensors
from flexcache.recording.run.fingerprint import fingerprint
from pipelines.demo import assets

ONE_BILLION = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}


def smollm2() -> torch.nn.Module:
    folder = assets.smollm2()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def one_billion() -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**ONE_BILLION)).eval()


def read_once(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        parameter.detach().sum()


def sha256(model: torch.nn.Module) -> None:
    hasher = hashlib.sha256()
    for parameter in model.parameters():
        hasher.update(parameter.detach().reshape(-1).view(torch.uint8).numpy().data)


def measure(name: str, make: Callable[[], torch.nn.Module], rounds: int) -> None:
    model = make()
    count = sum(parameter.numel() for parameter in model.parameters())
    conditions = fingerprint(model)
    seconds = interleave(
        {
            "floor": lambda: read_once(model),
            "sha256": lambda: sha256(model),
            "before": lambda: sample_digest(model) and None,
            "values": lambda: digest_tensors(model) and None,
            "behavior": lambda: record_behavior(model, conditions) and None,
            "all": lambda: describe_model(model, conditions) and None,
        },
        rounds,
    )
    rows = [
        ("before: a sample of the values, s", f"{statistics.median(seconds['before']):.3f}", "–"),
        ("every value, s", f"{statistics.median(seconds['values']):.3f}", "–"),
        ("one small forward, s", f"{statistics.median(seconds['behavior']):.3f}", "–"),
        ("all of it, s", f"{statistics.median(seconds['all']):.3f}", "≤ 10"),
        ("every value ÷ reading the bytes once", f"{ratio(seconds['values'], seconds['floor']):.2f}", "≤ 2"),
        ("SHA-256 ÷ reading the bytes once", f"{ratio(seconds['sha256'], seconds['floor']):.2f}", "a peer"),
    ]
    show(f"{name}: {count / 1e6:,.0f} million parameters, float32", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    measure("SmolLM2", smollm2, rounds)
    measure("Llama 3.2 1B, random weights", one_billion, rounds)


if __name__ == "__main__":
    main()
