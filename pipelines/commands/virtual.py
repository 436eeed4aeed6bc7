"""Commands that move layers between disk and virtual: thin and fill."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from flexcache.errors import ConfigError
from pipelines.commands.arguments import Changes, LayerChoice, Quiet, Sites, StorePath, console, read_capture
from pipelines.config.yaml_remedies import yaml_remedies

ModelName = Annotated[
    str | None, typer.Option(help="Folder or name of the model; by default the name that the store recorded.")
]
CaptureFile = Annotated[
    Path | None, typer.Option("--config", help="The file that the store was captured with, in place of --model.")
]
CacheBytes = Annotated[str, typer.Option(help="Bytes of a temporary cache of recomputed rows, such as 4 GiB.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")]


@yaml_remedies("capture")
def thin(
    store: StorePath,
    keep: Annotated[
        str | None,
        typer.Option(help="Layers of resid_post that stay on disk, such as every:6; other layers become virtual."),
    ] = None,
    model: ModelName = None,
    config: CaptureFile = None,
    changes: Changes = None,
    cache_bytes: CacheBytes = "4 GiB",
    yes: Yes = False,
    quiet: Quiet = False,
) -> None:
    """Delete layers that the model recomputes to the bit; each dropped shard is proved first."""
    from flexcache.store.format.text import size
    from flexcache.virtual import Thinning
    from pipelines.commands.bars import rows_bar

    asked: Any = keep
    if config is not None and keep is None:
        asked = read_capture(config, changes).keep
    if asked is None:
        raise ConfigError(
            "no layers are given that stay on disk", remedy="--keep every:6, or keep in the --config file"
        )
    thinning = Thinning(store, asked)
    if not _confirmed(thinning, f"make them virtual, and delete {size(thinning.bytes())}?", yes):
        return
    loaded = None if thinning.unfinished else _model(store, model, config, changes)
    with rows_bar("proving units", not quiet) as bar:
        done = thinning.run(loaded, bar, cache_bytes=cache_bytes)
    console.print(repr(done), highlight=False, markup=False)


@yaml_remedies("capture")
def fill(
    store: StorePath,
    sites: Sites = None,
    layers: LayerChoice = "all",
    model: ModelName = None,
    config: CaptureFile = None,
    changes: Changes = None,
    cache_bytes: CacheBytes = "4 GiB",
    yes: Yes = False,
    quiet: Quiet = False,
) -> None:
    """Recompute virtual layers with the model, prove them, and write them to disk."""
    from flexcache.store.format.text import size
    from flexcache.virtual import Filling
    from pipelines.commands.bars import rows_bar

    filling = Filling(store, sites, layers)
    if not _confirmed(filling, f"write them to disk, {size(filling.bytes())}?", yes):
        return
    loaded = None if filling.unfinished else _model(store, model, config, changes)
    with rows_bar("writing units", not quiet) as bar:
        done = filling.run(loaded, bar, cache_bytes=cache_bytes)
    console.print(repr(done), highlight=False, markup=False)


def _confirmed(change: Any, question: str, yes: bool) -> bool:
    """Print the layers of a change, and return True if it is to be made."""
    from flexcache.store.format.text import layer_text
    from flexcache.store.read.selection import by_array

    if change.unfinished:
        console.print("this command finishes an earlier one that was stopped, and does nothing else", highlight=False)
    for name, layers in by_array(change.keys).items():
        numbers = tuple(layer for layer in layers or () if layer is not None)
        console.print(f"{escape(name)}, layers {layer_text(numbers)}", highlight=False)
    if yes or typer.confirm(question):
        return True
    console.print("nothing was changed")
    return False


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
