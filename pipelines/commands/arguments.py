"""Arguments and options that several commands share."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer
from rich.console import Console

from flexcache.errors import ConfigError
from flexcache.store.storage.location import parse_location

Function = TypeVar("Function", bound=Callable[..., Any])
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


ATTACH_OPTIONS: dict[str, tuple[Any, Any]] = {
    "attach": (
        Annotated[
            str | None,
            typer.Option(metavar="MODEL", help="Name or folder of the model: recompute virtual layers."),
        ],
        None,
    ),
    "cache": (
        Annotated[Path | None, typer.Option(help="With --attach, the folder of the cache of recomputed rows.")],
        None,
    ),
    "cache_bytes": (Annotated[str | None, typer.Option(help="With --attach, bytes of the cache, such as 4GiB.")], None),
    "tolerance": (
        Annotated[
            float | None,
            typer.Option(help="With --attach, accept other conditions than the capture's, up to this difference."),
        ],
        None,
    ),
}
"""Options of `flexcache.virtual.AttachOptions`, and the model."""


@contextmanager
def attached(place: Any, options: dict[str, Any]) -> Iterator[Any]:
    """Take `ATTACH_OPTIONS` out of *options*; yield the place of a store, or the store with the model attached."""
    given = {name: options.pop(name, None) for name in ATTACH_OPTIONS}
    model = given.pop("attach")
    chosen = {name: value for name, value in given.items() if value is not None}
    if model is None:
        if chosen:
            raise ConfigError(
                f"--{next(iter(chosen)).replace('_', '-')} is for an attached model",
                remedy="give the model: --attach MODEL",
            )
        yield place
        return
    from flexcache.virtual import attach

    with attach(place, model, **chosen) as store:
        yield store


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


def add_options(options: Mapping[str, tuple[Any, Any]]) -> Callable[[Function], Function]:
    """Decorate a command that takes keywords, so that they are options: annotation and default by name."""

    def decorate(command: Function) -> Function:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
        more = [
            inspect.Parameter(name, own[0].kind, default=default, annotation=annotation)
            for name, (annotation, default) in options.items()
        ]
        command.__signature__ = inspect.Signature([*own, *more])  # type: ignore[attr-defined]
        command.__annotations__ |= {name: annotation for name, (annotation, _) in options.items()}
        return command

    return decorate


def check_applicable(command: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Raise ConfigError if an option was given that *command* has no use for."""
    for name in given:
        if name not in known:
            raise ConfigError(
                f"{command} does not use --{name.replace('_', '-')}",
                expected=f"only --{', --'.join(known).replace('_', '-')}" if known else None,
                remedy="leave it out",
            )


def split_pairs(text: str | None) -> dict[str, str] | None:
    """Return the pairs in a text, which commas separate.

    >>> split_pairs("fresh=positive, rotten=negative")
    {'fresh': 'positive', 'rotten': 'negative'}

    Raises
    ------
    ConfigError
        A part of the text is no pair.
    """
    if text is None:
        return None
    pairs = [part.partition("=") for part in split_names(text)]
    if not all(name and sign and value for name, sign, value in pairs):
        raise ConfigError("the pairs cannot be read", expected="NAME=NAME,NAME=NAME", found=text)
    return {name.strip(): value.strip() for name, _, value in pairs}


def split_names(text: str) -> list[str]:
    """Return the names in a text, which commas separate.

    >>> split_names("resid_post, mlp_out")
    ['resid_post', 'mlp_out']
    """
    return [part.strip() for part in text.split(",") if part.strip()]
