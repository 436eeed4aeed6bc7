"""Commands that read and write the files of other tools: export and import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pipelines.commands.arguments import (
    ATTACH_OPTIONS,
    Codec,
    LayerChoice,
    Quiet,
    Sites,
    StoredDtype,
    StorePath,
    add_options,
    attached,
    console,
)

ImportFormat = Literal["safetensors", "pt", "saelens", "speculators", "specforge", "torchspec", "npy"]
ExportFormat = Literal["safetensors", "npy", "parquet", "activation-oracle", "nla"]

TEXT_OPTIONS: dict[str, tuple[Any, Any]] = {
    "tokenizer": (
        Annotated[str | None, typer.Option(help="Tokenizer of the texts: a folder or name; by default the model's.")],
        None,
    ),
    "per_document": (
        Annotated[int | None, typer.Option(help="With texts: rows of each document, drawn at random.", min=1)],
        None,
    ),
    "min_position": (
        Annotated[int | None, typer.Option(help="With texts: smallest position of a row.", min=0)],
        None,
    ),
    "limit": (
        Annotated[int | None, typer.Option(help="With texts: most rows, of the first documents.", min=1)],
        None,
    ),
    "seed": (Annotated[int | None, typer.Option(help="With texts: seed of the rows that are drawn.", min=0)], None),
}
ENGINE_OPTIONS: dict[str, tuple[Any, Any]] = {
    "layer_ids": (
        Annotated[
            str | None, typer.Option(help="Layer ids of the engine, in the order of the states, such as 2,18,33,36.")
        ],
        None,
    ),
    "final_state": (
        Annotated[
            Literal["normed", "raw"] | None,
            typer.Option(help="An engine's last hidden state: after the last norm, or the output of the last block."),
        ],
        None,
    ),
    "engine": (Annotated[str | None, typer.Option(help="The engine, such as vllm==0.22.0.")], None),
}


@add_options(TEXT_OPTIONS | ATTACH_OPTIONS)
def export(
    store: StorePath,
    out: Annotated[Path, typer.Argument(help="A folder; an export that was begun there is resumed.")],
    to: Annotated[ExportFormat, typer.Option("--to", "--format", help="The format of the files.")],
    sites: Sites = None,
    layers: LayerChoice = "all",
    rows: Annotated[Literal["all", "committed"], typer.Option(help="committed exports a partial store.")] = "all",
    quiet: Quiet = False,
    **texts: Any,
) -> None:
    """Write activations as safetensors, npy or Parquet files, with the documents, or as tables with texts."""
    from flexcache.exchange.exporting import export as export_store
    from flexcache.paths import output_folder, shown
    from flexcache.store.format.text import size
    from pipelines.commands.bars import bytes_bar

    folder = output_folder(out)
    with attached(store, texts) as opened, bytes_bar("exporting", not quiet) as bar:
        given: Any = {name: value for name, value in texts.items() if value is not None}
        files = export_store(
            opened,
            folder,
            to,
            sites=sites or None,
            layers=layers,
            rows=rows,
            progress=bar,
            **given,
        )
    total = size(sum(path.stat().st_size for path in files))
    console.print(f"{len(files)} files, {total}, in {shown(folder)}", highlight=False, markup=False)


@add_options(ENGINE_OPTIONS)
def import_(
    folder: Annotated[Path, typer.Argument(help="A folder with files of activations.")],
    target: Annotated[Path, typer.Option("--output", "-o", help="The new store; one that was begun is resumed.")],
    kind: Annotated[ImportFormat, typer.Option("--from", "--format", help="The tool or format that wrote the files.")],
    site: Annotated[
        str | None, typer.Option(help="The site that they hold: resid_post, mlp_post, …, or another name.")
    ] = None,
    layer_pattern: Annotated[
        str | None, typer.Option(help="A regular expression whose one group is the layer of a tensor.")
    ] = None,
    depth: Annotated[int | None, typer.Option(help="Number of layers of the model.", min=1)] = None,
    token_ids: Annotated[str | None, typer.Option(help="Name of the tensors of token ids, or a file.")] = None,
    documents: Annotated[
        Path | None,
        typer.Option(help="Parquet file with id, n_rows and labels of each document; of an engine, its dataset."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Name of the model.")] = None,
    dtype: Annotated[
        StoredDtype | None, typer.Option(help="Dtype of the stored values; that of the files by default.")
    ] = None,
    compression: Annotated[Codec, typer.Option(help="Codec of the store.")] = "none",
    quiet: Quiet = False,
    **engine: Any,
) -> None:
    """Make a store from activations of other tools: safetensors, torch, a SAELens cache, samples of an engine."""
    from flexcache.exchange.importing import import_folder
    from pipelines.commands.bars import rows_bar

    with rows_bar("importing (rows)", not quiet) as bar:
        store = import_folder(
            folder,
            target,
            kind,
            site=site,
            layer_pattern=layer_pattern,
            depth=depth,
            token_ids=token_ids,
            documents=documents,
            model=model,
            dtype=dtype,
            compression=compression,
            progress=bar,
            **engine,
        )
    console.print(repr(store), highlight=False, markup=False)
