"""A part of a fused projection: the query heads of a module that gives queries, keys and values at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flexcache.errors import SiteError


@dataclass(frozen=True)
class FusedProjectionSlice:
    """Of a feature dim that is *groups* × *slots* × *size* values, the slots *start* … *stop* of every group.

    GPT-2's queries, keys and values follow each other whole: one group, three times as many slots as heads. GPT-NeoX
    and Bloom have them head by head: as many groups as heads, of three slots each.
    """

    groups: int
    slots: int
    start: int
    stop: int
    size: int

    def take(self, whole: torch.Tensor, where: str) -> torch.Tensor:
        """Return the part of *whole*, shape (…, groups · (stop − start) · size), its slots in their order.

        Raises
        ------
        SiteError
            The last dim is not that of the whole projection: a tensor-parallel rank has a part of it.
        """
        return self._apart(whole, where)[..., self.start : self.stop, :].flatten(-3)

    def put(self, whole: torch.Tensor, part: torch.Tensor, where: str) -> torch.Tensor:
        """Return a copy of *whole* with *part* in its place.

        Raises
        ------
        SiteError
            As for `take`.
        """
        apart = self._apart(whole, where).clone()
        apart[..., self.start : self.stop, :] = part.reshape(*apart.shape[:-2], self.stop - self.start, self.size)
        return apart.reshape(whole.shape)

    def _apart(self, whole: torch.Tensor, where: str) -> torch.Tensor:
        width = self.groups * self.slots * self.size
        if whole.shape[-1] != width:
            raise SiteError(
                "a fused projection does not have the width that its heads make",
                where=where,
                expected=f"{self.groups} × {self.slots} × {self.size} = {width} features",
                found=str(whole.shape[-1]),
                remedy="where tensor-parallel ranks share it, give its module path: the part of a rank cannot be split",
            )
        return whole.unflatten(-1, (self.groups, self.slots, self.size))
