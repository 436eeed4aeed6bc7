"""Edits that people use, as editing functions: zero, mean, scale, add a vector, project a direction out, swap rows.

::

    HookFunction("model.layers.7.mlp", editing_function=Scale(0.5, positions=-1))

Each is a value that prints what it is, changes nothing in place, and lets gradients through. *positions* chooses
tokens, along dim 1 of an activation of shape (rows, tokens, features); all by default. Edits that hold the very same
tensors and equal settings are equal. What does not fit raises a HookError: settings that make no sense at once, those
that do not fit an activation when they meet it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from flexcache.errors import HookError
from flexcache.hooks.flexmodel.hook_function import EditingFunction

Positions = int | slice | Sequence[int] | None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Edit:
    """An editing function that changes the tokens at *positions* by `change`, and no others."""

    positions: Positions = None

    def __post_init__(self) -> None:
        if self.positions is not None and not isinstance(self.positions, int | slice):
            self._whole_numbers("positions", self.positions)

    def __repr__(self) -> str:
        held = ((field.name, getattr(self, field.name)) for field in fields(self))
        said = (f"{name}={_shape(value) if isinstance(value, torch.Tensor) else repr(value)}" for name, value in held)
        return f"{type(self).__name__}({', '.join(said)})"

    # By identity of tensors: == of tensors is a tensor, and equal values may be trained apart later.
    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and isinstance(other, Edit) and self._held() == other._held()

    def __hash__(self) -> int:
        return hash((type(self), repr(self)))  # of lists as well; equal edits print alike

    def _held(self) -> list[Any]:
        values = (getattr(self, field.name) for field in fields(self))
        return [("tensor", id(value)) if isinstance(value, torch.Tensor) else value for value in values]

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
            raise self._misfit(
                "an activation of shape (rows, tokens, …)",
                _shape(activation),
                "leave positions out: there is no token dim",
            )
        length = activation.shape[1]
        if isinstance(self.positions, slice):
            chosen = list(range(length)[self.positions])
        else:
            asked = (self.positions,) if isinstance(self.positions, int) else tuple(self.positions or ())
            if any(not -length <= position < length for position in asked):
                raise self._misfit(
                    f"positions from {-length} to {length - 1}", str(list(asked)), "choose tokens that the batch has"
                )
            # Once each: a token that is copied back twice would count twice in gradients.
            chosen = list(dict.fromkeys(position % length for position in asked))
        return torch.tensor(chosen, dtype=torch.int64, device=activation.device)

    def _vector(self, value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if value.shape != x.shape[-1:]:
            raise self._misfit(
                f"a vector of {x.shape[-1]} features", _shape(value), "take the vector from the site that is edited"
            )
        return value.to(x.device, x.dtype)

    def _misfit(self, expected: str, found: str, remedy: str) -> HookError:
        return HookError(
            "an edit does not fit the activation", where=str(self), expected=expected, found=found, remedy=remedy
        )

    def _whole_numbers(self, name: str, value: Any) -> None:
        if not isinstance(value, Sequence) or not all(type(number) is int for number in value):
            raise self._unmeant(f"{name} to be a list of whole numbers", repr(value), f"write {name}=[0, 1]")

    def _tensor(self, name: str, value: Any) -> None:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            found = f"a tensor of {value.dtype}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
            raise self._unmeant(
                f"{name} to be a tensor of floating-point numbers", found, f"give {name} as torch.Tensor"
            )

    def _number(self, name: str, value: Any) -> None:
        if not isinstance(value, int | float):
            raise self._unmeant(f"{name} to be a number", repr(value)[:80], f"write {name}=0.5")

    def _unmeant(self, expected: str, found: str, remedy: str) -> HookError:
        return HookError(
            "an edit cannot be made of this", where=type(self).__name__, expected=expected, found=found, remedy=remedy
        )


@dataclass(frozen=True, eq=False, repr=False)
class Zero(Edit):
    """Set to zero: everything, or the features *dims*, which in ``mlp_post`` are neurons (zero ablation)."""

    dims: Sequence[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dims is not None:
            self._whole_numbers("dims", self.dims)

    def change(self, x: torch.Tensor) -> torch.Tensor:
        """Return zeros, or *x* with some features zero."""
        if self.dims is None:
            return torch.zeros_like(x)
        if any(not -x.shape[-1] <= dim < x.shape[-1] for dim in self.dims):
            raise self._misfit(
                f"features from 0 to {x.shape[-1] - 1}", str(list(self.dims)), "choose features that the site has"
            )
        kept = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)
        kept[list(self.dims)] = 0
        return torch.where(kept.bool(), x, torch.zeros_like(x))


@dataclass(frozen=True, eq=False, repr=False)
class Mean(Edit):
    """Replace by a mean (Wang et al. 2022, arXiv 2211.00593): *value*, of shape (features,), or that of this batch."""

    value: torch.Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.value is not None:
            self._tensor("value", self.value)

    def change(self, x: torch.Tensor) -> torch.Tensor:
        """Return the mean, in the place of every token."""
        if self.value is not None:
            return self._vector(self.value, x).expand_as(x)
        precise = torch.promote_types(x.dtype, torch.float32)
        return x.to(precise).flatten(0, -2).mean(dim=0).to(x.dtype).expand_as(x)


@dataclass(frozen=True, eq=False, repr=False)
class Scale(Edit):
    """Multiply by a factor."""

    factor: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._number("factor", self.factor)

    def change(self, x: torch.Tensor) -> torch.Tensor:
        """Return *x*, multiplied."""
        return x * self.factor


@dataclass(frozen=True, eq=False, repr=False)
class Add(Edit):
    """Add *alpha* times a vector of shape (features,): steering (Turner et al. 2023, arXiv 2308.10248)."""

    vector: torch.Tensor
    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._tensor("vector", self.vector)
        self._number("alpha", self.alpha)

    def change(self, x: torch.Tensor) -> torch.Tensor:
        """Return *x*, steered."""
        return x + self.alpha * self._vector(self.vector, x)


@dataclass(frozen=True, eq=False, repr=False)
class ProjectOut(Edit):
    """Remove the span of *directions*, of shape (features,) or (k, features) (Arditi et al. 2024, arXiv 2406.11717).

    They need not be orthogonal or of length 1. Computed in float32, or float64 where the activation is.
    """

    directions: torch.Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        self._tensor("directions", self.directions)

    def change(self, x: torch.Tensor) -> torch.Tensor:
        """Return *x* without its part along the directions."""
        directions = torch.atleast_2d(self.directions)
        if directions.ndim != 2 or directions.shape[1] != x.shape[-1]:
            raise self._misfit(
                f"directions of {x.shape[-1]} features, of shape (k, {x.shape[-1]})",
                _shape(self.directions),
                "take the directions from the site that is edited",
            )
        precise = torch.promote_types(x.dtype, torch.float32)
        basis, size, _ = torch.linalg.svd(directions.to(x.device, precise).T, full_matrices=False)
        basis = basis[:, size > size.max() * torch.finfo(precise).eps * max(directions.shape)]
        values = x.to(precise)
        return (values - (values @ basis) @ basis.T).to(x.dtype)


@dataclass(frozen=True, eq=False, repr=False)
class SwapRows(Edit):
    """Give row *i* of the batch the activations of row ``order[i]`` (interchange between examples).

    The rows are those of the whole batch, on however many ranks it is.
    """

    order: Sequence[int] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self._whole_numbers("order", self.order)

    def change(self, x: torch.Tensor) -> torch.Tensor:
        """Return *x*, its rows in another order."""
        if sorted(self.order) != list(range(x.shape[0])):
            raise self._misfit(
                f"an order of the {x.shape[0]} rows of the batch",
                str(list(self.order)),
                f"name every row from 0 to {x.shape[0] - 1} once",
            )
        return x[list(self.order)]


@dataclass(frozen=True, init=False)
class Compose:
    """Several editing functions, one after the other."""

    edits: tuple[EditingFunction, ...]

    def __init__(self, *edits: EditingFunction) -> None:
        for edit in edits:
            if not callable(edit):
                raise HookError(
                    "an edit cannot be made of this",
                    where="Compose",
                    expected="editing functions, one after the other",
                    found=repr(edit)[:80],
                    remedy="write Compose(Scale(0.5), Zero([3]))",
                )
        object.__setattr__(self, "edits", edits)

    def __call__(
        self, module: nn.Module, activation: torch.Tensor, save_ctx: Any, modules: nn.ModuleDict
    ) -> torch.Tensor:
        """Return the activation after all edits."""
        for edit in self.edits:
            activation = edit(module, activation, save_ctx, modules)
        return activation


def _shape(tensor: torch.Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))})"
