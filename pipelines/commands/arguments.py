"""Arguments and options that several commands share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from flexcache.store.storage.location import parse_location

console = Console()

ConfigPath = Annotated[Path, typer.Argument(help="A YAML file; pipelines/configs has examples.")]
StorePath = Annotated[
    Any,
    typer.Argument(parser=parse_location, metavar="STORE", help="A store, such as run.zarr or s3://bucket/run.zarr."),
]
Changes = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the file; may be repeated.")
]
StoredDtype = Literal["bfloat16", "float16", "float32"]
AnyDtype = Literal["bfloat16", "float16", "float32", "int8"]
Codec = Literal["none", "zstd"]
Sites = Annotated[
    list[str] | None, typer.Option("--sites", "--site", help="Only this site, or glob of sites; may be repeated.")
]
LayerChoice = Annotated[str, typer.Option(help="all, a number, numbers such as 0,8,16, or a range such as 8:24.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress bars.")]


def help_of(model: Any, name: str) -> str:
    """Return the help text of an option that is a field of *model*: its description as a sentence."""
    text = str(model.model_fields[name].description)
    return f"{text[0].upper()}{text[1:]}."


def read_capture(path: Path, changes: list[str] | None) -> Any:
    """Read the configuration of a capture; its functions may come from the working folder."""
    from pipelines.config import read_config

    config = read_config(path, changes or ())
    if config.names_functions:
        add_working_folder()
    return config


def add_working_folder() -> None:
    """Put the working folder on the module search path, as ``python -m`` does."""
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)


def split_names(text: str) -> list[str]:
    """Return the names in a text, which commas separate.

    >>> split_names("resid_post, mlp_out")
    ['resid_post', 'mlp_out']
    """
    return [part.strip() for part in text.split(",") if part.strip()]
