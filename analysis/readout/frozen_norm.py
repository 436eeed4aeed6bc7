"""Norms as linear maps: the gain, bias and centring of a norm, and its scale at given rows."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from flexcache.errors import AnalysisError

Floats = NDArray[np.float64]
TOLERANCE = 1e-4
"""Largest relative distance of a norm from its linear form, in float32."""


@dataclass(frozen=True, eq=False)
class FrozenNorm:
    """A norm of the form ``scale(x) · gain ⊙ (x − mean(x)) + bias``, with or without the mean.

    RMSNorm, LayerNorm, their variants without gain or bias, and layer scales have this form; it is found from the
    module's outputs on fixed inputs, so that no class is listed. With the scale of each row kept fixed, it is linear.

    >>> norm = FrozenNorm.of(nn.LayerNorm(4), features=4)
    >>> norm.centered
    True
    >>> scale = norm.measure_scales(np.array([[1.0, 2.0, 3.0, 6.0]]))
    >>> norm.pull_back(np.array([[1.0, 0.0, 0.0, 0.0]]), scale).sum().round(6)  # blind to the mean
    np.float64(0.0)

    Attributes
    ----------
    gain, bias : ndarray of float64, shape (features,)
        The gain up to a constant, which the scales contain.
    centered : bool
        True if the mean of each row is subtracted.
    """

    module: Any
    gain: Floats
    bias: Floats
    centered: bool

    @classmethod
    def of(cls, module: nn.Module, features: int) -> FrozenNorm:
        """Return the linear form of a module.

        Raises
        ------
        AnalysisError
            The module does not have this form.
        """
        norm = cls(copy.deepcopy(module).float().cpu().eval(), np.ones(features), np.zeros(features), False)
        signs = np.where(np.arange(features) % 2, -1.0, 1.0)  # of mean 0 and without zeros
        if features % 2:
            signs[-3:] = 1, 1, -2
        plus, minus, shifted = norm.apply(np.stack([signs, -signs, signs + 1]))
        gain = (plus - minus) / 2 / signs
        centered = bool(np.abs(shifted - plus).max() <= TOLERANCE * np.abs(plus).max())
        found = cls(norm.module, gain, (plus + minus) / 2, centered)
        found.measure_scales(np.random.default_rng(0).standard_normal((4, features)))
        return found

    def apply(self, x: Floats) -> Floats:
        """Return the module's own output for rows, computed in float32: float64, shape (rows, features)."""
        with torch.inference_mode():
            return np.asarray(self.module(torch.from_numpy(np.asarray(x, np.float32))).double().numpy())

    def measure_scales(self, x: Floats) -> Floats:
        """Return the scale of each row, shape (rows,).

        Raises
        ------
        AnalysisError
            The module's output is not of the linear form.
        """
        linear = self.gain * (x - self.centered * x.mean(-1, keepdims=True))
        made = self.apply(x) - self.bias
        square = np.square(linear).sum(-1)
        scale: Floats = np.einsum("rf,rf->r", linear, made) / np.where(square, square, 1)
        error = np.linalg.norm(made - scale[:, None] * linear, axis=-1)
        if not (error <= TOLERANCE * np.maximum(np.linalg.norm(made, axis=-1), np.linalg.norm(self.bias))).all():
            raise AnalysisError(
                "a norm of the model cannot be written as a linear map with the scale of each row",
                where=type(self.module).__name__,
                expected="scale(x) · gain · (x − mean(x)) + bias",
                found=f"a relative distance of {float(np.nanmax(error / np.linalg.norm(made, axis=-1))):.2g}",
            )
        return scale

    def pull_back(self, direction: Floats, scale: Floats) -> Floats:
        """Return directions u such that ``direction · (norm(x) − bias)`` is ``u · x``: shape (rows, features)."""
        weighted = self.gain * direction
        centred: Floats = scale[:, None] * (weighted - self.centered * weighted.mean(-1, keepdims=True))
        return centred
