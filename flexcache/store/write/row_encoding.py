"""Encode rows as the bytes that are stored: dtype cast, int8 scales, range checked."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from flexcache.store.format.int8 import quantize
from flexcache.store.format.nonfinite import first_nonfinite

if TYPE_CHECKING:
    import torch


FLOAT32 = np.dtype(np.float32)

Piece = tuple[np.ndarray, list[tuple[int, int]]]
"""Bytes, one-dimensional, and which of them are rows: spans of (start, count)."""


class Unstorable(Exception):  # noqa: N818 - it carries the place to the recorder, which raises the RangeError
    """A finite value became infinite in the storage dtype, or a value is not finite: in this row of this piece."""

    def __init__(self, row: int, feature: int, value: float) -> None:
        super().__init__(row, feature, value)
        self.row, self.feature, self.value = row, feature, value


def is_torch(values: Any) -> bool:
    """Return True for a torch tensor, without importing torch."""
    return type(values).__module__.partition(".")[0] == "torch"


def host(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor as a numpy array that shares its memory where it is on the CPU; bfloat16 as ml_dtypes'."""
    import torch
    from ml_dtypes import bfloat16

    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(bfloat16)
    return tensor.numpy()


def encode_rows(rows: Any, dtype: np.dtype) -> list[Piece]:
    """Return rows, a numpy array or torch tensor of shape (rows, …), as bytes in the storage dtype, as `rows_of` does.

    Raises
    ------
    Unstorable
        A cast gave an infinity or NaN. Where nothing is cast, the writer looks for them instead.
    """
    if dtype == np.int8:
        return int8_pieces(piece_of(bytes_of(rows, FLOAT32)), math.prod(rows.shape[1:]))
    return [piece_of(bytes_of(rows, dtype))]


def piece_of(content: np.ndarray) -> Piece:
    """Return bytes that are all rows as one piece."""
    return content, [(0, len(content))]


def bytes_of(rows: Any, dtype: np.dtype) -> np.ndarray:
    """Return rows as one run of bytes in the storage dtype; raise Unstorable where the cast gives infinity or NaN."""
    given = host(rows) if is_torch(rows) else np.asarray(rows)
    if given.dtype == dtype:
        return np.ascontiguousarray(given).reshape(-1).view(np.uint8)
    content = np.ascontiguousarray(_cast(rows, dtype)).reshape(-1).view(np.uint8)
    at = first_nonfinite(content, dtype)
    if at is not None:
        row, feature = divmod(at, max(1, given[0].size))
        raise Unstorable(row, feature, float(given.reshape(-1)[at]))
    return content


def int8_pieces(piece: Piece, features: int) -> list[Piece]:
    """Return float32 rows as int8, and their scales."""
    content, spans = piece
    whole = np.concatenate([content[start : start + count] for start, count in spans])
    rows = whole.view(np.float32).reshape(-1, features)
    at = first_nonfinite(whole, FLOAT32)
    if at is not None:
        raise Unstorable(*divmod(at, features), float(rows.reshape(-1)[at]))
    return [piece_of(part.reshape(-1).view(np.uint8)) for part in quantize(rows)]


def _cast(rows: Any, dtype: np.dtype) -> np.ndarray:
    if is_torch(rows):  # 20 times faster than numpy for float16
        import torch

        return host(rows.detach().to(getattr(torch, dtype.name)))
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(rows).astype(dtype)
