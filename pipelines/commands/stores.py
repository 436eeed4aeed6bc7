"""Commands on stores: info, label, verify, repair, copy, bench-codec, preshuffle, merge and rm."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from flexcache.errors import ConfigError
from flexcache.store.storage.location import parse_location
from pipelines.commands.arguments import (
    AnyDtype,
    Changes,
    Codec,
    LayerChoice,
    Quiet,
    Sites,
    StorePath,
    console,
    read_capture,
    split_names,
)
from pipelines.config.yaml_remedies import yaml_remedies

TargetPath = Annotated[
    Any, typer.Argument(parser=parse_location, metavar="TARGET", help="The copy; one that was begun is resumed.")
]


def info(store: StorePath) -> None:
    """Show the content, size, completeness and provenance of a store."""
    from pipelines import info as pipeline

    pipeline.run(store, console)


def label(
    store: StorePath,
    table: Annotated[
        Path | None,
        typer.Argument(help="Parquet, JSON Lines or CSV file of labels. Without it, the joined tables are listed."),
    ] = None,
    on: Annotated[
        str, typer.Option(help="Column of the table with one line for each value, and of the documents.")
    ] = "id",
    name: Annotated[str | None, typer.Option(help="Name of the label table; that of the file by default.")] = None,
    columns: Annotated[str | None, typer.Option(help="Columns to join, separated by commas; all by default.")] = None,
    token_labels: Annotated[
        str | None,
        typer.Option(
            help="Those of them that label single tokens, separated by commas: lists with an entry for each token, or"
            " spans {start, end, label} of characters of texts, and of tokens of other documents."
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Folder or name of the tokenizer, for spans of characters; that of the model by default."),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace the table of this name.")] = False,
    remove: Annotated[str | None, typer.Option(help="Remove the label table of this name.", metavar="NAME")] = None,
) -> None:
    """Join a table of labels to a store after its capture, list the joined tables, or remove one."""
    from flexcache.store.read.store import Store

    opened = Store(store)
    if remove is not None:
        if table is not None:
            raise ConfigError("--remove takes no table", found=str(table))
        opened.remove_labels(remove)
        console.print(f"the label table {escape(remove)} is removed", highlight=False)
        return
    if table is None:
        listed = [str(joined) for joined in opened.label_tables.values()]
        console.print(escape("\n".join(listed) or "no labels were joined"), highlight=False)
        return
    joined = opened.join(
        str(table),
        on,
        name=name,
        columns=split_names(columns) if columns else None,
        token_labels=split_names(token_labels or ""),
        tokenizer=tokenizer,
        replace=replace,
    )
    console.print(escape(str(joined)), highlight=False)


@yaml_remedies("capture")
def verify(
    store: StorePath,
    recompute: Annotated[
        int, typer.Option(help="Run this number of random units through the model again; needs --config.", min=0)
    ] = 0,
    config: Annotated[Path | None, typer.Option(help="The file that the store was captured with.")] = None,
    changes: Changes = None,
    quiet: Quiet = False,
) -> None:
    """Compare every file of a store with the checksum it was written with; exit status 1 where one differs."""
    from pipelines import verify as pipeline

    if recompute and config is None:
        raise ConfigError("--recompute needs the model", remedy="give --config, the file of the capture")
    sound = pipeline.run(store, console, progress=not quiet).sound
    if sound and recompute and config is not None:
        settings = read_capture(config, changes)
        sound = pipeline.recompute_units(store, settings, recompute, console, progress=not quiet)
    if not sound:
        raise typer.Exit(1)


@yaml_remedies("capture")
def repair(
    store: StorePath,
    config: Annotated[
        Path | None, typer.Option(help="The file that the store was captured with, to compute the units at once.")
    ] = None,
    changes: Changes = None,
    quiet: Quiet = False,
) -> None:
    """Retract the units of damaged files, so that they are computed again; exit status 1 if other files are damaged."""
    from flexcache.store.format.label_table import LABEL_RECORDS, LABELS
    from flexcache.store.manage.verify import repair as repair_store
    from pipelines.commands.bars import files_bar

    settings = None if config is None else read_capture(config, [*(changes or ()), f"store={store}"])
    with files_bar("verifying", not quiet) as bar:
        done = repair_store(store, bar)
    for finding in done.found.findings:
        console.print(f"[red]✗[/] {escape(finding.file)} {escape(finding.problem)}", highlight=False)
    for finding in done.beyond:
        what = "is part of the plan: restore it from a copy of the store"
        if finding.file.startswith((LABELS, LABEL_RECORDS)):
            what = "holds joined labels: remove them with flexcache label --remove, and join them again"
        console.print(f"{escape(finding.file)} {what}", highlight=False)
    if done.units:
        listed = ", ".join(map(str, done.units[:20])) + (" …" if len(done.units) > 20 else "")
        console.print(f"taken back, to be computed again: unit {listed}", highlight=False)
    elif done.found.sound:
        console.print("nothing is damaged", highlight=False)
    if done.units and settings is None:
        console.print("run the same capture as before: it computes only these units", highlight=False)
    if done.units and settings is not None and not done.beyond:
        from pipelines import capture

        capture.run(settings, progress=not quiet)
    if done.beyond:
        raise typer.Exit(1)


def copy(
    source: StorePath,
    target: TargetPath,
    dtype: Annotated[AnyDtype | None, typer.Option(help="Convert to this dtype.")] = None,
    compression: Annotated[Codec | None, typer.Option(help="Convert to this codec.")] = None,
    sites: Sites = None,
    layers: LayerChoice = "all",
    quiet: Quiet = False,
) -> None:
    """Copy a store, or some of its sites and layers, checking every byte; run it again to resume a stopped copy."""
    from flexcache.store.manage.copy import copy as copy_store
    from pipelines.commands.bars import bytes_bar

    with bytes_bar("copying", not quiet) as bar:
        store = copy_store(
            source, target, sites=sites or None, layers=layers, dtype=dtype, compression=compression, progress=bar
        )
    console.print(repr(store), highlight=False, markup=False)


def bench_codec(
    store: StorePath,
    sites: Sites = None,
    layers: LayerChoice = "all",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A JSON file for all figures.")] = None,
    quiet: Quiet = False,
) -> None:
    """Measure what zstd, int8 and narrower dtypes would save, cost and lose on the activations of a store, by layer."""
    from pipelines import bench_codec as pipeline

    pipeline.run(store, console, sites=sites, layers=layers, output=output, progress=not quiet)


def preshuffle(
    source: StorePath,
    target: Annotated[Path, typer.Argument(help="The new store; one that was begun is resumed.")],
    sites: Sites = None,
    layers: LayerChoice = "all",
    seed: Annotated[int, typer.Option(help="Seed of the order.", min=0)] = 0,
    quiet: Quiet = False,
) -> None:
    """Write the rows of a store in random order into another store, for training that reads front to back."""
    from flexcache.training.preshuffle import preshuffle as preshuffle_store
    from pipelines.commands.bars import rows_bar

    with rows_bar("shuffling (rows)", not quiet) as bar:
        store = preshuffle_store(source, target, sites=sites or None, layers=layers, seed=seed, progress=bar)
    console.print(repr(store), highlight=False, markup=False)


def merge(
    sources: Annotated[
        list[Any],
        typer.Argument(parser=parse_location, metavar="STORES", help="Two stores or more, over the same plan."),
    ],
    target: Annotated[
        Any, typer.Option("--output", "-o", parser=parse_location, help="The new store; one that was begun is resumed.")
    ],
    quiet: Quiet = False,
) -> None:
    """Merge stores that hold different sites or layers of one model over the same documents and units."""
    from flexcache.store.manage.merge import merge as merge_stores
    from pipelines.commands.bars import bytes_bar

    with bytes_bar("merging", not quiet) as bar:
        store = merge_stores(sources, target, progress=bar)
    console.print(repr(store), highlight=False, markup=False)


def rm(
    store: StorePath,
    sites: Annotated[list[str], typer.Option("--site", "--sites", help="Site, or glob of sites; may be repeated.")],
    layers: LayerChoice = "all",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    quiet: Quiet = False,
) -> None:
    """Remove sites, or layers of them, from a store for good; the store can be read at every moment."""
    from flexcache.store.format.text import layer_text, size
    from flexcache.store.manage.remove import Removal
    from pipelines.commands.bars import bytes_bar

    removal = Removal(store, sites, layers)
    found: dict[str, list[int]] = {}
    for name, layer in removal.gone:
        found.setdefault(name, []).extend([] if layer is None else [layer])
    if removal.unfinished:
        console.print(
            "this command finishes an earlier removal that was stopped, and does nothing else", highlight=False
        )
    for name, numbers in found.items():
        which = f", layers {layer_text(tuple(numbers))}" if numbers else ""
        console.print(f"{escape(name)}{which}", highlight=False)
    if price := removal.price():
        console.print(escape(price), highlight=False)
    if not yes and not typer.confirm(f"remove this from {store}, {size(removal.bytes())}, for good?"):
        console.print("nothing was removed")
        return
    with bytes_bar("removing", not quiet) as bar:
        freed = removal.run(bar)
    console.print(f"{size(freed)} freed", highlight=False)
