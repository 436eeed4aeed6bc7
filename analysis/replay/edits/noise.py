"""Edits that add random noise, as a damage or as a control of another edit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from analysis.replay.edits.edit import Edit, check_edit
from analysis.replay.edits.edit_context import EditContext
from analysis.replay.edits.features import Numbers
from analysis.replay.edits.heads import OnHeads, head_mask


@dataclass(frozen=True, eq=False, repr=False)
class Noise(Edit):
    """Add noise of *scale* times the norm of each activation, in a direction uniform on the sphere.

    >>> Noise([0.1, 0.5]).at_strength(0.5)
    Noise(scale=0.5)
    """

    scale: Numbers = 1.0
    strength_field: ClassVar[str] = "scale"

    def __post_init__(self) -> None:
        self._check_numbers("scale")

    def change(self, x: torch.Tensor, context: EditContext) -> torch.Tensor:
        """Return *x* with noise."""
        return x + self._one_strength(self.scale) * x.norm(dim=-1, keepdim=True) * context.unit_noise(x)


@dataclass(frozen=True, eq=False, repr=False)
class NormMatched(Edit):
    """Move each activation as far as *edit* moves it, in a random direction uniform on the sphere: a control for it.

    For an edit of some heads, the direction is one in the features of these heads.

    ::

        replay.NormMatched(replay.Zero())
    """

    edit: Edit

    def __post_init__(self) -> None:
        check_edit(self.edit)

    def change(self, x: torch.Tensor, context: EditContext) -> torch.Tensor:
        """Return *x* with noise of the norm of the edit's change."""
        distance = (self.edit.change(x, context) - x).norm(dim=-1, keepdim=True)
        noise = context.unit_noise(x, salt=1)
        if isinstance(self.edit, OnHeads):
            noise = noise * head_mask(x, self.edit.heads, self.edit.of)
            noise = noise / noise.norm(dim=-1, keepdim=True)
        return x + distance * noise
