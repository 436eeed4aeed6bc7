"""Edits that people use, as editing functions: zero, mean, scale, add a vector, project a direction out, swap rows.

    HookFunction("model.layers.7.mlp", editing_function=Scale(0.5, positions=-1))

Each is a value that prints what it is, changes nothing in place, and lets gradients through. *positions* chooses
tokens, along dim 1 of an activation of shape (rows, tokens, features); all by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from flexcache.errors import HookError
from flexcache.hooks.hook_function import EditingFunction

Positions = int | slice | Sequence[int] | None


@dataclass(frozen=True, kw_only=True)
class Edit:
    """An editing function that changes the tokens at *positions* by `change`, and no others."""

    positions: Positions = None

    def __call__(
        self, module: nn.Module, activation: torch.Tensor, save_ctx: Any, modules: nn.ModuleDict
    ) -> torch.Tensor:
        """Return the edited activation."""
        if self.positions is None:
            return self.change(activation)
        index = self._tokens(activation)
        edited = self.change(activation.index_select(1, index))
        return activation.index_copy(1, index, edited.to(activation.dtype))

    def change(self, x: torch.Tensor) -> torch.Tensor:
        """Return the new values of activations of shape (rows, tokens, features)."""
        raise HookError(f"{type(self).__name__} is no edit by itself", remedy="use one of its kinds, such as Zero()")

    def _tokens(self, activation: torch.Tensor) -> torch.Tensor:
        if activation.ndim < 2:
            raise self._misfit("an activation of shape (rows, tokens, …)", str(tuple(activation.shape)))
        length = activation.shape[1]
        if isinstance(self.positions, slice):
            chosen = list(range(length)[self.positions])
        else:
            asked = (self.positions,) if isinstance(self.positions, int) else tuple(self.positions or ())
            if any(not -length <= position < length for position in asked):
                raise self._misfit(f"positions from {-length} to {length - 1}", str(list(asked)))
            chosen = [position % length for position in asked]
        return torch.tensor(chosen, dtype=torch.int64, device=activation.device)

    def _misfit(self, expected: str, found: str) -> HookError:
        return HookError("an edit does not fit the activation", where=str(self), expected=expected, found=found)


@dataclass(frozen=True)
class Zero(Edit):
    """Set to zero: everything, or the features *dims*, which in ``mlp_post`` are neurons (zero ablation)."""

    dims: Sequence[int] | None = None

    def change(self, x: torch.Tensor) -> torch.Tensor:
        """Return zeros, or *x* with some features zero."""
        if self.dims is None:
            return torch.zeros_like(x)
        if any(not -x.shape[-1] <= dim < x.shape[-1] for dim in self.dims):
            raise self._misfit(f"features from 0 to {x.shape[-1] - 1}", str(list(self.dims)))
        kept = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)
        kept[list(self.dims)] = 0
        return torch.where(kept.bool(), x, torch.zeros_like(x))


@dataclass(frozen=True)
class Mean(Edit):
    """Replace by a mean (Wang et al. 2022, arXiv 2211.00593): *value*, of shape (features,), or that of this batch."""

    value: torch.Tensor | None = field(default=None, compare=False, repr=False)

    def change(self, x: torch.Tensor) -> torch.Tensor:
        """Return the mean, in the place of every token."""
        if self.value is not None:
            return self._vector(self.value, x).expand_as(x)
        return x.float().flatten(0, -2).mean(dim=0).to(x.dtype).expand_as(x)

    def _vector(self, value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if tuple(value.shape) != (x.shape[-1],):
            raise self._misfit(f"a vector of {x.shape[-1]} features", str(tuple(value.shape)))
        return value.to(x.device, x.dtype)


@dataclass(frozen=True)
class Scale(Edit):
    """Multiply by a factor."""

    factor: float = 1.0

    def change(self, x: torch.Tensor) -> torch.Tensor:
        """Return *x*, multiplied."""
        return x * self.factor


@dataclass(frozen=True)
class Add(Edit):
    """Add *alpha* times a vector of shape (features,): steering (Turner et al. 2023, arXiv 2308.10248)."""

    vector: torch.Tensor = field(compare=False, repr=False)
    alpha: float = 1.0

    def change(self, x: torch.Tensor) -> torch.Tensor:
        """Return *x*, steered."""
        if tuple(self.vector.shape) != (x.shape[-1],):
            raise self._misfit(f"a vector of {x.shape[-1]} features", str(tuple(self.vector.shape)))
        return x + self.alpha * self.vector.to(x.device, x.dtype)


@dataclass(frozen=True)
class ProjectOut(Edit):
    """Remove the span of *directions*, of shape (features,) or (k, features) (Arditi et al. 2024, arXiv 2406.11717).

    They need not be orthogonal or of length 1. Computed in float32, or float64 where the activation is.
    """

    directions: torch.Tensor = field(compare=False, repr=False)

    def change(self, x: torch.Tensor) -> torch.Tensor:
        """Return *x* without its part along the directions."""
        directions = torch.atleast_2d(self.directions)
        if directions.ndim != 2 or directions.shape[1] != x.shape[-1]:
            raise self._misfit(f"directions of {x.shape[-1]} features", str(tuple(self.directions.shape)))
        precise = torch.promote_types(x.dtype, torch.float32)
        basis, size, _ = torch.linalg.svd(directions.to(x.device, precise).T, full_matrices=False)
        basis = basis[:, size > size.max() * torch.finfo(precise).eps * max(directions.shape)]
        values = x.to(precise)
        return (values - (values @ basis) @ basis.T).to(x.dtype)


@dataclass(frozen=True)
class SwapRows(Edit):
    """Give row *i* of the batch the activations of row ``order[i]`` (interchange between examples).

    The rows are those of the whole batch, on however many ranks it is.
    """

    order: Sequence[int] = ()

    def change(self, x: torch.Tensor) -> torch.Tensor:
        """Return *x*, its rows in another order."""
        if sorted(self.order) != list(range(x.shape[0])):
            raise self._misfit(f"an order of the {x.shape[0]} rows of the batch", str(list(self.order)))
        return x[list(self.order)]


@dataclass(frozen=True, init=False)
class Compose:
    """Several editing functions, one after the other."""

    edits: tuple[EditingFunction, ...]

    def __init__(self, *edits: EditingFunction) -> None:
        object.__setattr__(self, "edits", edits)

    def __call__(
        self, module: nn.Module, activation: torch.Tensor, save_ctx: Any, modules: nn.ModuleDict
    ) -> torch.Tensor:
        """Return the activation after all edits."""
        for edit in self.edits:
            activation = edit(module, activation, save_ctx, modules)
        return activation
