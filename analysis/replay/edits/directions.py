"""Edits along directions of the activation space: steer along a vector, or project directions out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from analysis.replay.edits.edit import Edit
from analysis.replay.edits.edit_context import EditContext
from analysis.replay.edits.features import Numbers
from analysis.replay.edits.held_out import DirectionEdit
from flexcache.hooks.flexmodel.edit_operations import add_vector, orthonormal_basis, project


@dataclass(frozen=True, eq=False, repr=False)
class Steer(DirectionEdit):
    """Add *alpha* times a vector of shape (features,) (Turner et al. 2023, arXiv 2308.10248).

    >>> Steer([0.0, 1.0], alpha=[0, 2, 8])
    Steer(vector=array(2,), alpha=(0.0, 2.0, 8.0))
    """

    vector: NDArray[Any]
    alpha: Numbers = 1.0
    strength_field: ClassVar[str] = "alpha"
    fitted_fields: ClassVar[tuple[str, ...]] = ("vector",)

    def __post_init__(self) -> None:
        self._check_array("vector")
        self._check_numbers("alpha")

    def change(self, x: torch.Tensor, context: EditContext) -> torch.Tensor:
        """Return the steered activations."""
        return add_vector(x, self._fit(self.vector, x), self._one_strength(self.alpha))

    def with_random_directions(self, seed: int, features: int) -> Edit | None:
        """Return the edit with a random vector of equal length."""
        drawn = np.random.default_rng(seed).standard_normal(len(self.vector))
        return Steer(drawn * (np.linalg.norm(self.vector) / np.linalg.norm(drawn)), self.alpha)


@dataclass(frozen=True, eq=False, repr=False)
class ProjectOut(DirectionEdit):
    """Remove the span of *directions*, shape (features,) or (k, features) (Arditi et al. 2024, arXiv 2406.11717).

    >>> ProjectOut([[0.0, 1.0], [1.0, 1.0]])
    ProjectOut(directions=array(2, 2))
    """

    directions: NDArray[Any]

    def __post_init__(self) -> None:
        self._check_array("directions", (1, 2))

    def change(self, x: torch.Tensor, context: EditContext) -> torch.Tensor:
        """Return *x* without its components along the directions."""
        return x - project(x, self._fit(array_basis(self.directions), x))

    def with_random_directions(self, seed: int, features: int) -> Edit | None:
        """Return the edit with as many random directions."""
        return ProjectOut(random_basis(self.directions, seed))


def array_basis(directions: NDArray[Any]) -> NDArray[np.float64]:
    """Return an orthonormal basis of the span of directions, computed in float64: shape (rank, features)."""
    basis: NDArray[np.float64] = orthonormal_basis(torch.from_numpy(np.array(directions, np.float64))).numpy()
    return basis


def random_basis(directions: NDArray[Any], seed: int) -> NDArray[np.float64]:
    """Return an orthonormal basis of as many random directions."""
    return array_basis(np.random.default_rng(seed).standard_normal(np.atleast_2d(directions).shape))
