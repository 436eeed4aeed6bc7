"""Train a small model to copy, and find its induction heads with a store; see docs/induction.md.

python examples/induction.py --output FOLDER --seed 1
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from induction_model import STEPS, AttentionOnly, repeated, train
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import flexcache
from analysis.induction import plot, scores, transforms
from analysis.rescue import write_or_rescue
from flexcache import Transform
from flexcache.errors import MismatchError
from flexcache.paths import output_folder, shown

SEQUENCES, HALF = 64, 24
"""Number of held-out documents, and tokens of each of their halves."""
HELD_OUT = 10_000
"""Offset of the seed of the captured documents."""

TRANSFORMS = (
    Transform("induction", "pattern", transforms.induction, batch=True),
    Transform("previous_token", "pattern", transforms.previous_token),
    Transform("loss", "lm_head", transforms.next_token_loss, batch=True),
)


def run(output: Path, console: Console, seed: int = 0, steps: int = STEPS, progress: bool = True) -> xr.Dataset:
    """Train, capture attention and losses, and write the store, ``scores.csv`` and ``induction.png`` to *output*.

    Returns
    -------
    Dataset of ``induction`` and ``previous_token`` with dims (layer, head)

    Raises
    ------
    MismatchError
        *output* has a store of a model with another training.
    """
    output = output_folder(output)
    began, path, training = time.perf_counter(), output / "induction.zarr", {"seed": seed, "steps": steps}
    check_training(path, training)
    console.rule("1 of 3: train", align="left")
    torch.set_num_threads(1)  # more gain nothing, and the weights would depend on their number
    model = trained(seed, steps, progress)
    seconds = time.perf_counter() - began
    console.print(f"{sum(p.numel() for p in model.parameters()):,} weights, {steps:,} steps, {seconds:.0f} s")

    console.rule("2 of 3: capture", align="left")
    info = {"name": "two-layer attention-only transformer", "training": training}
    unseen = documents(model.config.vocab_size, seed)
    flexcache.capture(model, None, unseen, path, transforms=TRANSFORMS, model_info=info, progress=progress)

    console.rule("3 of 3: scores, from the store alone", align="left")
    store = flexcache.open(path)
    heads, loss = scores.head_scores(store), scores.loss_by_position(store)
    console.print(head_table(heads))
    console.print(
        "loss in nats: " + ", ".join(f"{name} {value:.3f}" for name, value in scores.mean_losses(loss).items())
    )

    def write(folder: Path) -> tuple[Path, Path]:
        table, picture = scores.save(heads, folder / "scores.csv"), folder / "induction.png"
        plot.plot(heads, loss, math.log(model.config.vocab_size), picture)
        return table, picture

    table, picture = write_or_rescue(write, output)
    for what, place in (("picture", picture), ("numbers", table), ("store", path)):
        console.print(escape(f"{what:<8} {shown(place)}"), highlight=False, soft_wrap=True)
    return heads


def check_training(path: Path, training: dict[str, Any]) -> None:
    """Raise MismatchError if the store of a model with another training exists, before time is spent on training."""
    if not path.exists():
        return
    earlier = flexcache.open(path).provenance.model.get("training")
    if earlier != training:
        raise MismatchError(
            "the store is of a model with another training",
            where=str(path),
            expected=str(training),
            found=str(earlier),
            remedy="choose another folder (--output), or remove the store",
        )


def trained(seed: int, steps: int, progress: bool = True) -> AttentionOnly:
    """Train a model with a progress bar that shows the loss on the second half."""
    bars = Progress(
        TextColumn("training (steps)"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not progress,
    )
    with bars:
        task = bars.add_task("", total=steps, loss="")
        return train(
            seed, steps, progress=lambda done, loss: bars.update(task, completed=done, loss=f"loss {loss:.2f} nats")
        )


def documents(vocabulary: int, seed: int = 0, sequences: int = SEQUENCES, half: int = HALF) -> list[dict[str, Any]]:
    """Return held-out documents that repeat *half* random tokens once: 2 · *half* tokens each."""
    ids = repeated(sequences, half, vocabulary, torch.Generator().manual_seed(HELD_OUT + seed))
    return [{"id": f"r{n:03}", "tokens": line, "half": half} for n, line in enumerate(ids.tolist())]


def head_table(heads: xr.Dataset) -> Table:
    """Return a table of the scores of each layer and head."""
    table = Table(title="mean attention over the second half", title_justify="left", box=None)
    for name in ("layer", "head", "induction", "previous token"):
        table.add_column(name, justify="right")
    for layer in heads["layer"].values:
        for head in heads["head"].values:
            at = heads.sel(layer=layer, head=head)
            table.add_row(str(layer), str(head), *(f"{float(at[name]):.3f}" for name in scores.SCORES))
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", "-o", type=Path, default=Path("induction"), help="folder for store, scores and plot"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, training and documents")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps")
    given = parser.parse_args()
    run(given.output, Console(), given.seed, given.steps)
