"""Edits of one activation by itself: set, scaled, steered, projected, erased, noised, or any function of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import index
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from analysis.replay.edits.edit import Edit, checked_edit
from analysis.replay.edits.edit_context import EditContext
from flexcache.errors import AnalysisError
from flexcache.provenance import load, origin

Numbers = float | tuple[float, ...] | list[float]


@dataclass(frozen=True, eq=False, repr=False)
class Identity(Edit):
    """Change nothing."""

    def change(self, x: torch.Tensor, spot: EditContext) -> torch.Tensor:
        """Return *x*."""
        return x


@dataclass(frozen=True, eq=False, repr=False)
class Zero(Edit):
    """Set to zero: everything, or the features *dims* (zero ablation)."""

    dims: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        self._indices("dims")

    def change(self, x: torch.Tensor, spot: EditContext) -> torch.Tensor:
        """Return zeros, or *x* with some features zero."""
        x = x.clone()
        x[:, slice(None) if self.dims is None else self._dims(self.dims, x)] = 0
        return x


@dataclass(frozen=True, eq=False, repr=False)
class Mean(Edit):
    """Replace by the mean (mean ablation; Wang et al. 2022, arXiv 2211.00593): everything, or the features *dims*.

    Parameters
    ----------
    over
        The mean is the store's, over ``"all"`` rows, or over those at the same ``"position"``.
    value
        Another mean in its place, of shape (features,).
    """

    dims: tuple[int, ...] | None = None
    over: str = "all"
    value: NDArray[Any] | None = None

    def __post_init__(self) -> None:
        self._indices("dims")
        if self.over not in ("all", "position"):
            raise self._unmeant('over as "all" or "position"', repr(self.over))
        if self.value is not None:
            self._array("value")

    def change(self, x: torch.Tensor, spot: EditContext) -> torch.Tensor:
        """Return the mean, or *x* with some features from it."""
        mean = spot.mean(self.over, x) if self.value is None else self._fit(self.value, x).expand_as(x)
        dims = slice(None) if self.dims is None else self._dims(self.dims, x)
        x = x.clone()
        x[:, dims] = mean[:, dims]
        return x


@dataclass(frozen=True, eq=False, repr=False)
class Scale(Edit):
    """Multiply by *factor*: everything, or the features *dims*."""

    factor: Numbers = 1.0
    dims: tuple[int, ...] | None = None
    strength_field: ClassVar[str] = "factor"

    def __post_init__(self) -> None:
        self._numbers("factor")
        self._indices("dims")

    def change(self, x: torch.Tensor, spot: EditContext) -> torch.Tensor:
        """Return *x*, multiplied."""
        x = x.clone()
        x[:, slice(None) if self.dims is None else self._dims(self.dims, x)] *= self._one(self.factor)
        return x


@dataclass(frozen=True, eq=False, repr=False)
class Clamp(Edit):
    """Bring into the range from *low* to *high*: everything, or the features *dims*."""

    low: float | None = None
    high: float | None = None
    dims: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        self._indices("dims")
        if self.low is None and self.high is None:
            raise self._unmeant("low, high, or both", "neither")
        for name in ("low", "high"):
            if getattr(self, name) is not None:
                self._number(name)
        if self.low is not None and self.high is not None and self.low > self.high:
            raise self._unmeant("low up to high", f"low {self.low}, high {self.high}")

    def change(self, x: torch.Tensor, spot: EditContext) -> torch.Tensor:
        """Return *x*, cut off."""
        dims = slice(None) if self.dims is None else self._dims(self.dims, x)
        x = x.clone()
        x[:, dims] = x[:, dims].clamp(self.low, self.high)
        return x


@dataclass(frozen=True, eq=False, repr=False)
class SetNeurons(Edit):
    """Set the features *dims* to *values*, one for each or one for all; in ``mlp_post`` they are neurons."""

    dims: tuple[int, ...]
    values: Numbers = 0.0

    def __post_init__(self) -> None:
        self._indices("dims")
        self._numbers("values")
        if isinstance(self.values, tuple) and len(self.values) != len(self.dims):
            raise self._unmeant(f"{len(self.dims)} values", str(len(self.values)))

    def change(self, x: torch.Tensor, spot: EditContext) -> torch.Tensor:
        """Return *x* with some features set."""
        x = x.clone()
        x[:, self._dims(self.dims, x)] = torch.tensor(self.values).to(x)
        return x


@dataclass(frozen=True, eq=False, repr=False)
class Steer(Edit):
    """Add *alpha* times a vector of shape (features,) (Turner et al. 2023, arXiv 2308.10248)."""

    vector: NDArray[Any]
    alpha: Numbers = 1.0
    strength_field: ClassVar[str] = "alpha"

    def __post_init__(self) -> None:
        self._array("vector")
        self._numbers("alpha")

    def change(self, x: torch.Tensor, spot: EditContext) -> torch.Tensor:
        """Return *x*, steered."""
        return x + self._one(self.alpha) * self._fit(self.vector, x)

    def with_random_directions(self, seed: int, features: int) -> Edit | None:
        """Return the same with a random vector of equal length."""
        drawn = np.random.default_rng(seed).standard_normal(len(self.vector))
        return Steer(drawn * (np.linalg.norm(self.vector) / np.linalg.norm(drawn)), self.alpha)


@dataclass(frozen=True, eq=False, repr=False)
class ProjectOut(Edit):
    """Remove the span of *directions*, shape (features,) or (k, features) (Arditi et al. 2024, arXiv 2406.11717)."""

    directions: NDArray[Any]

    def __post_init__(self) -> None:
        self._array("directions", (1, 2))

    def change(self, x: torch.Tensor, spot: EditContext) -> torch.Tensor:
        """Return *x* without its part along the directions."""
        basis = self._fit(orthonormal(self.directions), x)
        return x - (x @ basis.T) @ basis

    def with_random_directions(self, seed: int, features: int) -> Edit | None:
        """Return the same with as many random directions."""
        return ProjectOut(random_basis(self.directions, seed))


@dataclass(frozen=True, eq=False, repr=False)
class Noise(Edit):
    """Add noise of *scale* times each activation's own norm, in a direction uniform on the sphere."""

    scale: Numbers = 1.0
    strength_field: ClassVar[str] = "scale"

    def __post_init__(self) -> None:
        self._numbers("scale")

    def change(self, x: torch.Tensor, spot: EditContext) -> torch.Tensor:
        """Return *x* with noise."""
        return x + self._one(self.scale) * x.norm(dim=-1, keepdim=True) * spot.noise(x)


@dataclass(frozen=True, eq=False, repr=False)
class NormMatched(Edit):
    """Move each activation as far as *edit* moves it, in a direction uniform on the sphere: a control for the edit."""

    edit: Edit

    def __post_init__(self) -> None:
        checked_edit(self.edit)

    def change(self, x: torch.Tensor, spot: EditContext) -> torch.Tensor:
        """Return *x* with noise of the norm of the edit's change."""
        moved = (self.edit.change(x, spot) - x).norm(dim=-1, keepdim=True)
        return x + moved * spot.noise(x, salt=1)


@dataclass(frozen=True, eq=False, repr=False)
class ByLayer(Edit):
    """Another edit in each layer, such as a direction of its own: *edits* are pairs of layer and edit."""

    edits: Any

    def __post_init__(self) -> None:
        try:
            pairs = self.edits.items() if isinstance(self.edits, Mapping) else self.edits
            found = tuple((index(layer), edit) for layer, edit in pairs)
        except (TypeError, ValueError):
            found = ()
        if not found:
            raise self._unmeant("a mapping from layer to edit", repr(self.edits)[:80])
        self._set("edits", tuple((layer, checked_edit(edit)) for layer, edit in found))

    @property
    def strengths(self) -> tuple[float, ...]:
        """The strengths of the first layer's edit."""
        found: tuple[float, ...] = self.edits[0][1].strengths
        return found

    def at_strength(self, strength: float) -> Edit:
        """Return the edits at one strength."""
        return ByLayer(tuple((layer, edit.at_strength(strength)) for layer, edit in self.edits))

    @property
    def name(self) -> str:
        """The first layer's edit's name."""
        return f"{self.edits[0][1].name} by layer"

    def change(self, x: torch.Tensor, spot: EditContext) -> torch.Tensor:
        """Return what the layer's own edit gives."""
        return self.of(spot.layer).change(x, spot)

    def of(self, layer: int | None) -> Edit:
        """Return the edit of a layer.

        Raises
        ------
        AnalysisError
            It has none.
        """
        found: dict[int, Edit] = dict(self.edits)
        if layer in found:
            return found[layer]
        raise AnalysisError(
            f"the edit has none for layer {layer}", expected=f"one of {[number for number, _ in self.edits]}"
        )

    def with_random_directions(self, seed: int, features: int) -> Edit | None:
        """Return the edits with random directions."""
        drawn = [(layer, edit.with_random_directions(seed, features)) for layer, edit in self.edits]
        kept = [(layer, edit) for layer, edit in drawn if edit is not None]
        return ByLayer(tuple(kept)) if kept else None


@dataclass(frozen=True, eq=False, repr=False)
class Function(Edit):
    """Any editing function of FlexModel's form: ``(module, activation, save_ctx, modules) -> activation``.

    It gets the whole activation, of shape (lines, longest, features), and what it gives is used at the chosen tokens.
    Given as ``"package.module:attribute"``, it can be written as JSON.
    """

    function: str | Callable[..., torch.Tensor]

    def __post_init__(self) -> None:
        if not callable(self.function) and not isinstance(self.function, str):
            raise self._unmeant('a function, or "package.module:attribute"', repr(self.function)[:80])

    def to_json(self) -> dict[str, Any]:
        """Return the function's path, or where it comes from; only a path can be read again."""
        value = self.function if isinstance(self.function, str) else origin(self.function)
        return {"kind": "Function", "function": value}

    def whole(
        self, activation: torch.Tensor, index: tuple[torch.Tensor, torch.Tensor], spot: EditContext
    ) -> torch.Tensor:
        """Return the activation with the chosen tokens from the function."""
        function = load(self.function, "an edit") if isinstance(self.function, str) else self.function
        edited = function(spot.module, activation.clone(), None, nn.ModuleDict())
        if not isinstance(edited, torch.Tensor) or edited.shape != activation.shape:
            raise AnalysisError(
                "an editing function gave another shape",
                where=str(self),
                expected=str(tuple(activation.shape)),
                found=str(tuple(getattr(edited, "shape", ()))) or type(edited).__name__,
            )
        return activation.index_put(index, edited[index].to(activation.dtype))

    def change(self, x: torch.Tensor, spot: EditContext) -> torch.Tensor:
        """Return what the function makes of the tokens, as if they were all of one line."""
        function = load(self.function, "an edit") if isinstance(self.function, str) else self.function
        return function(spot.module, x[None].clone(), None, nn.ModuleDict())[0]


def orthonormal(directions: NDArray[Any]) -> NDArray[np.float64]:
    """Return an orthonormal basis, shape (rank, features), of what directions span."""
    _, size, basis = np.linalg.svd(np.atleast_2d(directions), full_matrices=False)
    return basis[size > size.max() * np.finfo(np.float64).eps * max(directions.shape)]


def random_basis(directions: NDArray[Any], seed: int) -> NDArray[np.float64]:
    """Return as many random directions, orthonormal."""
    shape = np.atleast_2d(directions).shape
    return orthonormal(np.random.default_rng(seed).standard_normal(shape))
