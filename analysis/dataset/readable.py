"""The store interface that analyses need, and the words for rows and tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import pyarrow as pa
from numpy.typing import NDArray

RowWord = Literal["last", "first", "mean", "max", "all", "tokens"]


Rows = RowWord | int
"""Which rows of a document: a word, or the row of a token position, negative from the end."""


Task = Literal["classification", "regression"]


class Readable(Protocol):
    """What an analysis needs of a store; `flexcache.open` returns one."""

    @property
    def documents(self) -> pa.Table:
        """One row a document, with ``row_start`` and ``n_rows``."""
        ...

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of the arrays."""
        ...

    @property
    def spec(self) -> Mapping[str, Any]:
        """The capture's settings; ``spec["rows"]`` is the row selection."""
        ...

    def layers(self, site: str) -> tuple[int, ...]:
        """Return the captured layers, none where the site is a module path."""
        ...

    def read(self, site: str, layer: int | None = None, rows: Any = ...) -> NDArray[Any]:
        """Return rows as float32, ``(len(rows), …)``."""
        ...
