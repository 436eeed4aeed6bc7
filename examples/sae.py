"""A TopK sparse autoencoder from a store: trained, judged by replay, and shown.   python examples/sae.py [STORE MODEL]

Without arguments it captures the residual stream of a tiny random model first, so that it runs anywhere. The
autoencoder is that of Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (arXiv:2406.04093): k latents a
token, and an auxiliary loss that revives latents which have not been active for a while.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn

import flexcache
from analysis import replay
from analysis.dataset.tokens import vocabulary
from analysis.readout import examples


class TopK(nn.Module):
    """An autoencoder of which the k largest latents of a token are active.

    Activations are taken less *mean*, and divided by *scale*, so that what is learned does not depend on their size.
    """

    def __init__(self, mean: torch.Tensor, scale: float, latents: int, k: int) -> None:
        super().__init__()
        self.k = k
        self.register_buffer("mean", mean)
        self.register_buffer("scale", torch.tensor(scale))
        directions = torch.randn(latents, len(mean), generator=torch.Generator().manual_seed(0))
        self.decoder = nn.Parameter(nn.functional.normalize(directions, dim=1))
        self.encoder = nn.Parameter(self.decoder.detach().clone())
        self.bias = nn.Parameter(torch.zeros(latents))

    def normalized(self, x: torch.Tensor) -> torch.Tensor:
        return (x.float() - self.mean) / self.scale

    def latents(self, x: torch.Tensor) -> torch.Tensor:
        """Return the values of all latents before the k largest are chosen, shape (rows, latents)."""
        return self.normalized(x) @ self.encoder.T + self.bias

    def keep(self, values: torch.Tensor, k: int) -> torch.Tensor:
        top = values.topk(k, dim=-1)
        return torch.zeros_like(values).scatter(-1, top.indices, top.values.relu())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.keep(self.latents(x), self.k) @ self.decoder * self.scale + self.mean

    @torch.no_grad()
    def renew(self) -> None:
        """Give the decoder's directions length one again."""
        self.decoder.copy_(nn.functional.normalize(self.decoder, dim=1))


def train(sae: TopK, batches: flexcache.training.Stream, steps: int, asleep: int) -> tuple[list[float], torch.Tensor]:
    """Train; return the share of variance unexplained by step, and for how many rows each latent has been silent."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    silent, curve = torch.zeros(len(sae.bias), dtype=torch.long), []
    while len(curve) < steps:
        for batch in batches:  # another epoch each time, in another order
            x, values = sae.normalized(batch), sae.latents(batch)
            active = sae.keep(values, sae.k)
            error = x - active @ sae.decoder
            loss = error.pow(2).sum() / (x - x.mean(0)).pow(2).sum()
            curve.append(loss.item())
            silent = torch.where((active > 0).any(0), 0, silent + len(batch))
            if (dead := silent > asleep).any():  # the dead ones are to explain what the others do not
                of_dead = values.masked_fill(~dead, -torch.inf)
                revived = sae.keep(of_dead, min(int(dead.sum()), 2 * sae.k)) @ sae.decoder
                loss = loss + (error.detach() - revived).pow(2).sum() / error.detach().pow(2).sum() / 32
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sae.renew()
            if len(curve) == steps:
                break
    return curve, silent


@torch.no_grad()
def judged(sae: TopK, store: flexcache.Store, layer: int, rows: np.ndarray) -> dict[str, Any]:
    """Return the share of variance unexplained, and of latents that are active nowhere, on rows."""
    x = torch.from_numpy(store.read("resid_post", layer, rows))
    active = torch.cat([sae.keep(sae.latents(part), sae.k) for part in x.split(4096)])
    error = torch.cat([part - sae(part) for part in x.split(4096)])
    unexplained = error.pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    return {
        "rows": len(rows),
        "variance unexplained": float(unexplained),
        "latents active nowhere": float((~(active > 0).any(0)).float().mean()),
        "active latents a row": float((active > 0).float().sum(1).mean()),
    }


def spliced(sae: TopK, store: flexcache.Store, model: nn.Module, layer: int, documents: list[str]) -> dict[str, float]:
    """Return the next-token loss with the autoencoder in the place of the layer's output, by replay.

    The first token stays as it is: its massive activation is an attention sink, and not what the autoencoder is for.
    """

    @torch.no_grad()
    def through(_: nn.Module, x: torch.Tensor, *more: Any) -> torch.Tensor:
        return torch.cat([x[:, :1], sae(x[:, 1:]).to(x.dtype)], dim=1)

    @torch.no_grad()
    def average(_: nn.Module, x: torch.Tensor, *more: Any) -> torch.Tensor:
        return torch.cat([x[:, :1], sae.mean.to(x.dtype).expand_as(x[:, 1:])], dim=1)

    at = replay.grid("resid_post", layers=[layer], positions="all")
    losses = {}
    for name, function in (("autoencoder", through), ("mean", average)):
        found = replay.sweep(
            store, model, at, replay.Function(function), metrics=["loss"], documents=documents, progress=False
        )
        mean = found.results["value"].mean("document").squeeze(drop=True)
        losses |= {name: float(mean.sel(arm="edit")), "model": float(mean.sel(arm="identity"))}
    recovered = (losses["mean"] - losses["autoencoder"]) / (losses["mean"] - losses["model"])
    return {**{f"loss, {name}": value for name, value in losses.items()}, "loss recovered": recovered}


@torch.no_grad()
def page(sae: TopK, store: flexcache.Store, layer: int, rows: np.ndarray, count: int, words: Any) -> str:
    """Return HTML with the tokens that excite *count* latents most, in context, those that are often active first."""
    best: list[tuple[torch.Tensor, torch.Tensor]] = []
    often = torch.zeros(len(sae.bias))
    for start in range(0, len(rows), 4096):
        part = rows[start : start + 4096]
        active = sae.keep(sae.latents(torch.from_numpy(store.read("resid_post", layer, part))), sae.k)
        often += (active > 0).sum(0)
        top = active.topk(min(32, len(part)), dim=0)
        best.append((top.values, torch.from_numpy(part)[top.indices]))
    values, places = torch.cat([v for v, _ in best]), torch.cat([r for _, r in best])
    rare = (often > 8) & (often < len(rows) / 50)
    chosen = torch.argsort(torch.where(rare, often, -1), descending=True)[:count]
    order = values[:, chosen].argsort(dim=0, descending=True)[:32]
    dims = ("rank", "direction")
    found = xr.Dataset(
        {
            "value": (dims, values[:, chosen].gather(0, order).numpy()),
            "row": (dims, places[:, chosen].gather(0, order).numpy()),
        }
    )
    directions = (sae.encoder[chosen] / sae.scale).double().numpy()
    shown = examples.shown(store, "resid_post", layer, directions, found, count=8, words=words)
    parts = [
        f"<h2>latent {number}, active on {often[number] / len(rows):.2%} of tokens</h2>{examples.html(one)}"
        for number, one in zip(chosen.tolist(), shown, strict=True)
    ]
    return "<!doctype html><meta charset=utf-8><title>latents</title>" + "\n".join(parts)


def tiny(folder: Path) -> tuple[flexcache.Store, nn.Module, int]:
    """Capture a tiny random model over random tokens."""
    from models import tiny_llama

    model, random = tiny_llama(), np.random.default_rng(0)
    documents = [{"id": str(i), "tokens": random.integers(3, 250, size=20).tolist()} for i in range(300)]
    return flexcache.capture(model, None, documents, folder / "tiny.zarr", layers=[2], progress=False), model, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", nargs="?", help="with resid_post and rows: all")
    parser.add_argument("model", nargs="?", help="folder or hub name of the model that filled it")
    parser.add_argument("--layer", type=int, help="the last one that is stored by default")
    parser.add_argument("--latents", type=int, default=4, help="times the features")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--output", type=Path, default=Path("sae"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.store is None:
            store, model, layer = tiny(Path(folder))
        else:
            store = flexcache.open(options.store)
            model = flexcache.ModelSource(name=options.model).load()
            layer = store.layers("resid_post")[-1] if options.layer is None else options.layer
        run(store, model, layer, options)


def run(store: flexcache.Store, model: nn.Module, layer: int, options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    document, position = (np.asarray(store.coordinates[name].values) for name in ("document", "position"))
    held_out = np.random.default_rng(0).random(len(store.documents)) < 0.1
    seen = np.flatnonzero(~held_out[document] & (position > 0))
    unseen = np.flatnonzero(held_out[document] & (position > 0))
    batches = flexcache.training.stream(
        store, "resid_post", layer, batch_size=options.batch, rows=seen, dtype=torch.float32, drop_last=True
    )
    sample = torch.from_numpy(
        store.read("resid_post", layer, np.sort(np.random.default_rng(1).permutation(seen)[:8192]))
    )
    mean = sample.mean(0)
    scale = float((sample - mean).pow(2).sum(1).mean().sqrt())
    sae = TopK(mean, scale, options.latents * len(mean), options.k)
    curve, silent = train(sae, batches, options.steps, asleep=len(seen))
    ids = [name for name, out in zip(store.documents["id"].to_pylist(), held_out.tolist(), strict=True) if out]
    report = {
        "layer": layer,
        "latents": len(sae.bias),
        "k": sae.k,
        "rows trained on": len(seen),
        "steps": len(curve),
        "dead latents": float((silent > len(seen)).float().mean()),
        **judged(sae, store, layer, unseen),
        **spliced(sae, store, model, layer, ids[:50]),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    torch.save(sae.state_dict(), options.output / "sae.pt")
    (options.output / "curve.json").write_text(json.dumps(curve))
    (options.output / "report.json").write_text(json.dumps(report, indent=1))
    (options.output / "latents.html").write_text(page(sae, store, layer, seen, 30, vocabulary(store, options.model)))
    for name, value in report.items():
        print(f"{name}: {value:.4g}")
    print(f"variance unexplained while training: {curve[0]:.3f} … {np.mean(curve[-20:]):.3f}")
    print(f"→ {options.output}: sae.pt, curve.json, report.json, latents.html")


if __name__ == "__main__":
    main()
