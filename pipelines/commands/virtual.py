"""Commands that move layers between disk and virtual: thin and fill."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from flexcache.errors import ConfigError
from pipelines.commands.arguments import (
    Changes,
    LayerChoice,
    Quiet,
    Sites,
    StorePath,
    add_options,
    console,
    read_capture,
)
from pipelines.config.yaml_remedies import yaml_remedies

MOVE_OPTIONS: dict[str, tuple[Any, Any]] = {
    "model": (
        Annotated[
            str | None, typer.Option(help="Folder or name of the model; by default the name that the store recorded.")
        ],
        None,
    ),
    "config": (
        Annotated[Path | None, typer.Option(help="The file that the store was captured with, in place of --model.")],
        None,
    ),
    "changes": (Changes, None),
    "cache_bytes": (
        Annotated[str, typer.Option(help="Bytes of a temporary cache of recomputed rows, such as 4 GiB.")],
        "4 GiB",
    ),
    "yes": (Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")], False),
    "quiet": (Quiet, False),
}


@yaml_remedies("capture")
@add_options(MOVE_OPTIONS)
def thin(
    store: StorePath,
    keep: Annotated[
        str | None,
        typer.Option(help="Layers of resid_post that stay on disk, such as every:6; other layers become virtual."),
    ] = None,
    **options: Any,
) -> None:
    """Delete layers that the model recomputes to the bit; each dropped shard is proved first."""
    from flexcache.store.format.text import size
    from flexcache.virtual import Thinning

    asked: Any = keep
    if options["config"] is not None and keep is None:
        asked = read_capture(options["config"], options["changes"]).keep
    if asked is None:
        raise ConfigError(
            "no layers are given that stay on disk", remedy="--keep every:6, or keep in the --config file"
        )
    thinning = Thinning(store, asked)
    _move(thinning, f"make them virtual, and delete {size(thinning.bytes())}?", "proving units", **options)


@yaml_remedies("capture")
@add_options(MOVE_OPTIONS)
def fill(store: StorePath, sites: Sites = None, layers: LayerChoice = "all", **options: Any) -> None:
    """Recompute virtual layers with the model, prove them, and write them to disk."""
    from flexcache.store.format.text import size
    from flexcache.virtual import Filling

    filling = Filling(store, sites, layers)
    _move(filling, f"write them to disk, {size(filling.bytes())}?", "writing units", **options)


def _move(
    move: Any,
    question: str,
    title: str,
    *,
    model: str | None,
    config: Path | None,
    changes: list[str] | None,
    cache_bytes: str,
    yes: bool,
    quiet: bool,
) -> None:
    """Print the layers of a move, ask, and run it."""
    from flexcache.store.format.text import layer_text
    from flexcache.store.read.selection import by_array
    from pipelines.commands.bars import rows_bar

    if move.unfinished:
        console.print("this command finishes an earlier one that was stopped, and does nothing else", highlight=False)
    for name, layers in by_array(move.keys).items():
        numbers = tuple(layer for layer in layers or () if layer is not None)
        console.print(f"{escape(name)}, layers {layer_text(numbers)}", highlight=False)
    if not yes and not typer.confirm(question):
        console.print("nothing was changed")
        return
    loaded = None if move.unfinished else _model(move.path, model, config, changes)
    with rows_bar(title, not quiet) as bar:
        done = move.run(loaded, bar, cache_bytes=cache_bytes)
    console.print(repr(done), highlight=False, markup=False)


def _model(store: Any, name: str | None, config: Path | None, changes: list[str] | None) -> Any:
    """Return the model of a file of a capture, or its name, or the one that the store recorded."""
    if config is not None:
        if name is not None:
            raise ConfigError("the model is given twice", found="--model and --config", remedy="leave one of them out")
        return read_capture(config, changes).load_model()
    if name is not None:
        return name
    from flexcache.store.read.store import Store

    return Store(store).provenance.model_name
