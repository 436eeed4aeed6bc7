"""Tensor operations of edits, used by hooks on a live model and by replays of a store.

Each operation returns its result without changing its input, and gradients flow through it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def replace_features(x: torch.Tensor, values: torch.Tensor, dims: Sequence[int] | None = None) -> torch.Tensor:
    """Return *x* with the features *dims* taken from *values*; None takes all of them.

    Parameters
    ----------
    x : Tensor of shape (..., features)
    values : Tensor that broadcasts to the shape of *x*
    """
    values = values.to(x).expand_as(x)
    if dims is None:
        return values.clone()
    edited = x.clone()
    edited[..., list(dims)] = values[..., list(dims)]
    return edited


def add_vector(x: torch.Tensor, vector: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
    """Return *x* plus *alpha* times a vector of shape (features,)."""
    return x + alpha * vector


def batch_mean(x: torch.Tensor) -> torch.Tensor:
    """Return the mean over all dims but the last, computed in float32 or wider: shape (features,)."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).flatten(0, -2).mean(dim=0).to(x.dtype)


def orthonormal_basis(directions: torch.Tensor) -> torch.Tensor:
    """Return an orthonormal basis of the span of *directions*, shape (rank, features).

    Parameters
    ----------
    directions : Tensor of shape (features,) or (k, features)
        They need not be orthogonal, of length 1 or linearly independent.
    """
    _, size, basis = torch.linalg.svd(torch.atleast_2d(directions), full_matrices=False)
    return basis[size > size.max() * torch.finfo(size.dtype).eps * max(directions.shape)]


def project(x: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Return the orthogonal projection of *x* onto the span of an orthonormal *basis*, shape (rank, features)."""
    return (x @ basis.T) @ basis
