"""Compare a base model with a LoRA adapter of it: what did fine-tuning change?

    python examples/finetuning.py [FOLDER]

A tiny random Llama learns to count by an adapter in its upper half, with PEFT. Base and adapter are captured into two
stores with the same rows, and compared: norms of differences by layer and token, CKA, a probe of one on the other,
activations of the base patched into the adapter by replay, and a crosscoder of both. See docs/finetuning.md.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import xarray as xr
from models import tiny_llama
from torch import nn

import flexcache
from analysis import probes, replay, similarity

SITE, FIRST, LENGTH = "resid_post", 3, 16


def sequences(count: int, seed: int) -> list[dict[str, Any]]:
    """Return documents that count around a clock of 11 tokens in steps of 1, 2 or 3, which is their label."""
    random = np.random.default_rng(seed)
    steps, starts = random.integers(1, 4, size=count), random.integers(0, 11, size=count)
    return [
        {"id": str(number), "tokens": [FIRST + int(start + step * i) % 11 for i in range(LENGTH)], "step": f"by {step}"}
        for number, (step, start) in enumerate(zip(steps, starts, strict=True))
    ]


def train(folder: Path, steps: int = 150) -> None:
    """Save a base model, and a LoRA adapter of blocks 2 and 3 that learns what comes next."""
    base = tiny_llama()
    for embedding in (base.get_input_embeddings(), base.get_output_embeddings()):
        embedding.weight.data *= 10  # as large as in trained models, so that little of LoRA is spent on their scale
    base.save_pretrained(folder / "base")
    base = flexcache.ModelSource(name=str(folder / "base")).load()
    modules = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    where: dict[str, Any] = {"target_modules": modules, "layers_to_transform": [2, 3], "task_type": "CAUSAL_LM"}
    config = peft.LoraConfig(r=16, lora_alpha=32, **where)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # names of transformers that peft still uses
        model = peft.get_peft_model(base, config)
    optimizer = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=5e-3)
    for step in range(steps):
        ids = torch.tensor([document["tokens"] for document in sequences(32, seed=step)])
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"loss after {steps} steps of training: {loss.item():.2f}")
    model.save_pretrained(folder / "adapter")


def changes(base: flexcache.Store, tuned: flexcache.Store) -> xr.DataArray:
    """Return the norm of the difference relative to the norm of the base, by layer and position."""
    one, other = base[SITE], tuned[SITE]
    relative = np.sqrt(((other - one) ** 2).sum("hidden") / (one**2).sum("hidden"))
    return relative.groupby("position").mean("token").compute()


def transferred(base: flexcache.Store, tuned: flexcache.Store) -> xr.Dataset:
    """Return the accuracy of probes for the step that were fitted to the base, by layer, on both."""
    sweep = probes.sweep(base, "step", site=SITE, rows="last", cv=3, resamples=100, baselines=())
    there = probes.transfer(sweep, tuned, "step", resamples=100, other_model=True)
    own = probes.sweep(tuned, "step", site=SITE, rows="last", cv=3, resamples=100, baselines=())
    found = {"base": sweep.results["score"], "base on adapter": there["score"], "adapter": own.results["score"]}
    scores = {name: score.sel(metric="accuracy").reset_coords(drop=True).squeeze() for name, score in found.items()}
    return xr.Dataset({name: score.mean("fold") if "fold" in score.dims else score for name, score in scores.items()})


@dataclass(frozen=True, eq=False, repr=False)
class PatchFrom(replay.Edit):
    """Replace activations by those of the same tokens in another store, whose rows are the same."""

    store: Any

    def change(self, x: torch.Tensor, context: replay.EditContext) -> torch.Tensor:
        rows = context.source.row_start[context.documents] + context.positions
        return torch.from_numpy(self.store.read(context.site, context.layer, rows)).to(x)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "PatchFrom", "store": str(self.store.path)}


def undone(base: flexcache.Store, tuned: flexcache.Store, model: nn.Module) -> np.ndarray:
    """Return the adapter's loss: as it is, and with the residual stream of the base after each of its blocks."""
    at = replay.grid(SITE, layers="all", positions="all")
    found = replay.sweep(tuned, model, at, PatchFrom(base), metrics=["loss"], progress=False)
    mean = found.results["value"].mean("document").squeeze(drop=True)
    return np.array([float(mean.sel(arm="identity").isel(layer=0)), *mean.sel(arm="edit").values])


class Crosscoder(nn.Module):
    """One set of k active latents for both models, with a decoder for each (Lindsey et al. 2024)."""

    def __init__(self, names: tuple[str, ...], hidden: int, latents: int, k: int) -> None:
        super().__init__()
        self.k = k
        made = {name: torch.randn(latents, hidden) / hidden**0.5 for name in names}
        self.decoders = nn.ParameterDict({name: value.clone() for name, value in made.items()})
        self.encoders = nn.ParameterDict({name: value.clone() for name, value in made.items()})

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        values = sum(batch[name] @ encoder.T for name, encoder in self.encoders.items())
        top = values.topk(self.k, dim=-1)
        active = torch.zeros_like(values).scatter(-1, top.indices, top.values.relu())
        return {name: active @ decoder for name, decoder in self.decoders.items()}


def crosscode(base: flexcache.Store, tuned: flexcache.Store, layer: int, steps: int = 400) -> tuple[float, np.ndarray]:
    """Train a crosscoder; return the variance it leaves unexplained, and the adapter's share of each latent's norm."""
    stores = {"base": base, "adapter": tuned}
    batches = flexcache.training.stream(stores, SITE, layer, batch_size=512, normalize="unit_norm", drop_last=True)
    coder = Crosscoder(tuple(stores), base.arrays[SITE].features, latents=256, k=8)
    optimizer = torch.optim.Adam(coder.parameters(), lr=3e-3)
    step, last = 0, 1.0
    while step < steps:
        for batch in batches:  # a dict of tensors by store, row for row
            given = coder(batch)
            error = sum((batch[name] - given[name]).pow(2).sum() for name in batch)
            unexplained = error / sum((value - value.mean(0)).pow(2).sum() for value in batch.values())
            optimizer.zero_grad()
            unexplained.backward()
            optimizer.step()
            step, last = step + 1, unexplained.item()
    norms = {name: decoder.detach().norm(dim=1).numpy() for name, decoder in coder.decoders.items()}
    return last, norms["adapter"] / (norms["base"] + norms["adapter"])


def main(folder: Path) -> None:
    torch.manual_seed(0)
    np.set_printoptions(precision=2, suppress=True)
    train(folder)
    source = flexcache.ModelSource(name=str(folder / "base"), adapters={"base": None, "tuned": str(folder / "adapter")})
    stores = flexcache.capture_variants(source, None, sequences(300, seed=1000), folder / "runs", progress=False)
    base, tuned = stores["base"], stores["tuned"]

    relative = changes(base, tuned)
    print("difference ÷ norm, by layer:", relative.mean("position").values)
    print("after the last block, by position:", relative.isel(layer=-1).values)
    cka = similarity.stores(base, tuned, SITE, permutations=0)["cka"]
    print("CKA of each layer with itself:", np.diagonal(cka.values))
    for name, score in transferred(base, tuned).items():
        print(f"accuracy of a probe for the step, {name}:", score.values)
    losses = undone(base, tuned, source.variants()["tuned"].load())
    print(f"loss of the adapter: {losses[0]:.2f}; with the base's residual stream after each block:", losses[1:])
    unexplained, share = crosscode(base, tuned, layer=3)
    print(f"crosscoder: {unexplained:.2f} of the variance unexplained; the adapter's share of decoder norms:")
    print(np.histogram(share, bins=[0, 0.2, 0.4, 0.6, 0.8, 1])[0], "latents from 0 to 1 in fifths")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as made:
            main(Path(made))
