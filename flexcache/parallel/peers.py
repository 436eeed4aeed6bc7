"""Tensors sent between single ranks of a process group: any dtype and size, with no part for other ranks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

Message = tuple[int, torch.Tensor]
"""A group rank, and the tensor to send to it or receive from it."""


def exchange_tensors(group: Any, sends: Sequence[Message], receives: Sequence[Message]) -> None:
    """Send and receive tensors, and wait for all of them.

    Both ranks list the messages between them in the same order. Tensors to receive into are contiguous. Tensors are
    sent as bytes, so that any dtype works on any backend (gloo, for one, rejects float8).
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


def exchange_values(group: Any, ranks: Sequence[int], here: int, values: Sequence[int]) -> list[list[int]]:
    """Return the *values* of each of *ranks*, all of which call this with equally many."""
    own = torch.tensor(values, dtype=torch.int64)
    found = {rank: torch.empty_like(own) for rank in ranks if rank != here}
    exchange_tensors(group, [(rank, own) for rank in found], list(found.items()))
    return [(own if rank == here else found[rank]).tolist() for rank in ranks]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def broadcast_value(group: Any, ranks: Sequence[int], here: int, value: int = 0) -> int:
    """Return the value of the first of *ranks*, on each of them."""
    number = torch.tensor([value], dtype=torch.int64)
    if here == ranks[0]:
        exchange_tensors(group, [(rank, number) for rank in ranks[1:]], [])
    else:
        exchange_tensors(group, [], [(ranks[0], number)])
    return int(number)


def gather_values(group: Any, ranks: Sequence[int], here: int, value: Any) -> list[Any]:
    """Return the values of all *ranks* on the first of them, and an empty list on the others.

    A value is one that JSON can hold.
    """
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    if here != ranks[0]:
        exchange_tensors(group, [(ranks[0], torch.tensor([len(content)]))], [])
        exchange_tensors(group, [(ranks[0], content)], [])
        return []
    sizes = {rank: torch.zeros(1, dtype=torch.int64) for rank in ranks[1:]}
    exchange_tensors(group, [], list(sizes.items()))
    received = {rank: torch.empty(int(size), dtype=torch.uint8) for rank, size in sizes.items()}
    exchange_tensors(group, [], list(received.items()))
    return [value, *(json.loads(bytes(received[rank].numpy())) for rank in ranks[1:])]
