"""flexcache sites: list the modules of a model, their shapes and sites, and how processes share them."""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flexcache.errors import ConfigError, FlexCacheError, SiteError, nearest
from flexcache.hooks.checks.sharding import Sharding, survey_sharding
from flexcache.hooks.checks.survey import ModuleSide, SurveyedModule, survey
from flexcache.hooks.locate.names import glob_regex
from flexcache.model import ModelSource
from flexcache.site import Side

ITSELF = "(the model)"
TIMEOUT = timedelta(minutes=30)
"""Time that ranks wait for each other while weights are loaded."""


@dataclass(frozen=True)
class Line:
    """A line of the table: equal modules whose paths match one pattern."""

    pattern: str
    entries: tuple[SurveyedModule, ...]
    cells: tuple[str, ...]

    @property
    def times(self) -> str:
        """The number of modules in the line, as text; ``""`` for one."""
        return f"× {len(self.entries)}" if len(self.entries) > 1 else ""


def run(
    name: str,
    console: Console,
    *,
    revision: str | None = None,
    side: Literal["encoder", "decoder", "vision"] | None = None,
    match: str | None = None,
    every: bool = False,
    as_json: bool = False,
) -> None:
    """Print the modules of a model; under a launcher, also how its processes share each activation.

    A single process loads no weights. Only rank 0 prints.

    Parameters
    ----------
    side
        The part of a model that has several, as in a configuration.
    match
        A glob of module paths, as in a site.
    every
        Print a line for each module instead of one for equal modules of all blocks.
    as_json
        Print a list of objects, one for each module.

    Raises
    ------
    ConfigError
        The model cannot be loaded.
    SiteError
        No module matches, or the model does not run on a small example.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    source = ModelSource(name=name, revision=revision, side=side)
    try:
        model = source.skeleton()
        found = chosen(_survey(model), match)
    except FlexCacheError:
        if rank:
            sys.exit(1)  # every rank meets the same; rank 0 says it
        raise
    shared = _shared(source, type(model), found) if world > 1 else {}
    if rank:
        return
    if as_json:
        text = json.dumps([record(entry, shared) for entry in found], indent=1, ensure_ascii=False)
        console.print(text, highlight=False, markup=False, soft_wrap=True)
        return
    lines = [_line((entry,), shared) for entry in found] if every else collapse(found, shared)
    _print(_table(f"{name} on {world} processes" if world > 1 else name, lines, bool(shared)), console)


def chosen(found: Sequence[SurveyedModule], match: str | None) -> tuple[SurveyedModule, ...]:
    """Return the entries whose path matches a glob; all entries if it is None.

    Raises
    ------
    SiteError
        No module matches.
    """
    if match is None:
        return tuple(found)
    glob = re.compile(glob_regex(match))
    matching = tuple(entry for entry in found if entry.path and glob.fullmatch(entry.path))
    if not matching:
        paths = tuple(entry.path for entry in found if entry.path)
        raise SiteError(f"no module that runs matches {match!r}", remedy=nearest(match, paths))
    return matching


def collapse(found: Sequence[SurveyedModule], shared: dict[ModuleSide, Sharding]) -> list[Line]:
    """Return one line for modules whose paths differ only in numbers and that are equal in everything shown.

    If modules of one pattern are not all equal, each line lists its numbers.
    """
    groups: dict[tuple[str, tuple[str, ...]], list[SurveyedModule]] = {}
    for entry in found:
        groups.setdefault((_pattern(entry.path), _cells(entry, shared)), []).append(entry)
    patterns = [pattern for pattern, _ in groups]
    lines = []
    for (pattern, _), entries in groups.items():
        line = _line(tuple(entries), shared)
        if len(entries) > 1 and patterns.count(pattern) > 1:
            line = Line(f"{line.pattern} ({_numbers(entries)})", line.entries, line.cells)
        lines.append(line)
    return lines


def record(entry: SurveyedModule, shared: dict[ModuleSide, Sharding]) -> dict[str, Any]:
    """Return a module as plain data.

    Shapes are lists of sizes, such as ``["batch", "length", "64"]``, or null without a tensor.
    """
    plain: dict[str, Any] = {
        "module": entry.path,
        "class": entry.kind,
        "input": None if entry.input is None else [str(size) for size in entry.input],
        "output": None if entry.output is None else [str(size) for size in entry.output],
        "dtype": entry.dtype,
        "runs": entry.runs,
        "sites": [{"site": point.array, "layer": point.layer, "side": point.side} for point in entry.points],
    }
    sides: tuple[Side, Side] = ("input", "output")
    for side in sides:
        if shared:
            sharding = shared.get((entry.path, side))
            plain[f"{side}_on_ranks"] = None if sharding is None else str(sharding)
    return plain


def _survey(model: Any) -> tuple[SurveyedModule, ...]:
    try:
        return survey(model)
    except SiteError as error:
        raise _with_remedy(
            error,
            "the command surveys models that read token ids; for others call flexcache.hooks.checks.survey(model,"
            " example=…) in Python",
        ) from error


def _with_remedy(error: SiteError, remedy: str) -> SiteError:
    """Return an error with a remedy for the command line, where no example can be passed."""
    return SiteError(error.message, where=error.where, expected=error.expected, found=error.found, remedy=remedy)


def _shared(source: ModelSource, kind: Any, found: Sequence[SurveyedModule]) -> dict[ModuleSide, Sharding]:
    """Load the model over all processes, run it once, and return the sharding of its activations."""
    if (source := source.resolved()).adapter:
        raise ConfigError(
            "an adapter cannot be loaded into a model that several processes share",
            where=source.adapter[0].path,
            remedy="start one process; or give the base model",
        )
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    try:
        with warnings.catch_warnings():
            # transformers 5 asks for a DistributedConfig instead, which its releases before do not have
            warnings.filterwarnings("ignore", "Passing `tp_plan`", FutureWarning)
            try:
                model = kind.from_pretrained(
                    source.name, revision=source.revision or "main", dtype=source.dtype, tp_plan="auto"
                )
            except (OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError) as error:
                raise ConfigError(
                    f"model {source.name} cannot be loaded over {dist.get_world_size()} processes",
                    found=f"{type(error).__name__}: {(str(error).strip() or '–').splitlines()[0]}",
                    remedy="start fewer processes, or one: it shows the shapes without how they are shared",
                ) from error
        try:
            return survey_sharding(model.eval(), found)
        except SiteError as error:
            raise _with_remedy(
                error,
                f"whole, the model runs; its heads may not divide by {dist.get_world_size()} processes: start another"
                " number, or one, which shows the shapes without how they are shared",
            ) from error
    finally:
        dist.destroy_process_group()


def _pattern(path: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in path.split("."))


def _numbers(entries: Sequence[SurveyedModule]) -> str:
    """Return the first numbers in which paths differ, with consecutive ones as ``0–2``."""
    numbers = sorted({int(part) for entry in entries for part in entry.path.split(".") if part.isdecimal()})
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def _line(entries: tuple[SurveyedModule, ...], shared: dict[ModuleSide, Sharding]) -> Line:
    path = entries[0].path if len(entries) == 1 else _pattern(entries[0].path)
    return Line(path or ITSELF, entries, _cells(entries[0], shared))


def _cells(entry: SurveyedModule, shared: dict[ModuleSide, Sharding]) -> tuple[str, ...]:
    on_input, on_output = shared.get((entry.path, "input"), ""), shared.get((entry.path, "output"), "")
    return (
        entry.kind + (f", runs {entry.runs} times" if entry.runs > 1 else ""),
        entry.shape("input"),
        *([str(on_input)] if shared else []),
        entry.shape("output"),
        *([str(on_output)] if shared else []),
        entry.dtype or "–",
        ", ".join(point.array for point in entry.points),
    )


def _table(title: str, lines: Sequence[Line], shared: bool) -> Table:
    table = Table(title=f"[bold]{escape(title)}[/]", title_justify="left", box=None)
    heads = ["module", "", "class", "input", *(["on ranks"] if shared else [])]
    for head in [*heads, "output", *(["on ranks"] if shared else []), "dtype", "site"]:
        table.add_column(head, overflow="fold")
    for line in lines:
        table.add_row(*(escape(cell) for cell in (line.pattern, line.times, *line.cells)))
    return table


def _print(table: Table, console: Console) -> None:
    """Print a table; into a file or a pipe, in its full width."""
    if console.is_terminal:
        console.print(table)
        return
    width = console.measure(table, options=console.options.update(max_width=10_000)).maximum
    Console(file=console.file, width=width).print(table)
