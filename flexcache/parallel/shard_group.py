"""Edits of sharded activations: every rank of a plane gets the whole, edits it alike, and keeps its own part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flexcache.parallel.assembly import Assembly, Part
from flexcache.parallel.peers import transfer

Edit = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class ShardGroup:
    """The ranks that together hold one activation, and where the piece of each lies in it.

    Attributes
    ----------
    own
        This rank's part.
    scale
        Over how many copies gradients are averaged: data-parallel ranks, and microbatches of a pipeline.
    """

    group: Any
    rank: int
    ranks: tuple[int, ...]
    assembly: Assembly
    scale: int

    @property
    def own(self) -> Part:
        """The part that this rank holds."""
        return next(part for part in self.assembly.addends if any(rank == self.rank for rank, _ in part.holders))

    @property
    def weight(self) -> int:
        """By what the gradient of the averaged loss is multiplied to be that of this rank's own loss.

        Copies that share an activation each get the gradient of the average, which is averaged once more with theirs.
        """
        return self.scale if self.assembly.addends == self.assembly.parts else 1

    def edit(self, piece: torch.Tensor, edit: Edit) -> torch.Tensor:
        """Return this rank's piece of the edited whole; *edit* runs on every rank of the plane.

        Gradients are exact: the gradient of the whole is put together from the pieces' before it goes through
        *edit*, so that every rank computes the same, that of a single process. It is the gradient of the loss averaged
        over data-parallel ranks, as DDP and FSDP average the weights'.
        """
        whole = _Gather.apply(piece, self)
        return _Scatter.apply(edit(whole), self)

    def gather(self, piece: torch.Tensor, gradient: bool = False) -> torch.Tensor:
        """Return the whole of which every rank holds a piece, outside of any graph."""
        sends, receives, places = [], [], []
        piece = piece.detach().contiguous()
        for part in self.assembly.addends if gradient else self.assembly.parts:
            if part.holder(self.rank)[0] == self.rank:
                places.append((part, piece))
            for receiver in self.ranks:
                giver = part.holder(receiver)[0]
                if giver == self.rank and receiver != self.rank:
                    sends.append((receiver, piece))
                elif receiver == self.rank and giver != self.rank:
                    buffer = torch.empty(part.shape, dtype=piece.dtype, device=piece.device)
                    receives.append((giver, buffer))
                    places.append((part, buffer))
        transfer(self.group, sends, receives)
        return join(self.assembly.shape, places, added=gradient and self.assembly.addends != self.assembly.parts)


def join(shape: tuple[int, ...], places: Sequence[tuple[Part, torch.Tensor]], added: bool) -> torch.Tensor:
    """Return the whole that parts tile, or that they add up to."""
    first = places[0][1]
    if not added and len(places) == 1:
        return first.clone()
    whole = (torch.zeros if added else torch.empty)(shape, dtype=first.dtype, device=first.device)
    for part, piece in places:
        here = cut(whole, part)
        here.add_(piece) if added else here.copy_(piece)
    return whole


def cut(whole: torch.Tensor, part: Part) -> torch.Tensor:
    """Return the view of a whole that a part fills."""
    for dim, (start, length) in enumerate(zip(part.start, part.shape, strict=True)):
        whole = whole.narrow(dim, start, length)
    return whole


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, piece: torch.Tensor, plane: ShardGroup) -> torch.Tensor:
        ctx.plane = plane
        return plane.gather(piece)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return cut(grad, ctx.plane.own) * ctx.plane.weight, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor, plane: ShardGroup) -> torch.Tensor:
        ctx.plane = plane
        return cut(whole, plane.own).clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return ctx.plane.gather(grad, gradient=True) / ctx.plane.scale, None
