"""An edit that is a different one in each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import index
from typing import Any

import torch

from analysis.replay.edits.edit import Edit, check_edit
from analysis.replay.edits.edit_context import EditContext
from flexcache.errors import AnalysisError


@dataclass(frozen=True, eq=False, repr=False)
class ByLayer(Edit):
    """A different edit in each layer, such as its own direction: a mapping from layer to edit, or pairs.

    ::

        replay.ByLayer({layer: replay.Steer(vectors[layer]) for layer in (8, 12)})
    """

    edits: Any

    def __post_init__(self) -> None:
        try:
            pairs = self.edits.items() if isinstance(self.edits, Mapping) else self.edits
            found = tuple((index(layer), edit) for layer, edit in pairs)
        except (TypeError, ValueError):
            found = ()
        if not found:
            raise self.settings_error("a mapping from layer to edit", repr(self.edits)[:80])
        self._set("edits", tuple((layer, check_edit(edit)) for layer, edit in found))

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
        """The name of the first layer's edit."""
        return f"{self.edits[0][1].name} by layer"

    def change(self, x: torch.Tensor, context: EditContext) -> torch.Tensor:
        """Return what the edit of this layer returns."""
        return self.find_edit(context.layer).change(x, context)

    def find_edit(self, layer: int | None) -> Edit:
        """Return the edit of a layer.

        Raises
        ------
        AnalysisError
            The layer has no edit.
        """
        found: dict[int, Edit] = dict(self.edits)
        if layer in found:
            return found[layer]
        raise AnalysisError(
            f"there is no edit for layer {layer}", expected=f"one of {[number for number, _ in self.edits]}"
        )

    def with_random_directions(self, seed: int, features: int) -> Edit | None:
        """Return the edits with random directions."""
        drawn = [(layer, edit.with_random_directions(seed, features)) for layer, edit in self.edits]
        kept = [(layer, edit) for layer, edit in drawn if edit is not None]
        return ByLayer(tuple(kept)) if kept else None
