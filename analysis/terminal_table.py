"""A table for the terminal that never cuts a number."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Column, Table
from rich.text import Text

WORD = 16
"""Characters of a text column up to which words stay whole."""


class TerminalTable(Table):
    """A `rich.table.Table` in which only text is wrapped; columns that do not fit continue in a table below.

    Columns aligned to the right hold numbers and are never wrapped nor cut. Each further table repeats the first
    columns. The caption takes the whole width.

    >>> table = TerminalTable(repeated=1, box=None)
    >>> for name in ("layer", "accuracy", "log-loss"):
    ...     table.add_column(name, justify="right")
    >>> table.add_row("3", "0.875 [0.812, 0.931]", "0.3125")
    >>> Console(width=30).print(table)  # doctest: +NORMALIZE_WHITESPACE
     layer              accuracy
         3  0.875 [0.812, 0.931]
     layer  log-loss
         3    0.3125

    Parameters
    ----------
    repeated
        Number of columns that each further table repeats.
    settings
        Of `rich.table.Table`.
    """

    def __init__(self, *headers: Column | str, repeated: int = 1, **settings: Any) -> None:
        super().__init__(*headers, **settings)
        self.repeated = repeated

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        groups = self._group_columns(options.max_width)
        for number, group in enumerate(groups):
            part = Table(box=self.box, title_justify=self.title_justify)
            part.title = None if number else self.title
            part.show_header, part.title_style = self.show_header, self.title_style
            part.columns, part.rows = [replace(column, _index=at) for at, column in enumerate(group)], self.rows
            yield part
        if self.caption:  # across the whole width, which the last table may not have
            yield console.render_str(self.caption) if isinstance(self.caption, str) else self.caption

    def _group_columns(self, width: int) -> list[list[Column]]:
        """Return the columns of each table, with the widths that they need."""
        columns = [self._fix_width(column) for column in self.columns]
        keys, groups = columns[: self.repeated], [list(columns[: self.repeated])]
        for column in columns[self.repeated :]:
            if len(groups[-1]) > len(keys) and self._count_cells([*groups[-1], column]) > width:
                groups.append(list(keys))
            groups[-1].append(column)
        return groups

    def _fix_width(self, column: Column) -> Column:
        cells = [_plain(cell) for cell in (column.header, *column.cells)]
        if column.justify == "right":
            width = max(cell_len(line) for cell in cells for line in cell.split("\n"))
            return replace(column, no_wrap=True, min_width=width)
        width = max((cell_len(word) for cell in cells for word in cell.split()), default=1)
        return replace(column, no_wrap=False, overflow="fold", min_width=min(width, WORD))

    def _count_cells(self, columns: list[Column]) -> int:
        return sum((column.min_width or 1) + 2 for column in columns) + (len(columns) + 1 if self.box else 0)


def _plain(cell: Any) -> str:
    return cell.plain if isinstance(cell, Text) else Text.from_markup(str(cell)).plain
