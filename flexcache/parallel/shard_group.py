"""Edits of sharded activations: each rank of a group edits the whole in the same way, and keeps its part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flexcache.parallel.assembly import Assembly, PlacedPart
from flexcache.parallel.peers import exchange_tensors

EditFunction = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class ShardGroup:
    """The ranks that together hold one activation, and the place of each one's piece.

    Attributes
    ----------
    scale
        Number of copies over which gradients are averaged: data-parallel ranks, and microbatches of a pipeline.
    """

    group: Any
    rank: int
    ranks: tuple[int, ...]
    assembly: Assembly
    scale: int

    @property
    def own(self) -> PlacedPart:
        """The part that this rank holds."""
        return next(part for part in self.assembly.addends if any(rank == self.rank for rank, _ in part.holders))

    @property
    def gradient_weight(self) -> int:
        """The factor from the gradient of the averaged loss to that of this rank's own loss.

        Copies that share an activation each receive the gradient of the average, which is averaged once more over them.
        """
        return self.scale if self.assembly.addends == self.assembly.parts else 1

    def edit_piece(self, piece: torch.Tensor, edit: EditFunction) -> torch.Tensor:
        """Return this rank's piece of the edited whole; *edit* runs on every rank of the group.

        Gradients are exact: the gradient of the whole is assembled before it passes through *edit*, so that every rank
        computes the one that a single process would. It is the gradient of the loss averaged over data-parallel ranks,
        as DDP and FSDP average those of the weights.
        """
        whole = _Gather.apply(piece, self)
        return _Scatter.apply(edit(whole), self)

    def gather_pieces(self, piece: torch.Tensor, gradient: bool = False) -> torch.Tensor:
        """Return the whole of which every rank holds a piece, outside any graph."""
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
        exchange_tensors(self.group, sends, receives)
        return join_parts(self.assembly.shape, places, added=gradient and self.assembly.addends != self.assembly.parts)


def join_parts(shape: tuple[int, ...], places: Sequence[tuple[PlacedPart, torch.Tensor]], added: bool) -> torch.Tensor:
    """Return the whole that parts tile, or the sum of parts if *added*."""
    first = places[0][1]
    if not added and len(places) == 1:
        return first.clone()
    whole = (torch.zeros if added else torch.empty)(shape, dtype=first.dtype, device=first.device)
    for part, piece in places:
        here = select_part(whole, part)
        here.add_(piece) if added else here.copy_(piece)
    return whole


def select_part(whole: torch.Tensor, part: PlacedPart) -> torch.Tensor:
    """Return the view of a whole that a part fills."""
    for dim, (start, length) in enumerate(zip(part.start, part.shape, strict=True)):
        whole = whole.narrow(dim, start, length)
    return whole


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, piece: torch.Tensor, group: ShardGroup) -> torch.Tensor:
        ctx.group = group
        return group.gather_pieces(piece)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return select_part(grad, ctx.group.own) * ctx.group.gradient_weight, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor, group: ShardGroup) -> torch.Tensor:
        ctx.group = group
        return select_part(whole, group.own).clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return ctx.group.gather_pieces(grad, gradient=True) / ctx.group.scale, None
