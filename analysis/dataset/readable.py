"""The store interface that analyses need, and the words for rows and tasks."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import pyarrow as pa
from numpy.typing import NDArray

from flexcache.spec import CaptureSpec

RowWord = Literal["last", "first", "mean", "max", "all", "tokens"]


Rows = RowWord | int
"""The rows of a document that are used: a word, or a token position; negative positions count from the end."""


Task = Literal["classification", "regression"]


class Readable(Protocol):
    """The part of a store that an analysis needs; `flexcache.open` returns one."""

    @property
    def documents(self) -> pa.Table:
        """One row per document, with ``row_start`` and ``n_rows``."""
        ...

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the arrays."""
        ...

    @property
    def spec(self) -> CaptureSpec:
        """Settings of the capture; ``spec.rows`` is the row selection."""
        ...

    def layers(self, site: str) -> tuple[int, ...]:
        """Return the captured layers; none if the site is a module path."""
        ...

    def read(self, site: str, layer: int | None = None, rows: Any = ...) -> NDArray[Any]:
        """Return rows as float32, ``(len(rows), …)``."""
        ...
