"""Ready-made editing functions: zero, mean, scale, add a vector, project directions out, swap rows.

::

    HookFunction("model.layers.7.mlp", editing_function=Scale(0.5, positions=-1))

Each edit is a value that prints its settings, changes nothing in place, and lets gradients through. *positions* chooses
tokens along dim 1 of an activation of shape (rows, tokens, features); all tokens by default. Edits are equal if they
hold the same tensor objects and equal settings. Settings that no edit can have raise HookError when the edit is made;
settings that do not fit an activation raise it when the edit is applied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from flexcache.errors import HookError
from flexcache.hooks.flexmodel.edit_checks import EditChecks, shape_text
from flexcache.hooks.flexmodel.edit_operations import (
    add_vector,
    batch_mean,
    orthonormal_basis,
    project,
    replace_features,
)
from flexcache.hooks.flexmodel.hook_function import EditingFunction

Positions = int | slice | Sequence[int] | None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Edit(EditChecks):
    """An editing function that changes the tokens at *positions*, and no others.

    A subclass defines `change`::

        @dataclass(frozen=True, eq=False, repr=False)
        class Negate(Edit):
            def change(self, x):
                return -x
    """

    positions: Positions = None

    def __post_init__(self) -> None:
        if self.positions is not None and not isinstance(self.positions, int | slice):
            self._check_integers("positions", self.positions)

    def __repr__(self) -> str:
        held = ((field.name, getattr(self, field.name)) for field in fields(self))
        texts = (
            f"{name}={shape_text(value) if isinstance(value, torch.Tensor) else repr(value)}" for name, value in held
        )
        return f"{type(self).__name__}({', '.join(texts)})"

    # By identity of tensors: == of tensors is a tensor, and tensors of equal values may be trained apart later.
    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and isinstance(other, Edit) and self._held() == other._held()

    def __hash__(self) -> int:
        return hash((type(self), repr(self)))  # settings may be lists, which have no hash; equal edits print alike

    def _held(self) -> list[Any]:
        values = (getattr(self, field.name) for field in fields(self))
        return [("tensor", id(value)) if isinstance(value, torch.Tensor) else value for value in values]

    def __call__(
        self, module: nn.Module, activation: torch.Tensor, save_ctx: Any, modules: nn.ModuleDict
    ) -> torch.Tensor:
        """Return the edited activation."""
        if self.positions is None:
            return self.change(activation)
        index = self._token_index(activation)
        edited = self.change(activation.index_select(1, index))
        return activation.index_copy(1, index, edited.to(activation.dtype))

    def change(self, x: torch.Tensor) -> torch.Tensor:
        """Return the new values of activations of shape (rows, tokens, features)."""
        raise HookError(f"{type(self).__name__} does not define an edit", remedy="use a subclass, such as Zero()")

    def _token_index(self, activation: torch.Tensor) -> torch.Tensor:
        if activation.ndim < 2:
            raise self.misfit_error(
                "an activation of shape (rows, tokens, …)",
                shape_text(activation),
                "leave positions out: there is no token dim",
            )
        length = activation.shape[1]
        if isinstance(self.positions, slice):
            chosen = list(range(length)[self.positions])
        else:
            asked = (self.positions,) if isinstance(self.positions, int) else tuple(self.positions or ())
            if any(not -length <= position < length for position in asked):
                raise self.misfit_error(
                    f"positions from {-length} to {length - 1}", str(list(asked)), "choose tokens that the batch has"
                )
            # Each token once: a token that is copied back twice would count twice in gradients.
            chosen = list(dict.fromkeys(position % length for position in asked))
        return torch.tensor(chosen, dtype=torch.int64, device=activation.device)

    def _check_integers(self, name: str, value: Any) -> None:
        if not isinstance(value, Sequence) or not all(type(number) is int for number in value):
            raise self.settings_error(f"{name} to be a list of whole numbers", repr(value), f"write {name}=[0, 1]")

    def _check_tensor(self, name: str, value: Any) -> None:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            found = f"a tensor of {value.dtype}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
            raise self.settings_error(
                f"{name} to be a tensor of floating-point numbers", found, f"give {name} as torch.Tensor"
            )

    def _check_number(self, name: str, value: Any) -> None:
        if not isinstance(value, int | float):
            raise self.settings_error(f"{name} to be a number", repr(value)[:80], f"write {name}=0.5")


@dataclass(frozen=True, eq=False, repr=False)
class Zero(Edit):
    """Set all features, or the features *dims*, to zero (zero ablation); the features of ``mlp_post`` are neurons.

    ::

        Zero([507], positions=0)
    """

    dims: Sequence[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dims is not None:
            self._check_integers("dims", self.dims)

    def change(self, x: torch.Tensor) -> torch.Tensor:
        """Return *x* with these features zero."""
        return replace_features(x, x.new_zeros(()), self.check_dims(self.dims, x))


@dataclass(frozen=True, eq=False, repr=False)
class Mean(Edit):
    """Replace by a mean of shape (features,) that is given as *value* (Wang et al. 2022, arXiv 2211.00593).

    `BatchMean` computes the mean of the batch at hand. ::

        Mean(activations.mean(dim=(0, 1)))
    """

    value: torch.Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.value is None:
            raise self.settings_error("value, a mean of shape (features,)", "None", "for the batch's own: BatchMean()")
        self._check_tensor("value", self.value)

    def change(self, x: torch.Tensor) -> torch.Tensor:
        """Return the mean in place of every token."""
        assert self.value is not None
        return replace_features(x, self.fit_vectors(self.value, x))


@dataclass(frozen=True, eq=False, repr=False)
class BatchMean(Edit):
    """Replace by the mean over the rows and chosen tokens of the batch.

    ::

        BatchMean(positions=slice(1, None))
    """

    def change(self, x: torch.Tensor) -> torch.Tensor:
        """Return the mean in place of every token."""
        return replace_features(x, batch_mean(x))


@dataclass(frozen=True, eq=False, repr=False)
class Scale(Edit):
    """Multiply by *factor*.

    ::

        Scale(0.5)
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number("factor", self.factor)

    def change(self, x: torch.Tensor) -> torch.Tensor:
        """Return *x* times the factor."""
        return x * self.factor


@dataclass(frozen=True, eq=False, repr=False)
class Add(Edit):
    """Add *alpha* times a vector of shape (features,): steering (Turner et al. 2023, arXiv 2308.10248).

    ::

        Add(direction, alpha=4.0, positions=-1)
    """

    vector: torch.Tensor
    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_tensor("vector", self.vector)
        self._check_number("alpha", self.alpha)

    def change(self, x: torch.Tensor) -> torch.Tensor:
        """Return the steered activation."""
        return add_vector(x, self.fit_vectors(self.vector, x), self.alpha)


@dataclass(frozen=True, eq=False, repr=False)
class ProjectOut(Edit):
    """Remove the span of *directions*, of shape (features,) or (k, features) (Arditi et al. 2024, arXiv 2406.11717).

    They need not be orthogonal or of length 1. Computed in float32, or in float64 if the activation is float64. ::

        ProjectOut(direction)
    """

    directions: torch.Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_tensor("directions", self.directions)

    def change(self, x: torch.Tensor) -> torch.Tensor:
        """Return *x* without its components along the directions."""
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        basis = orthonormal_basis(self.fit_vectors(self.directions, values, (1, 2)))
        return (values - project(values, basis)).to(x.dtype)


@dataclass(frozen=True, eq=False, repr=False)
class SwapRows(Edit):
    """Replace the activations of row *i* of the batch by those of row ``order[i]`` (interchange between examples).

    The rows are those of the whole batch, on however many ranks it is. ::

        SwapRows([1, 0])
    """

    order: Sequence[int] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_integers("order", self.order)

    def change(self, x: torch.Tensor) -> torch.Tensor:
        """Return *x* with its rows in the new order."""
        if sorted(self.order) != list(range(x.shape[0])):
            raise self.misfit_error(
                f"an order of the {x.shape[0]} rows of the batch",
                str(list(self.order)),
                f"name every row from 0 to {x.shape[0] - 1} once",
            )
        return x[list(self.order)]


@dataclass(frozen=True, init=False)
class Compose:
    """Apply several editing functions, one after the other.

    ::

        Compose(Scale(0.5), Zero([3]))
    """

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
