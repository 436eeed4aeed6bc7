"""docs/cli.md, generated from the command line.

python -m tests.pipelines.commands_page
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from typer.models import ArgumentInfo

from pipelines.cli import app

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"
INTRODUCTION = """# Commands

`flexcache COMMAND --help` prints the same. Under a launcher such as torchrun, write `-m pipelines COMMAND`. A user
error ends in one message and exit status 1, or 2 for a wrong configuration.
"""


@dataclass(frozen=True)
class Parameter:
    """An argument or option of a command, from the signature of its function."""

    name: str
    kind: Any
    info: Any
    default: Any

    @property
    def argument(self) -> bool:
        return isinstance(self.info, ArgumentInfo)

    @property
    def shown(self) -> str:
        """Its form on the command line."""
        if self.argument:
            several = "..." if get_origin(self.kind) is list else ""
            return (self.info.metavar or self.name.upper()) + several
        first = [self.info.default] if isinstance(self.info.default, str) else []  # in Annotated, a name of the option
        names = [*first, *(self.info.param_decls or ())] or ["--" + self.name.replace("_", "-")]
        return ", ".join(names) + (f" {self.info.metavar}" if self.info.metavar else "")

    @property
    def line(self) -> str:
        required = self.default is inspect.Parameter.empty
        choices = [
            value
            for kind in (self.kind, *get_args(self.kind))
            if get_origin(kind) is Literal
            for value in get_args(kind)
        ]
        what = text(self.info.help) + (f" One of {', '.join(choices)}." if choices else "")
        plain = required or self.default is None or self.default is False
        default = "required" if required and not self.argument else "" if plain else f"`{self.default}`"
        return f"| `{self.shown}` | {what} | {default} |"


def page() -> str:
    """Return the page: a table of commands, and a table of arguments and options for each command."""
    commands = {
        info.name or info.callback.__name__.replace("_", "-"): info.callback
        for info in app.registered_commands
        if info.callback is not None
    }
    rows = [f"| [`{name}`](#flexcache-{name}) | {text(command.__doc__)} |" for name, command in commands.items()]
    table = "\n".join(["| command | purpose |", "|---|---|", *rows]) + "\n"
    return "\n".join([INTRODUCTION, table, *(section(name, command) for name, command in commands.items())])


def section(name: str, command: Callable[..., Any]) -> str:
    """Return the section of a command."""
    found = sorted(parameters(command), key=lambda parameter: not parameter.argument)
    arguments = [parameter.shown for parameter in found if parameter.argument]
    usage = " ".join(["flexcache", name, *arguments, *(["[OPTIONS]"] if len(arguments) < len(found) else [])])
    lines = [f"## flexcache {name}", "", text(command.__doc__), "", f"    {usage}", ""]
    return (
        "\n".join([*lines, "| | meaning | default |", "|---|---|---|", *(parameter.line for parameter in found)]) + "\n"
    )


def parameters(command: Callable[..., Any]) -> list[Parameter]:
    hints = get_type_hints(command, include_extras=True)
    return [
        Parameter(name, *get_args(hints[name]), given.default)
        for name, given in inspect.signature(command).parameters.items()
    ]


def text(words: str | None) -> str:
    return " ".join((words or "").replace("|", "\\|").split())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
