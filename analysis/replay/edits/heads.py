"""An edit of single heads: the features of other heads stay as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from analysis.replay.edits.edit import Edit, apply_edit, check_edit
from analysis.replay.edits.edit_context import EditContext
from flexcache.errors import AnalysisError
from flexcache.spec import is_whole


@dataclass(frozen=True, eq=False, repr=False)
class OnHeads(Edit):
    """Make an edit in some heads only, at a site whose features are heads: ``q``, ``k``, ``v`` or ``z``.

    A grid with ``heads="each"`` makes one for each head.

    >>> from analysis.replay import Zero
    >>> OnHeads(Zero(), heads=3, of=12).name
    'Zero head 3'

    Parameters
    ----------
    edit
        The edit; it reads the features of all heads.
    heads
        A head, or several that are edited together.
    of
        Number of heads at the site.
    """

    edit: Edit
    heads: Any
    of: int

    def __post_init__(self) -> None:
        check_edit(self.edit)
        if is_whole(self.heads):
            self._set("heads", (self.heads,))
        self._check_indices("heads")
        if not is_whole(self.of) or not self.heads or not all(0 <= head < self.of for head in self.heads):
            raise self.settings_error("heads from 0 to of − 1", f"heads={self.heads!r}, of={self.of!r}")

    def change(self, x: torch.Tensor, context: EditContext) -> torch.Tensor:
        """Return what the edit returns in the chosen heads, and *x* in the others."""
        return torch.where(head_mask(x, self.heads, self.of), self.edit.change(x, context), x)

    def edit_tokens(
        self, activation: torch.Tensor, index: tuple[torch.Tensor, torch.Tensor], context: EditContext
    ) -> torch.Tensor:
        """Return the activation with the tokens at *index* changed in the chosen heads."""
        edited = apply_edit(self.edit, activation, index, context)
        return torch.where(head_mask(activation, self.heads, self.of), edited, activation)

    def with_random_directions(self, seed: int, features: int) -> Edit | None:
        """Return the edit with random directions, in the same heads."""
        drawn = self.edit.with_random_directions(seed, features)
        return None if drawn is None else OnHeads(drawn, self.heads, self.of)

    @property
    def strengths(self) -> tuple[float, ...]:
        """The strengths of the edit."""
        return self.edit.strengths

    def at_strength(self, strength: float) -> Edit:
        """Return the edit at one strength, in the same heads."""
        return OnHeads(self.edit.at_strength(strength), self.heads, self.of)

    @property
    def name(self) -> str:
        """The name of the edit, and the heads."""
        return f"{self.edit.name} head{'s' * (len(self.heads) > 1)} {', '.join(map(str, self.heads))}"


def head_mask(x: torch.Tensor, heads: tuple[int, ...], of: int) -> torch.Tensor:
    """Return which features belong to some of *of* heads: bool, shape (features,).

    >>> head_mask(torch.zeros(2, 6), heads=(0, 2), of=3).tolist()
    [True, True, False, False, True, True]

    Raises
    ------
    AnalysisError
        The features are not those of as many heads.
    """
    if x.shape[-1] % of:
        raise AnalysisError(
            "the heads cannot be told apart", expected=f"a multiple of {of} heads", found=f"{x.shape[-1]} features"
        )
    head = torch.arange(x.shape[-1], device=x.device) // (x.shape[-1] // of)
    return torch.isin(head, torch.tensor(heads, device=x.device))
