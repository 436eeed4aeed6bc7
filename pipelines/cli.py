"""The command line: ``flexcache COMMAND``, or ``python -m pipelines COMMAND`` under a launcher."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from flexcache.errors import ConfigError, FlexCacheError
from flexcache.parallel.launch import launch
from flexcache.store.storage.location import parse_location
from pipelines.plain import make_encodable

app = typer.Typer(
    help="Cache transformer activations once, and study them without the model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
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
Side = Literal["encoder", "decoder", "vision"]
ImportFormat = Literal["safetensors", "pt", "saelens"]
ExportFormat = Literal["safetensors", "npy", "parquet"]
Sites = Annotated[
    list[str] | None, typer.Option("--sites", "--site", help="Only this site, or glob of sites; may be repeated.")
]
LayerChoice = Annotated[str, typer.Option(help="all, a number, numbers such as 0,8,16, or a range such as 8:24.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]


@app.command()
def plan(config: ConfigPath, changes: Changes = None, quiet: Quiet = False) -> None:
    """What a capture would cost in rows, bytes, files and padding, and whether it fits; loads no weights."""
    from pipelines import plan as pipeline
    from pipelines.config import read_config

    pipeline.run(read_config(config, changes or ()), console, progress=not quiet)


@app.command()
def estimate(
    config: ConfigPath,
    changes: Changes = None,
    sample: Annotated[int, typer.Option(help="Documents to tokenize; the rest is extrapolated.", min=1)] = 2048,
    seconds: Annotated[float, typer.Option(help="How long to try the model, after it is loaded.", min=0.1)] = 10.0,
    tokens_per_second: Annotated[
        float | None, typer.Option(help="Of one process, padding included: the model is not loaded.", min=1e-9)
    ] = None,
    write_rate: Annotated[
        float | None, typer.Option(help="Megabytes a second of the disk; measured by default.", min=1e-9)
    ] = None,
    processes: Annotated[int, typer.Option(help="Processes that will capture side by side.", min=1)] = 1,
    price_hour: Annotated[float | None, typer.Option(help="Of one process for an hour.", min=0)] = None,
    price_tb_month: Annotated[float | None, typer.Option(help="Of a terabyte kept for a month.", min=0)] = None,
    seed: Annotated[int, typer.Option(help="Of the sample.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
    quiet: Quiet = False,
) -> None:
    """What a capture would take in bytes, files, hours, memory and money: from a sample, and a short try."""
    from pipelines import estimate as pipeline
    from pipelines.config import read_config

    terms = pipeline.Terms(
        sample=sample,
        seconds=seconds,
        tokens_per_second=tokens_per_second,
        write_rate=None if write_rate is None else write_rate * 1e6,
        processes=processes,
        price_hour=price_hour,
        price_tb_month=price_tb_month,
        seed=seed,
    )
    found = pipeline.run(read_config(config, changes or ()), terms, progress=not quiet)
    if as_json:
        console.print_json(data=found.to_json())
    else:
        console.print(found.table())


@app.command()
def capture(
    config: ConfigPath,
    changes: Changes = None,
    allow_mixed: Annotated[
        bool, typer.Option(help="Go on with a store that was begun on another device, version or thread count.")
    ] = False,
    allow_changed_model: Annotated[
        bool, typer.Option(help="Resume a store that was begun by a model that computes something else.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Run a model over documents and store its activations; run it again to go on where it stopped."""
    from pipelines import capture as pipeline
    from pipelines.config import read_config

    store = pipeline.run(
        read_config(config, changes or ()),
        allow_mixed=allow_mixed,
        allow_changed_model=allow_changed_model,
        progress=not quiet,
    )
    if launch().rank == 0:
        console.print(repr(store), highlight=False, markup=False)


@app.command()
def extend(
    config: ConfigPath,
    changes: Changes = None,
    new_only: Annotated[
        bool, typer.Option(help="Leave out documents whose ids the store has: for a corpus that has grown.")
    ] = False,
    discard: Annotated[bool, typer.Option(help="Drop an extension that has begun and is not finished.")] = False,
    allow_mixed: Annotated[bool, typer.Option(help="On another device, version or thread count than before.")] = False,
    allow_changed_model: Annotated[
        bool, typer.Option(help="With a model that computes something else than the one of the store.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Add to a store the documents, layers or sites that a configuration names and the store lacks."""
    from pipelines import extend as pipeline
    from pipelines.config import read_config

    settings = read_config(config, changes or ())
    if discard:
        pipeline.discard(settings.store, console)
        return
    store = pipeline.run(
        settings,
        new_only=new_only,
        allow_mixed=allow_mixed,
        allow_changed_model=allow_changed_model,
        progress=not quiet,
    )
    if launch().rank == 0:
        console.print(repr(store), highlight=False, markup=False)


@app.command()
def info(store: StorePath) -> None:
    """What is in a store, how complete it is, how big, and what it was made with."""
    from pipelines import info as pipeline

    pipeline.run(store, console)


@app.command()
def sites(
    model: Annotated[str, typer.Argument(help="A folder or a name on the hub.")],
    match: Annotated[str | None, typer.Option(help="Only modules whose path this glob matches.")] = None,
    every: Annotated[bool, typer.Option("--all", help="A line for every module, repeated blocks too.")] = False,
    revision: Annotated[str | None, typer.Option(help="Of a model on the hub.")] = None,
    side: Annotated[
        Side | None, typer.Option(help="The part of a model of several: encoder, decoder or vision.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON, an object for every module.")] = False,
) -> None:
    """What can be read in a model: modules, shapes and sites, without weights; under torchrun, how they are sharded."""
    from pipelines import sites as pipeline

    pipeline.run(model, console, revision=revision, side=side, match=match, every=every, as_json=as_json)


@app.command()
def verify(
    store: StorePath,
    recompute: Annotated[
        int, typer.Option(help="Run so many random units through the model again; needs --config.", min=0)
    ] = 0,
    config: Annotated[Path | None, typer.Option(help="The file that the store was captured with.")] = None,
    changes: Changes = None,
    quiet: Quiet = False,
) -> None:
    """Compare every file of a store with the checksum it was written with; exit status 1 where one differs."""
    from pipelines import verify as pipeline
    from pipelines.config import read_config

    if recompute and config is None:
        raise ConfigError("--recompute needs the model", remedy="give --config, the file of the capture")
    sound = pipeline.run(store, console, progress=not quiet).sound
    if sound and recompute and config is not None:
        settings = read_config(config, changes or ())
        sound = pipeline.again(store, settings, recompute, console, progress=not quiet)
    if not sound:
        raise typer.Exit(1)


@app.command()
def repair(
    store: StorePath,
    config: Annotated[
        Path | None, typer.Option(help="The file that the store was captured with, to compute the units at once.")
    ] = None,
    changes: Changes = None,
    quiet: Quiet = False,
) -> None:
    """Take back the units that a damaged file belongs to, and compute those again; exit status 1 if more is wrong."""
    from pipelines import repair as pipeline
    from pipelines.config import read_config

    settings = None if config is None else read_config(config, [*(changes or ()), f"store={store}"])
    if pipeline.run(store, settings, console, progress=not quiet).beyond:
        raise typer.Exit(1)


@app.command()
def copy(
    source: StorePath,
    target: Annotated[
        Any,
        typer.Argument(
            parser=parse_location, metavar="TARGET", help="Where it goes; one that was begun is gone on with."
        ),
    ],
    dtype: Annotated[AnyDtype | None, typer.Option(help="Convert to this dtype.")] = None,
    compression: Annotated[Codec | None, typer.Option(help="Convert to this codec.")] = None,
    sites: Sites = None,
    layers: LayerChoice = "all",
    quiet: Quiet = False,
) -> None:
    """Copy a store, or some of its sites and layers, checking every byte; run it again to go on where it stopped."""
    from pipelines import copy as pipeline

    store = pipeline.run(
        source, target, dtype=dtype, compression=compression, sites=sites, layers=layers, progress=not quiet
    )
    console.print(repr(store), highlight=False, markup=False)


@app.command("bench-codec")
def bench_codec(
    store: StorePath,
    sites: Sites = None,
    layers: LayerChoice = "all",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A JSON file for all figures.")] = None,
    quiet: Quiet = False,
) -> None:
    """What zstd, int8 and narrower dtypes would save, cost and lose on the activations of a store, by layer."""
    from pipelines import bench_codec as pipeline

    pipeline.run(store, console, sites=sites, layers=layers, output=output, progress=not quiet)


@app.command()
def preshuffle(
    source: StorePath,
    target: Annotated[Path, typer.Argument(help="The new store; one that was begun is gone on with.")],
    sites: Sites = None,
    layers: LayerChoice = "all",
    seed: Annotated[int, typer.Option(help="Of the order.", min=0)] = 0,
    quiet: Quiet = False,
) -> None:
    """Write the rows of a store in random order into another, for training that reads front to back."""
    from pipelines import preshuffle as pipeline

    store = pipeline.run(source, target, sites=sites, layers=layers, seed=seed, progress=not quiet)
    console.print(repr(store), highlight=False, markup=False)


@app.command()
def merge(
    sources: Annotated[
        list[Any],
        typer.Argument(parser=parse_location, metavar="STORES", help="Two stores or more, over the same plan."),
    ],
    target: Annotated[
        Any,
        typer.Option(
            "--output", "-o", parser=parse_location, help="The new store; one that was begun is gone on with."
        ),
    ],
    quiet: Quiet = False,
) -> None:
    """Join stores that hold different sites or layers of one model over the same documents and units."""
    from pipelines import merge as pipeline

    store = pipeline.run(sources, target, progress=not quiet)
    console.print(repr(store), highlight=False, markup=False)


@app.command()
def rm(
    store: StorePath,
    sites: Annotated[list[str], typer.Option("--site", "--sites", help="Site, or glob of sites; may be repeated.")],
    layers: LayerChoice = "all",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    quiet: Quiet = False,
) -> None:
    """Remove sites, or layers of them, from a store for good; the store reads correctly at any moment of it."""
    from pipelines import rm as pipeline

    pipeline.run(store, sites, console, layers=layers, yes=yes, progress=not quiet)


@app.command()
def export(
    store: StorePath,
    out: Annotated[Path, typer.Argument(help="A folder; an export that was begun there is gone on with.")],
    to: Annotated[ExportFormat, typer.Option("--to", help="The format of the files.")],
    sites: Sites = None,
    layers: LayerChoice = "all",
    rows: Annotated[Literal["all", "committed"], typer.Option(help="committed exports a partial store.")] = "all",
    quiet: Quiet = False,
) -> None:
    """Write activations as safetensors, npy or Parquet files, with the documents beside them."""
    from pipelines import export as pipeline

    pipeline.run(store, out, to, console, sites=sites, layers=layers, rows=rows, progress=not quiet)


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(help="A folder with files of activations.")],
    target: Annotated[Path, typer.Option("--output", "-o", help="The new store; one begun is gone on with.")],
    kind: Annotated[ImportFormat, typer.Option("--from", help="What wrote the files.")],
    site: Annotated[str, typer.Option(help="What they hold: resid_post, mlp_post, …, or a name of its own.")],
    layer_pattern: Annotated[
        str | None, typer.Option(help="A regular expression; its one group is a tensor's layer.")
    ] = None,
    depth: Annotated[int | None, typer.Option(help="Layers of the model.", min=1)] = None,
    token_ids: Annotated[str | None, typer.Option(help="Name of the tensors of token ids, or a file.")] = None,
    documents: Annotated[Path | None, typer.Option(help="Parquet: id, n_rows and labels of each document.")] = None,
    model: Annotated[str | None, typer.Option(help="Name of the model.")] = None,
    dtype: Annotated[StoredDtype | None, typer.Option(help="To store them in; as they are by default.")] = None,
    compression: Annotated[Codec, typer.Option(help="Of the store.")] = "none",
    quiet: Quiet = False,
) -> None:
    """Make a store of activations that others saved: safetensors, torch files, or a SAELens cache."""
    from flexcache.exchange.importing import LAYER_PATTERN
    from pipelines import importing as pipeline

    store = pipeline.run(
        folder,
        target,
        kind,
        site=site,
        layer_pattern=layer_pattern or LAYER_PATTERN,
        depth=depth,
        token_ids=token_ids,
        documents=documents,
        model=model,
        dtype=dtype,
        compression=compression,
        progress=not quiet,
    )
    console.print(repr(store), highlight=False, markup=False)


@app.command()
def probe(
    places: Annotated[
        list[str],
        typer.Argument(metavar="STORE", help="A store; or: transfer FOLDER STORE, to try saved probes on another."),
    ],
    target: Annotated[
        str | None,
        typer.Option(
            help="Columns of the documents to predict, by commas; or token_id, position. As saved, for transfer."
        ),
    ] = None,
    site: Annotated[str, typer.Option(help="Sites to probe, by commas.")] = "resid_post",
    kind: Annotated[
        str | None,
        typer.Option(
            "--probe",
            help="logistic, ridge, mass-mean, nearest-centroid, lda, inlp, mlp, attention; by commas. By default"
            " logistic for classes, ridge for numbers.",
        ),
    ] = None,
    cv: Annotated[int, typer.Option(help="Folds.")] = 5,
    groups: Annotated[
        str, typer.Option(help="Label column whose values never straddle folds, or document.")
    ] = "document",
    rows: Annotated[
        str | None,
        typer.Option(help="last, first, mean, max or all tokens of a document, tokens together, or a position."),
    ] = None,
    layers: LayerChoice = "all",
    seed: Annotated[int, typer.Option(help="Of folds, shuffles and bootstrap.", min=0)] = 0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for results, plots and report.")] = None,
    quiet: Quiet = False,
) -> None:
    """Train probes on every captured layer, with baselines and nested, grouped cross-validation; or try saved ones."""
    from pipelines import probe as pipeline

    if places[0] == "transfer" and len(places) == 3:
        pipeline.run_transfer(places[1], places[2], target, groups=groups, output=output, console=console)
        return
    if len(places) != 1 or target is None:
        raise ConfigError(
            "a probe needs a store and a target",
            expected="flexcache probe STORE --target COLUMN, or flexcache probe transfer FOLDER STORE",
            found=" ".join(["flexcache probe", *places]) + ("" if target else ", without --target"),
        )
    position = rows is not None and rows.lstrip("-").isdigit()
    pipeline.run(
        places[0],
        _split(target),
        _split(site),
        _split(kind) if kind else None,
        cv=cv,
        groups=groups,
        rows=int(rows or 0) if position else rows,  # type: ignore[arg-type]
        layers=layers,
        seed=seed,
        output=output,
        console=console,
        progress=not quiet,
    )


@app.command()
def stats(
    store: StorePath,
    site: Annotated[str, typer.Option(help="Site to study.")] = "resid_post",
    by: Annotated[
        str, typer.Option(help="Groups of the moments: layer, position, token_id, token_type, label columns.")
    ] = "layer,position",
    only: Annotated[
        str | None,
        typer.Option(help="Some of moments, pca, quantiles, outliers, similarity, lens, examples."),
    ] = None,
    layers: LayerChoice = "all",
    model: Annotated[
        str | None, typer.Option(help="Checkpoint folder, for token types and lens; else the store's, if there.")
    ] = None,
    scheduler: Annotated[
        str, typer.Option(help="threads, synchronous, processes, or an address such as tcp://head:8786.")
    ] = "threads",
    workers: Annotated[int | None, typer.Option(help="Threads or processes; by default one a core.", min=1)] = None,
    rows: Annotated[int | None, typer.Option(help="About how many rows covariances are taken from.", min=2)] = None,
    seed: Annotated[int, typer.Option(help="Of the sampled documents.", min=0)] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the results; by default stats.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Statistics and geometry of a site, each shard read once; kept as Zarr and read again where nothing changed."""
    from pipelines import stats as pipeline

    pipeline.run(
        store,
        site,
        by=_split(by),
        only=_split(only) if only else None,
        layers=layers,
        model=model,
        scheduler=scheduler,
        workers=workers,
        rows=rows,
        seed=seed,
        output=output,
        progress=not quiet,
    )


@app.command()
def report(
    store: StorePath,
    site: Annotated[str, typer.Option(help="Site to report on.")] = "resid_post",
    model: Annotated[
        str | None, typer.Option(help="Checkpoint folder, for tokens and lens; else the store's, if there.")
    ] = None,
    stats: Annotated[Path | None, typer.Option(help="Folder of the statistics; by default stats.")] = None,
    scheduler: Annotated[str, typer.Option(help="As for stats, where they are computed.")] = "threads",
    workers: Annotated[int | None, typer.Option(help="As for stats.", min=1)] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The page; by default in that folder.")] = None,
    show: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    quiet: Quiet = False,
) -> None:
    """One HTML page of a store: norms, spectra, likeness of layers, outliers, logit lens, tokens that excite dims."""
    from pipelines import report as pipeline

    pipeline.run(
        store,
        site,
        model=model,
        statistics=stats,
        output=output,
        show=show,
        scheduler=scheduler,
        workers=workers,
        progress=not quiet,
    )


@app.command()
def replay(
    store: StorePath,
    config: ConfigPath,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for results, plots and report.")] = None,
    changes: Changes = None,
    quiet: Quiet = False,
) -> None:
    """Change cached activations, run only the rest of the model, and report what changed; run it again to go on."""
    from pipelines import replay as pipeline
    from pipelines.replay_config import read_replay

    pipeline.run(store, read_replay(config, changes or ()), config, output, console, progress=not quiet)


@app.command()
def demo(
    documents: Annotated[int, typer.Option(help="How many labelled texts to capture.", min=40)] = 1000,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the store, the probes and the report.")
    ] = Path("demo"),
) -> None:
    """The main job on real input: SmolLM2-135M reads labelled reviews, and every layer is probed for sentiment."""
    from pipelines import demo as pipeline

    pipeline.run(documents, output, console)


@app.command()
def induction(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the store, the scores and the picture.")
    ] = Path("induction"),
    seed: Annotated[int, typer.Option(help="Of the weights, of the training and of the documents.", min=0)] = 0,
    steps: Annotated[int, typer.Option(help="Steps of training.", min=1)] = 1500,
    quiet: Quiet = False,
) -> None:
    """Induction heads from a store: train a two-layer transformer to copy, and find the heads that do it."""
    from pipelines import induction as pipeline

    pipeline.run(output, console, seed=seed, steps=steps, progress=not quiet)


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def main(arguments: list[str] | None = None) -> Any:
    """Run a command; user mistakes end in one message and a status of 1, or 2 for a wrong configuration."""
    make_encodable(sys.stdout, sys.stderr)
    errors = Console(stderr=True)
    try:
        try:
            return app(arguments, prog_name="flexcache")
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # who reads the output has enough
        _give_up_output()
        sys.exit(1)
    except OSError as error:  # such as an output or a standard output that cannot be written
        said = f"{error.strerror or type(error).__name__}" + (f": {error.filename}" if error.filename else "")
        errors.print(f"[bold red]error:[/] {escape(said)}", highlight=False, soft_wrap=True)
        _give_up_output()
        sys.exit(1)
    except FlexCacheError as error:
        first, _, rest = str(error).partition("\n")
        errors.print(f"[bold red]error:[/] {escape(first)}", highlight=False, soft_wrap=True)
        if rest:
            errors.print(escape(rest), highlight=False, soft_wrap=True)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        errors.print("stopped: committed units are kept; the same command goes on after them", highlight=False)
        sys.exit(130)


def _give_up_output() -> None:
    """Lead the standard output nowhere: what is still buffered would fail again at exit."""
    if sys.__stdout__ is not None and sys.stdout is sys.__stdout__:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())
