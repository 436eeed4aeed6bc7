"""Commands that show the whole on real input: demo and induction."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.arguments import Quiet, console


def demo(
    documents: Annotated[int, typer.Option(help="Labelled texts to capture.", min=40)] = 1000,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the store, the probes and the report.")
    ] = Path("demo"),
) -> None:
    """Run the main workflow on real input: capture SmolLM2-135M on labelled reviews, and probe every layer."""
    from pipelines.demo import reviews

    reviews.run(documents, output, console)


def induction(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the store, the scores and the plot.")
    ] = Path("induction"),
    seed: Annotated[int, typer.Option(help="Seed of weights, training and documents.", min=0)] = 0,
    steps: Annotated[int, typer.Option(help="Training steps.", min=1)] = 1500,
    quiet: Quiet = False,
) -> None:
    """Find induction heads with a store: train a two-layer transformer to copy, and score its heads."""
    from pipelines.demo import induction as example

    example.run(output, console, seed=seed, steps=steps, progress=not quiet)
