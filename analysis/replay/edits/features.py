"""Edits of all features of an activation, or of some: zero, mean, scale, clamp, set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from numpy.typing import NDArray

from analysis.replay.edits.edit import Edit
from analysis.replay.edits.edit_context import EditContext
from flexcache.hooks.flexmodel.edit_operations import replace_features

Numbers = float | tuple[float, ...] | list[float]


@dataclass(frozen=True, eq=False, repr=False)
class Identity(Edit):
    """Change nothing.

    ::

        replay.sweep(store, model, edit=replay.Identity())
    """

    def change(self, x: torch.Tensor, context: EditContext) -> torch.Tensor:
        """Return *x*."""
        return x


@dataclass(frozen=True, eq=False, repr=False)
class Zero(Edit):
    """Set all features, or the features *dims*, to zero (zero ablation).

    >>> Zero([507])
    Zero(dims=(507,))
    """

    dims: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        self._check_indices("dims")

    def change(self, x: torch.Tensor, context: EditContext) -> torch.Tensor:
        """Return *x* with these features zero."""
        return replace_features(x, x.new_zeros(()), self.check_dims(self.dims, x))


@dataclass(frozen=True, eq=False, repr=False)
class Mean(Edit):
    """Replace all features, or the features *dims*, by their mean over the store (mean ablation).

    Method: Wang et al. 2022, arXiv 2211.00593.

    >>> Mean([507], over="position")
    Mean(dims=(507,), over='position', value=None)

    Parameters
    ----------
    over
        Mean over ``"all"`` rows, or over the rows of the same ``"position"``.
    value
        Another mean to use instead, of shape (features,).
    """

    dims: tuple[int, ...] | None = None
    over: str = "all"
    value: NDArray[Any] | None = None

    def __post_init__(self) -> None:
        self._check_indices("dims")
        if self.over not in ("all", "position"):
            raise self.settings_error('over as "all" or "position"', repr(self.over))
        if self.value is not None:
            self._check_array("value")

    def change(self, x: torch.Tensor, context: EditContext) -> torch.Tensor:
        """Return *x* with these features from the mean."""
        mean = context.store_mean(self.over, x) if self.value is None else self._fit(self.value, x)
        return replace_features(x, mean, self.check_dims(self.dims, x))


@dataclass(frozen=True, eq=False, repr=False)
class Scale(Edit):
    """Multiply all features, or the features *dims*, by *factor*.

    >>> Scale([0.5, 2], dims=[3]).strengths
    (0.5, 2.0)
    """

    factor: Numbers = 1.0
    dims: tuple[int, ...] | None = None
    strength_field: ClassVar[str] = "factor"

    def __post_init__(self) -> None:
        self._check_numbers("factor")
        self._check_indices("dims")

    def change(self, x: torch.Tensor, context: EditContext) -> torch.Tensor:
        """Return *x* with these features multiplied."""
        return replace_features(x, x * self._one_strength(self.factor), self.check_dims(self.dims, x))


@dataclass(frozen=True, eq=False, repr=False)
class Clamp(Edit):
    """Limit all features, or the features *dims*, to the range from *low* to *high*.

    >>> Clamp(high=10.0)
    Clamp(low=None, high=10.0, dims=None)
    """

    low: float | None = None
    high: float | None = None
    dims: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        self._check_indices("dims")
        if self.low is None and self.high is None:
            raise self.settings_error("low, high, or both", "neither")
        for name in ("low", "high"):
            if getattr(self, name) is not None:
                self._check_number(name)
        if self.low is not None and self.high is not None and self.low > self.high:
            raise self.settings_error("low up to high", f"low {self.low}, high {self.high}")

    def change(self, x: torch.Tensor, context: EditContext) -> torch.Tensor:
        """Return *x* with these features limited."""
        return replace_features(x, x.clamp(self.low, self.high), self.check_dims(self.dims, x))


@dataclass(frozen=True, eq=False, repr=False)
class SetNeurons(Edit):
    """Set the features *dims* to *values*, one for each or one for all; the features of ``mlp_post`` are neurons.

    >>> SetNeurons([3, 9], 1.0)
    SetNeurons(dims=(3, 9), values=1.0)
    """

    dims: tuple[int, ...]
    values: Numbers = 0.0

    def __post_init__(self) -> None:
        self._check_indices("dims")
        self._check_numbers("values")
        if isinstance(self.values, tuple) and len(self.values) != len(self.dims):
            raise self.settings_error(f"{len(self.dims)} values", str(len(self.values)))

    def change(self, x: torch.Tensor, context: EditContext) -> torch.Tensor:
        """Return *x* with these features set."""
        self.check_dims(self.dims, x)
        values = x.new_zeros(x.shape[-1])
        values[list(self.dims)] = torch.tensor(self.values).to(x)
        return replace_features(x, values, self.dims)
