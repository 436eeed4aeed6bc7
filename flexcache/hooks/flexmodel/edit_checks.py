"""Checks that edits of a live model and edits of a replay share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from flexcache.errors import FlexCacheError, HookError


class EditChecks:
    """Checks of an edit's settings and of how they fit an activation; subclasses choose the error that is raised."""

    error_type: ClassVar[type[FlexCacheError]] = HookError

    def check_dims(self, dims: Sequence[int] | None, x: torch.Tensor) -> Sequence[int] | None:
        """Return *dims* if *x* has these features; None stands for all."""
        features = x.shape[-1]
        if dims is not None and any(not -features <= dim < features for dim in dims):
            raise self.misfit_error(
                f"features from 0 to {features - 1}", str(list(dims)), "choose features that the site has"
            )
        return dims

    def fit_vectors(self, vectors: torch.Tensor, x: torch.Tensor, ndims: Sequence[int] = (1,)) -> torch.Tensor:
        """Return *vectors* on the device and in the dtype of *x* if their shape fits: (features,) or (k, features)."""
        features = x.shape[-1]
        if vectors.ndim not in ndims or vectors.shape[-1] != features:
            expected = f"a vector of {features} features"
            if 2 in ndims:
                expected = f"directions of {features} features, of shape (k, {features})"
            raise self.misfit_error(expected, shape_text(vectors), "take vectors from the site that is edited")
        return vectors.to(x)

    def misfit_error(self, expected: str, found: str, remedy: str | None = None) -> FlexCacheError:
        """Return the error of an edit that does not fit an activation."""
        return self.error_type(
            "an edit does not fit the activation", where=str(self), expected=expected, found=found, remedy=remedy
        )

    def settings_error(self, expected: str, found: str, remedy: str | None = None) -> FlexCacheError:
        """Return the error of settings that no edit can have."""
        return self.error_type(
            "an edit cannot be made of this", where=type(self).__name__, expected=expected, found=found, remedy=remedy
        )


def shape_text(tensor: torch.Tensor) -> str:
    """Return a shape as text: ``(2, 8)``."""
    return f"({', '.join(map(str, tensor.shape))})"
