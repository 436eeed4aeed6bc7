"""Commands that run a model: plan, estimate, capture, extend and sites; and the schema of their files."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import typer

from flexcache.parallel.launch import launch
from flexcache.recording.run_options import RunOptions
from pipelines.commands.arguments import Changes, ConfigPath, Quiet, add_options, console, help_of, read_capture
from pipelines.config.forecast_terms import ForecastTerms
from pipelines.config.yaml_remedies import yaml_remedies

Side = Literal["encoder", "decoder", "vision"]
AllowMixed = Annotated[bool, typer.Option(help=help_of(RunOptions, "allow_mixed"))]
AllowChangedModel = Annotated[bool, typer.Option(help=help_of(RunOptions, "allow_changed_model"))]


@yaml_remedies("capture")
def plan(config: ConfigPath, changes: Changes = None, quiet: Quiet = False) -> None:
    """Print the rows, bytes, files and padding of a capture, and whether it fits; no weights are loaded."""
    from pipelines import plan as pipeline

    pipeline.run(read_capture(config, changes), console, progress=not quiet)


LEAST = {"sample": 1, "seconds": 0.1, "tokens_per_second": 1e-9, "write_rate": 1e-9, "processes": 1}
"""Smallest values of the terms of an estimate on the command line; 0 for the others."""
TERMS: dict[str, tuple[Any, Any]] = {
    name: (
        Annotated[field.annotation, typer.Option(help=help_of(ForecastTerms, name), min=LEAST.get(name, 0))],
        field.default,
    )
    for name, field in ForecastTerms.model_fields.items()
}


@yaml_remedies("capture")
@add_options(TERMS)
def estimate(
    config: ConfigPath,
    changes: Changes = None,
    keep: Annotated[
        str | None, typer.Option(help="Layers of resid_post on disk, such as every:6; other layers are virtual.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    quiet: Quiet = False,
    **terms: Any,
) -> None:
    """Estimate the bytes, files, hours, memory and cost of a capture from a sample and a short trial."""
    from pipelines import estimate as pipeline

    kept = [] if keep is None else [f"keep={keep}"]
    given = read_capture(config, [*(changes or ()), *kept])
    forecast = pipeline.run(given, ForecastTerms(**terms), progress=not quiet)
    if as_json:
        console.print_json(data=forecast.to_json())
    else:
        console.print(forecast.table())


@yaml_remedies("capture")
def capture(
    config: ConfigPath,
    changes: Changes = None,
    allow_mixed: AllowMixed = False,
    allow_changed_model: AllowChangedModel = False,
    quiet: Quiet = False,
) -> None:
    """Run a model over documents and store its activations; run it again to resume a capture that was stopped."""
    from pipelines import capture as pipeline

    settings = read_capture(config, changes)
    given: dict[str, Any] = {"allow_mixed": allow_mixed, "allow_changed_model": allow_changed_model}
    if settings.model.adapters is None:
        _print_store(pipeline.run(settings, **given, progress=not quiet))
        return
    for store in pipeline.run_variants(settings, **given, progress=not quiet).values():
        _print_store(store)


@yaml_remedies("capture")
def extend(
    config: ConfigPath,
    changes: Changes = None,
    new_only: Annotated[
        bool, typer.Option(help="Leave out documents whose ids the store has: for a corpus that has grown.")
    ] = False,
    discard: Annotated[bool, typer.Option(help="Discard an extension that was begun and is not finished.")] = False,
    allow_mixed: AllowMixed = False,
    allow_changed_model: AllowChangedModel = False,
    quiet: Quiet = False,
) -> None:
    """Add to a store the documents, layers or sites that a configuration names and the store lacks."""
    from pipelines import extend as pipeline

    settings = read_capture(config, changes)
    if discard:
        pipeline.discard(settings.store, console)
        return
    _print_store(
        pipeline.run(
            settings,
            new_only=new_only,
            allow_mixed=allow_mixed,
            allow_changed_model=allow_changed_model,
            progress=not quiet,
        )
    )


def schema(
    file: Annotated[
        Literal["capture", "replay"], typer.Argument(help="The kind of file: that of a capture, or of a replay.")
    ] = "capture",
) -> None:
    """Print the JSON schema of a configuration file, for editors that complete and check YAML."""
    from pipelines.config.capture_config import CaptureConfig
    from pipelines.config.replay_config import ReplayConfig

    model = CaptureConfig if file == "capture" else ReplayConfig
    typer.echo(json.dumps(model.model_json_schema(), indent=2))


def sites(
    model: Annotated[str, typer.Argument(help="A folder or a name on the hub.")],
    match: Annotated[str | None, typer.Option(help="Only modules whose path matches this glob.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Print every module, repeated blocks too.")] = False,
    revision: Annotated[str | None, typer.Option(help="Revision of a model on the hub.")] = None,
    side: Annotated[
        Side | None, typer.Option(help="Part of a model that has several: encoder, decoder or vision.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, an object for each module.")] = False,
) -> None:
    """List the modules, shapes and sites of a model, without weights; under torchrun, also how they are sharded."""
    from pipelines import sites as pipeline

    pipeline.run(model, console, revision=revision, side=side, match=match, every=every, as_json=as_json)


def _print_store(store: Any) -> None:
    """Print a store, once where several processes run."""
    if launch().rank == 0:
        console.print(repr(store), highlight=False, markup=False)
