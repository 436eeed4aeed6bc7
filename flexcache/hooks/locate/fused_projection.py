"""A slice of a fused projection: for example the query heads of a module that computes queries, keys and values."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flexcache.errors import SiteError


@dataclass(frozen=True)
class FusedProjectionSlice:
    """The slots *start* … *stop* of each group, in a feature dim of *groups* × *slots* × *size* values.

    In GPT-2 all queries come first, then all keys, then all values: one group, with three times as many slots as heads.
    In GPT-NeoX and Bloom they alternate by head: as many groups as heads, of three slots each.

    >>> keys = FusedProjectionSlice(groups=1, slots=3, start=1, stop=2, size=2)
    >>> keys.read_slice(torch.arange(6.0), where="attn")
    tensor([2., 3.])
    """

    groups: int
    slots: int
    start: int
    stop: int
    size: int

    def read_slice(self, whole: torch.Tensor, where: str) -> torch.Tensor:
        """Return the slice of *whole*, shape (…, groups · (stop − start) · size), with the slots in order.

        Raises
        ------
        SiteError
            The last dim is not that of the whole projection: a tensor-parallel rank holds only a part of it.
        """
        return self._unflatten(whole, where)[..., self.start : self.stop, :].flatten(-3)

    def write_slice(self, whole: torch.Tensor, part: torch.Tensor, where: str) -> torch.Tensor:
        """Return a copy of *whole* with *part* in place of the slice.

        Raises
        ------
        SiteError
            See `read_slice`.
        """
        apart = self._unflatten(whole, where).clone()
        apart[..., self.start : self.stop, :] = part.reshape(*apart.shape[:-2], self.stop - self.start, self.size)
        return apart.reshape(whole.shape)

    def _unflatten(self, whole: torch.Tensor, where: str) -> torch.Tensor:
        width = self.groups * self.slots * self.size
        if whole.shape[-1] != width:
            raise SiteError(
                "the width of a fused projection does not fit its heads",
                where=where,
                expected=f"{self.groups} × {self.slots} × {self.size} = {width} features",
                found=str(whole.shape[-1]),
                remedy="if tensor-parallel ranks share it, give its module path: the part of one rank cannot be split",
            )
        return whole.unflatten(-1, (self.groups, self.slots, self.size))
