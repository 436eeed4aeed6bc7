"""Commands that analyse stores: probe, stats, compare, report, replay."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flexcache.errors import ConfigError
from flexcache.store.storage.location import parse_location
from pipelines.commands.arguments import (
    ATTACH_OPTIONS,
    Changes,
    ConfigPath,
    LayerChoice,
    Quiet,
    Sites,
    StorePath,
    add_options,
    add_working_folder,
    attached,
    check_applicable,
    console,
    split_names,
    split_pairs,
)
from pipelines.config.yaml_remedies import yaml_remedies

SWEEP_OPTIONS: dict[str, tuple[Any, Any]] = {
    "cv": (Annotated[int, typer.Option(help="Folds of the cross-validation.")], 5),
    "groups": (
        Annotated[str, typer.Option(help="Label column whose values stay within one fold, or document.")],
        "document",
    ),
    "rows": (
        Annotated[
            str | None,
            typer.Option(
                help="last, first, mean, max or all tokens of a document; tokens, each as a sample; or a position."
            ),
        ],
        None,
    ),
    "layers": (LayerChoice, "all"),
    "task": (
        Annotated[
            str | None,
            typer.Option(
                help="classification or regression, for a target that may be either; by default from its values."
            ),
        ],
        None,
    ),
    "nulls": (
        Annotated[
            int,
            typer.Option(
                help="Draws of shuffled labels, control task and random direction; 20 give p-values down to 0.05.",
                min=1,
            ),
        ],
        1,
    ),
    "repeats": (
        Annotated[
            int,
            typer.Option(
                help="Cross-validations with other folds, for an interval that allows for other training samples.",
                min=1,
            ),
        ],
        1,
    ),
    "seed": (Annotated[int, typer.Option(help="Seed of folds, shuffles and bootstrap.", min=0)], 0),
}
"""Options of a sweep by name, with their defaults."""
TRANSFER_OPTIONS = ("target", "classes", "other_model", "groups", "rows", "layers", "seed", "output")
COMPARE_OPTIONS = ("layers", "metric", "output")
PAIR_OPTIONS = ("layers", "cv", "groups", "rows", "task", "seed")
"""Options of a sweep that a comparison of two stores takes."""
DASK_OPTIONS: dict[str, tuple[Any, Any]] = {
    "scheduler": (
        Annotated[
            str,
            typer.Option(
                help="threads, synchronous, processes, or the address of a Dask scheduler, such as tcp://head:8786."
            ),
        ],
        "threads",
    ),
    "workers": (
        Annotated[int | None, typer.Option(help="Threads or processes; one for each core by default.", min=1)],
        None,
    ),
}
"""Where a pass over a store runs, by name, with the defaults."""


def _given_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a sweep that differ from their defaults; rows that are a position are a number."""
    given = {name: value for name, value in options.items() if value != SWEEP_OPTIONS[name][1]}
    if (rows := str(given.get("rows", ""))).lstrip("-").isdigit():
        given["rows"] = int(rows)
    return given


@add_options(SWEEP_OPTIONS | ATTACH_OPTIONS)
def probe(
    places: Annotated[
        list[str],
        typer.Argument(
            metavar="STORE",
            help="A store; or transfer FOLDER STORE, to score saved probes on another store; or compare FOLDER..., to"
            " compare saved probes, or layers of one.",
        ),
    ],
    target: Annotated[
        str | None,
        typer.Option(
            help="Columns of the documents to predict, separated by commas; or token_id, position. For transfer, the"
            " saved target by default."
        ),
    ] = None,
    site: Annotated[str, typer.Option(help="Sites to probe, separated by commas.")] = "resid_post",
    kind: Annotated[
        str | None,
        typer.Option(
            "--probe",
            help="Probes, separated by commas: logistic, ridge, mass-mean, nearest-centroid, lda, inlp, mlp, attention."
            " By default logistic for classes, ridge for numbers.",
        ),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            help="For transfer, the class of the probe for each class of the target: fresh=positive,rotten=negative."
        ),
    ] = None,
    other_model: Annotated[
        bool, typer.Option("--other-model", help="For transfer, score the probes on activations of another model too.")
    ] = False,
    metric: Annotated[
        str | None,
        typer.Option(
            help="Metric that layer and strength are chosen by, shown first; by default log_loss, or auroc,"
            " balanced_accuracy or r2 for a probe without probabilities. For compare, the metric; the first one of the"
            " first sweep by default."
        ),
    ] = None,
    class_weight: Annotated[
        str | None, typer.Option(help="balanced: all classes weigh the same in the loss of a logistic probe.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for results, plots and report.")] = None,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Train probes on every captured layer, with baselines and nested grouped cross-validation; or use saved ones."""
    from pipelines import probe as pipeline

    model = {name: options.pop(name) for name in ATTACH_OPTIONS}
    given = _given_options(options)
    others = {"probe": kind, "site": site != "resid_post", "classes": classes, "metric": metric, "target": target}
    others |= {"class_weight": class_weight, "other_model": other_model} | model
    special = [*given, *filter(others.get, others)]
    if places[0] == "compare" and len(places) > 1:
        check_applicable("flexcache probe compare", special, COMPARE_OPTIONS)
        pipeline.run_compare(places[1:], str(options["layers"]), metric, output=output, console=console)
        return
    if places[0] == "transfer" and len(places) == 3:
        check_applicable("flexcache probe transfer", special, TRANSFER_OPTIONS)
        pipeline.run_transfer(
            places[1],
            places[2],
            target,
            split_pairs(classes),
            output=output,
            console=console,
            other_model=other_model,
            **given,
        )
        return
    if len(places) != 1 or target is None:
        raise ConfigError(
            "a probe needs a store and a target",
            expected="flexcache probe STORE --target COLUMN, flexcache probe transfer FOLDER STORE, or flexcache probe"
            " compare FOLDER FOLDER",
            found=" ".join(["flexcache probe", *places]) + ("" if target else ", without --target"),
        )
    unused = {"classes": classes, "other_model": other_model}
    check_applicable("flexcache probe STORE", [*filter(unused.get, unused)], ())
    with attached(places[0], model) as opened:
        pipeline.run(
            opened,
            split_names(target),
            split_names(site),
            split_names(kind) if kind else None,
            metric=metric,
            class_weight=class_weight,
            output=output,
            console=console,
            progress=not quiet,
            **given,
        )


@add_options(DASK_OPTIONS | ATTACH_OPTIONS)
def stats(
    store: StorePath,
    site: Annotated[str, typer.Option(help="Site of the statistics.")] = "resid_post",
    by: Annotated[
        str, typer.Option(help="Groups of the moments: layer, position, token_id, token_type, label columns.")
    ] = "layer,position",
    only: Annotated[
        str | None,
        typer.Option(help="Compute only some of moments, pca, quantiles, outliers, similarity, lens, examples."),
    ] = None,
    layers: LayerChoice = "all",
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint folder, for token types and lens; that of the store by default."),
    ] = None,
    rows: Annotated[int | None, typer.Option(help="Approximate number of rows for covariances.", min=2)] = None,
    similarity_rows: Annotated[
        int | None,
        typer.Option(help="Approximate number of rows for similarity and lens; 1,024 or fewer by default.", min=2),
    ] = None,
    own_logits: Annotated[
        bool, typer.Option("--own-logits", help="Load the whole model, and compare the lens with its own logits.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the sampled documents.", min=0)] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the results; stats by default.")
    ] = None,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Compute statistics and geometry of a site, reading each shard once; results are kept as Zarr and reused."""
    from pipelines import stats as pipeline

    with attached(store, options) as opened:
        pipeline.run(
            opened,
            site,
            by=split_names(by),
            only=split_names(only) if only else None,
            layers=layers,
            model=model,
            **options,
            rows=rows,
            similarity_rows=similarity_rows,
            own_logits=own_logits,
            seed=seed,
            output=output,
            progress=not quiet,
        )


@add_options({**{name: SWEEP_OPTIONS[name] for name in PAIR_OPTIONS}, **DASK_OPTIONS})
def compare(
    store: StorePath,
    other: Annotated[
        Any, typer.Argument(parser=parse_location, metavar="OTHER", help="Another store of the same tokens.")
    ],
    sites: Sites = None,
    target: Annotated[
        str | None,
        typer.Option(help="Label to predict in both stores; probes of the first are also scored on the second."),
    ] = None,
    kind: Annotated[str | None, typer.Option("--probe", help="One of the probes of flexcache probe.")] = None,
    metric: Annotated[str | None, typer.Option(help="Metric of the probe; as for flexcache probe.")] = None,
    similarity_rows: Annotated[int, typer.Option(help="Approximate number of rows for CKA.", min=4)] = 1024,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for results and picture; compare by default.")
    ] = None,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Compare two stores of the same tokens by site and layer: relative error, cosine, CKA, and the loss of a probe."""
    from pipelines import compare as pipeline

    where = {name: options.pop(name) for name in DASK_OPTIONS}
    pipeline.run(
        store,
        other,
        sites=sites,
        target=target,
        probe=kind,
        metric=metric,
        similarity_rows=similarity_rows,
        output=output,
        console=console,
        progress=not quiet,
        **_given_options(options),
        **where,
    )


@add_options(DASK_OPTIONS)
def report(
    store: StorePath,
    site: Annotated[str, typer.Option(help="Site of the report.")] = "resid_post",
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint folder, for tokens and lens; that of the store by default."),
    ] = None,
    stats: Annotated[Path | None, typer.Option(help="Folder of the statistics; stats by default.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page; next to the statistics by default.")
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Write an HTML page about a store: norms, spectra, layer similarity, outliers, logit lens, top tokens of dims."""
    from pipelines import report as pipeline

    pipeline.run(
        store,
        site,
        model=model,
        statistics=stats,
        output=output,
        show=show,
        **options,
        progress=not quiet,
    )


@yaml_remedies("replay")
def replay(
    store: StorePath,
    config: ConfigPath,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for results, plots and report.")] = None,
    changes: Changes = None,
    quiet: Quiet = False,
) -> None:
    """Edit cached activations, run only the rest of the model, and report the effects; run it again to resume."""
    from pipelines import replay as pipeline
    from pipelines.config.replay_config import read_replay

    settings = read_replay(config, changes or ())
    if settings.names_functions:
        add_working_folder()
    pipeline.run(store, settings, config, output, console, progress=not quiet)
