"""Transforms: functions of an activation whose results are stored, with or without the activation."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flexcache.errors import CaptureError, ConfigError, FlexCacheError
from flexcache.provenance import callable_fingerprint
from flexcache.site import PATTERN, STANDARD, Layers, Site

if TYPE_CHECKING:
    import torch

    from flexcache.recording.forward.batch import Batch


@dataclass(frozen=True)
class Transform:
    """A function of the whole, unsharded activation at a site, whose result becomes an array of the store.

        Transform("sae", "resid_post", layers=[12], function=encoder)              # an nn.Module, or any callable
        Transform("attention_entropy", "pattern", function=entropy)                # of attention probabilities

    Attributes
    ----------
    name : str
        Name of the array: letters, digits, underscores and dots.
    site : str
        A site, or ``"pattern"``: attention probabilities, shape (sequences, heads, queries, keys), for which the
        model must be loaded with ``attn_implementation="eager"``.
    function : callable
        Maps activations, a tensor of shape (sequences, longest, features…) on the model's device, to a tensor of
        shape (sequences, longest) or (sequences, longest, features…), both with padding, which is dropped afterwards.
        A row must depend on its own sequence alone. It is called without gradients, and must not change its argument.
    layers : "all", int, str or list of int
        Layers of a standard site or of the pattern.
    batch : bool
        Pass the `Batch` to the function as a second argument, for its token ids and lengths.
    """

    name: str
    site: str
    function: Callable[..., Any]
    layers: Layers = "all"
    batch: bool = False

    def __post_init__(self) -> None:
        """Raise ConfigError if the name, the function or the site cannot be used."""
        if not re.fullmatch(r"[A-Za-z][\w.]*", self.name) or self.name in STANDARD or self.name == PATTERN:
            raise ConfigError(
                f"transform {self.name!r} cannot have this name",
                expected="letters, digits, underscores and dots, and no site",
            )
        if not callable(self.function):
            raise ConfigError(
                f"transform {self.name} has no function", expected="a callable", found=type(self.function).__name__
            )
        _ = self.parsed_site

    @property
    def parsed_site(self) -> Site:
        """The site as a `Site`."""
        return Site(PATTERN, "pattern") if self.site == PATTERN else Site.parse(self.site)

    @property
    def feature_dim(self) -> str:
        """Name of the last dim of the array."""
        return f"feature_{self.name}"

    def describe(self) -> dict[str, Any]:
        """Return the record of the transform for a store."""
        layers = list(self.layers) if isinstance(self.layers, list | tuple | range) else self.layers
        return {"site": str(self.site), "layers": layers, "batch": self.batch, **callable_fingerprint(self.function)}

    def __call__(self, values: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return the array's values for a batch, shape (sequences, longest, features…).

        Raises
        ------
        CaptureError
            The function failed, or returned another shape.
        """
        import torch

        try:
            with torch.no_grad():
                found = self.function(values, batch) if self.batch else self.function(values)
        except (FlexCacheError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise CaptureError(
                f"the function of transform {self.name} failed",
                where=f"on activations of shape {tuple(values.shape)}",
                found=f"{type(error).__name__}: {error}",
            ) from error
        if not isinstance(found, torch.Tensor) or tuple(found.shape[:2]) != batch.shape:
            raise CaptureError(
                f"transform {self.name} returned no value for each token",
                expected=f"shape ({batch.shape[0]}, {batch.shape[1]}, …) for (sequences, longest, features)",
                found=str(tuple(found.shape)) if isinstance(found, torch.Tensor) else type(found).__name__,
            )
        found = found if found.is_floating_point() else found.float()
        return found.unsqueeze(2) if found.ndim == 2 else found
