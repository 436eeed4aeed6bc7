"""The token of each patch of an image: special tokens by name, and a grid of patches, row by row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Patches:
    """The tokens of an image, in the order of a vision transformer.

    A token's position is its place in the sequence. The patch in row *r* and column *c* has the position
    ``first + r * columns + c``. Rows count from the top and columns from the left of the image as the model reads it,
    after resizing and cropping.

    Attributes
    ----------
    before, after : tuple of str
        Names of the special tokens before and after the patches: ``cls``, ``distillation``, ``register_0``, ….
    rows, columns : int
        Size of the grid of patches.

    >>> patches = Patches(("cls",), 2, 3)
    >>> patches.tokens, patches.position(1, 0), patches.place([0, 4])[0].tolist()
    (7, 4, [-1, 1])
    """

    before: tuple[str, ...]
    rows: int
    columns: int
    after: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Number of tokens of an image."""
        return self.first + self.rows * self.columns + len(self.after)

    @property
    def first(self) -> int:
        """Position of the first patch: the number of special tokens before it."""
        return len(self.before)

    @property
    def specials(self) -> dict[str, int]:
        """The positions of the special tokens by name."""
        behind = self.first + self.rows * self.columns
        return dict(zip((*self.before, *self.after), (*range(self.first), *range(behind, self.tokens)), strict=True))

    def position(self, row: int, column: int) -> int:
        """Return the position of the patch in a row and column.

        Raises
        ------
        IndexError
            The grid has no such patch.
        """
        if not (0 <= row < self.rows and 0 <= column < self.columns):
            raise IndexError(f"no patch in row {row}, column {column}: the grid has {self.rows} × {self.columns}")
        return self.first + row * self.columns + column

    def place(self, positions: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return row and column of the patches at *positions*, -1 for special tokens: int64, in their shape."""
        offset = np.asarray(positions, np.int64) - self.first
        special = (offset < 0) | (offset >= self.rows * self.columns)
        row, column = np.divmod(offset, self.columns)
        return np.where(special, -1, row), np.where(special, -1, column)

    def name(self, position: int) -> str:
        """Return the name of a special token, or row and column of a patch, as ``"2,3"``.

        >>> Patches(("cls",), 2, 3).name(5)
        '1,1'
        """
        row, column = (int(part) for part in self.place(position))
        if row >= 0:
            return f"{row},{column}"
        return next((name for name, place in self.specials.items() if place == position), f"#{position}")

    def map(self, values: Any) -> np.ndarray:
        """Return values of one image's tokens, shape (tokens, …), as a map of its patches: (rows, columns, …).

        Special tokens are left out. Values of the patches only, shape (rows · columns, …), are accepted too.

        Raises
        ------
        ValueError
            The number of values is neither.
        """
        array, count = np.asarray(values), self.rows * self.columns
        if len(array) not in (count, self.tokens):
            raise ValueError(f"{self.tokens} tokens or {count} patches make an image, and these are {len(array)}")
        patches = array if len(array) == count else array[self.first : self.first + count]
        return patches.reshape(self.rows, self.columns, *array.shape[1:])

    def to_json(self) -> dict[str, Any]:
        """Return the layout as values for JSON."""
        return {**asdict(self), "before": list(self.before), "after": list(self.after)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Patches:
        """Return the layout from the values of `to_json`."""
        return cls(
            tuple(map(str, data["before"])), int(data["rows"]), int(data["columns"]), tuple(map(str, data["after"]))
        )
