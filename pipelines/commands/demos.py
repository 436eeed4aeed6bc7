"""The command that shows the whole on real input: demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.arguments import console


def demo(
    documents: Annotated[int, typer.Option(help="Labelled texts to capture.", min=40)] = 1000,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the store, the probes and the report.")
    ] = Path("demo"),
) -> None:
    """Run the main workflow on real input: capture SmolLM2-135M on labelled reviews, and probe every layer."""
    from pipelines.demo import reviews

    reviews.run(documents, output, console)
