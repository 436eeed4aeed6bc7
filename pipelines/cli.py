"""The command line: ``flexcache COMMAND``, or ``python -m pipelines COMMAND`` under a launcher."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

from flexcache.errors import ConfigError, FlexCacheError
from pipelines.commands import analyses, captures, demos, exchange, stores, virtual
from pipelines.commands.plain import make_encodable

app = typer.Typer(
    help="Cache transformer activations once, and study them without the model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for command in (
    *(captures.plan, captures.estimate, captures.capture, captures.extend, captures.schema),
    *(
        stores.info,
        stores.label,
        captures.sites,
        stores.verify,
        stores.repair,
        stores.copy,
        stores.bench_codec,
        stores.preshuffle,
    ),
    *(stores.merge, stores.rm, virtual.thin, virtual.fill, exchange.export, exchange.import_),
    *(analyses.probe, analyses.stats, analyses.compare, analyses.report, analyses.replay, demos.demo),
):
    app.command(command.__name__.strip("_").replace("_", "-"))(command)


def main(arguments: list[str] | None = None) -> Any:
    """Run a command; user mistakes end in one message and a status of 1, or 2 for a wrong configuration."""
    make_encodable(sys.stdout, sys.stderr)
    errors = Console(stderr=True)
    try:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *place: errors.print(
                    f"[yellow]note:[/] {escape(str(message))}", highlight=False, soft_wrap=True
                )
                return app(arguments, prog_name="flexcache")
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has closed it
        _give_up_output()
        sys.exit(1)
    except OSError as error:  # such as an output that cannot be written
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
        errors.print("stopped: committed units are kept; the same command resumes after them", highlight=False)
        sys.exit(130)


def _give_up_output() -> None:
    """Redirect the standard output to the null device, because buffered text would fail again at exit."""
    if sys.__stdout__ is not None and sys.stdout is sys.__stdout__:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())
