"""Tensors sent between single ranks of a process group: any dtype, any sizes, no rank idle that is not concerned."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

Message = tuple[int, torch.Tensor]
"""A group rank, and the tensor that goes to it or comes from it."""


def transfer(group: Any, sends: Sequence[Message], receives: Sequence[Message]) -> None:
    """Send and receive, and wait until all is done.

    Both sides name the messages between two ranks in the same order. Tensors to receive into are contiguous.
    Bytes are sent, so that any dtype goes over any backend (gloo, for one, refuses float8).
    """
    kept = [(rank, _bytes(tensor)) for rank, tensor in sends if tensor.numel()]
    operations = [dist.P2POp(dist.isend, data, group=group, group_peer=rank) for rank, data in kept]
    operations += [
        dist.P2POp(dist.irecv, _bytes(tensor), group=group, group_peer=rank)
        for rank, tensor in receives
        if tensor.numel()
    ]
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()


def swap(group: Any, ranks: Sequence[int], here: int, values: Sequence[int]) -> list[list[int]]:
    """Return the *values* of each of *ranks*, all of which call this with as many."""
    own = torch.tensor(values, dtype=torch.int64)
    found = {rank: torch.empty_like(own) for rank in ranks if rank != here}
    transfer(group, [(rank, own) for rank in found], list(found.items()))
    return [(own if rank == here else found[rank]).tolist() for rank in ranks]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def tell(group: Any, ranks: Sequence[int], here: int, value: int = 0) -> int:
    """Return on each of *ranks* the value that the first of them gives."""
    number = torch.tensor([value], dtype=torch.int64)
    if here == ranks[0]:
        transfer(group, [(rank, number) for rank in ranks[1:]], [])
    else:
        transfer(group, [], [(ranks[0], number)])
    return int(number)


def collect(group: Any, ranks: Sequence[int], here: int, value: Any) -> list[Any]:
    """Return on the first of *ranks* what each gives, plain values that JSON can hold; on the others nothing."""
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    if here != ranks[0]:
        transfer(group, [(ranks[0], torch.tensor([len(content)]))], [])
        transfer(group, [(ranks[0], content)], [])
        return []
    sizes = {rank: torch.zeros(1, dtype=torch.int64) for rank in ranks[1:]}
    transfer(group, [], list(sizes.items()))
    received = {rank: torch.empty(int(size), dtype=torch.uint8) for rank, size in sizes.items()}
    transfer(group, [], list(received.items()))
    return [value, *(json.loads(bytes(received[rank].numpy())) for rank in ranks[1:])]
