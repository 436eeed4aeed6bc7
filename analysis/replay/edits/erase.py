"""LEACE as an edit: the least change of activations after which no linear probe finds a concept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from analysis.replay.edits.directions import random_basis
from analysis.replay.edits.edit import Edit
from analysis.replay.edits.edit_context import EditContext
from analysis.replay.edits.held_out import FittedEdit
from analysis.statistics.erasure import apply_eraser, fit_eraser
from flexcache.errors import AnalysisError


@dataclass(frozen=True, eq=False, repr=False)
class Erase(FittedEdit):
    """Erase a concept from activations: ``x − left · right · (x − mean)``, fitted by `fit` or `fit_store`.

    Method: Belrose et al. 2023, "LEACE: Perfect linear concept erasure in closed form", arXiv 2306.03819. On the data
    of the fit, the covariance of the erased activations with the concept is zero, so that no linear predictor beats a
    constant; on other data this holds approximately.

    >>> Erase.fit([[0.0, 1.0], [2.0, 0.0], [0.5, 3.0]], [0, 1, 0])
    Erase(left=array(2, 1), right=array(1, 2), mean=array(2,))

    Parameters
    ----------
    left, right
        Shapes (features, k) and (k, features); k is at most one less than the number of classes.
    mean
        Shape (features,).
    """

    left: NDArray[Any]
    right: NDArray[Any]
    mean: NDArray[Any]
    fitted_fields: ClassVar[tuple[str, ...]] = ("left", "right", "mean")

    def __post_init__(self) -> None:
        self._check_array("left", (2,))
        self._check_array("right", (2,))
        self._check_array("mean")

    @classmethod
    def fit(cls, X: NDArray[Any], y: NDArray[Any], **settings: Any) -> Erase:
        """Fit to activations (samples, features), and to classes (samples,) or values (samples,) or (samples, k).

        Computed in float64. Directions in which the samples hardly vary stay as they are.

        Raises
        ------
        AnalysisError
            Shapes do not fit, a value of the concept is missing, or the concept does not vary.
        """
        X, y = np.asarray(X, np.float64), np.asarray(y)
        if X.ndim != 2 or len(X) != len(y):
            raise AnalysisError("activations and concept do not fit", found=f"shapes {X.shape} and {y.shape}")
        missing = sum(value is None or value != value for value in y.ravel().tolist())
        if missing:
            raise AnalysisError(
                "a concept to erase needs a value for each sample",
                found=f"{missing} values that are missing (NaN or None)",
                remedy="leave these samples out; Erase.fit_store does so",
            )
        Z = y.astype(np.float64) if y.dtype.kind == "f" else (y[:, None] == np.unique(y)).astype(np.float64)
        Z = Z.reshape(len(Z), -1) - Z.reshape(len(Z), -1).mean(0)
        mean = X.mean(0)
        X = X - mean
        if not X.any() or not Z.any():
            raise AnalysisError("there is nothing to erase", found="a concept, or activations, that never vary")
        left, right = fit_eraser(X.T @ X / len(X), X.T @ Z / len(X))
        return cls(left, right.T, mean, **settings)

    def change(self, x: torch.Tensor, context: EditContext) -> torch.Tensor:
        """Return *x* without the concept."""
        mean, left, right = (self._fit(value, x) for value in (self.mean, self.left.T, self.right))
        return apply_eraser(x, mean, left.T, right.T)

    def with_random_directions(self, seed: int, features: int) -> Edit | None:
        """Return an orthogonal projection along as many random directions, around the same mean."""
        basis = random_basis(self.right, seed)
        return Erase(basis.T, basis, self.mean)
