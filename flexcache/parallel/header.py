"""The header of a piece of an activation, which its rank sends to the others."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from flexcache.errors import LayoutError
from flexcache.parallel.layout import Layout


class ActivationKey(NamedTuple):
    """An activation: the number of its hook, and how many times its module had run before in the forward."""

    hook: int
    call: int


@dataclass(frozen=True)
class Header:
    """The description of a piece that a rank holds.

    Attributes
    ----------
    chunk
        Number of the microbatch.
    sums
        Two checksums of the values, if copies are to be compared.
    """

    key: ActivationKey
    chunk: int
    shape: tuple[int, ...]
    dtype: str
    layout: Layout
    sums: tuple[float, float] | None = None


MAX_DIMS = 8


def pack_header(
    key: ActivationKey, chunk: int, piece: torch.Tensor, layout: Layout, sums: tuple[float, float] | None
) -> list[int]:
    """Return the header of a piece as a list of integers of fixed length.

    Raises
    ------
    LayoutError
        The piece has more than 8 dims.
    """
    if piece.ndim > MAX_DIMS:
        raise LayoutError(
            "an activation has too many dims to edit", expected=f"{MAX_DIMS} at most", found=str(piece.ndim)
        )
    padding = [0] * (MAX_DIMS - piece.ndim)
    bits = struct.unpack("2q", struct.pack("2d", *sums)) if sums else (0, 0)
    return [
        *(key.hook, key.call, chunk, piece.ndim),
        *(*piece.shape, *padding, *layout.shape, *padding),
        -1 if layout.sharded is None else layout.sharded,
        -1 if layout.rows is None else layout.rows,
        _DTYPES.index(piece.dtype) if piece.dtype in _DTYPES else -1,
        *(int(sums is not None), *bits),
    ]


def unpack_header(values: Sequence[int]) -> Header:
    """Return the header that `pack_header` packed."""
    hook, call, _, ndim, *rest = values
    shape, whole = tuple(rest[:ndim]), tuple(rest[MAX_DIMS : MAX_DIMS + ndim])
    sharded, rows, dtype, summed, first, second = rest[2 * MAX_DIMS :]
    layout = Layout(whole, None if sharded < 0 else sharded, None if rows < 0 else rows)
    sums = struct.unpack("2d", struct.pack("2q", first, second)) if summed else None
    return Header(ActivationKey(hook, call), 0, shape, str(_DTYPES[dtype]), layout, sums)


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.complex64)
