"""Encode rows as stored bytes: cast the dtype, quantize to int8, check the range."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from flexcache.store.format.int8 import quantize

if TYPE_CHECKING:
    import torch


FLOAT32 = np.dtype(np.float32)
# All exponent bits set, no fraction: the first pattern that is not finite.
_INFINITY = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}
EncodedRows = tuple[np.ndarray, list[tuple[int, int]]]
"""One-dimensional bytes, and spans of (start, count) that are rows."""


class Unstorable(Exception):  # noqa: N818 - it carries the place to the recorder, which raises the RangeError
    """A value at this row and feature is not finite, or becomes infinite in the storage dtype."""

    def __init__(self, row: int, feature: int, value: float) -> None:
        super().__init__(row, feature, value)
        self.row, self.feature, self.value = row, feature, value


def is_torch(values: Any) -> bool:
    """Return True for a torch tensor, without importing torch."""
    return type(values).__module__.partition(".")[0] == "torch"


def host(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor as a numpy array, without a copy if it is on the CPU; bfloat16 as that of ml_dtypes."""
    import torch
    from ml_dtypes import bfloat16

    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(bfloat16)
    return tensor.numpy()


def encode_rows(rows: Any, dtype: np.dtype, outliers: int = 0) -> list[EncodedRows]:
    """Return rows, a numpy array or torch tensor of shape (rows, …), as bytes in the storage dtype.

    For int8, the bytes of scales and outliers follow as a second item. Unstorable is raised if a cast gave infinity or
    NaN; without a cast, the writer checks instead.
    """
    if dtype == np.int8:
        return encode_int8(single_piece(encode_bytes(rows, FLOAT32)), math.prod(rows.shape[1:]), outliers)
    return [single_piece(encode_bytes(rows, dtype))]


def single_piece(content: np.ndarray) -> EncodedRows:
    """Return bytes of which all are rows as encoded rows."""
    return content, [(0, len(content))]


def encode_bytes(rows: Any, dtype: np.dtype) -> np.ndarray:
    """Return rows as bytes in the storage dtype; raise Unstorable if the cast gives infinity or NaN."""
    given = host(rows) if is_torch(rows) else np.asarray(rows)
    if given.dtype == dtype:
        return np.ascontiguousarray(given).reshape(-1).view(np.uint8)
    content = np.ascontiguousarray(_cast(rows, dtype)).reshape(-1).view(np.uint8)
    at = first_nonfinite(content, dtype)
    if at is not None:
        row, feature = divmod(at, max(1, given[0].size))
        raise Unstorable(row, feature, float(given.reshape(-1)[at]))
    return content


def encode_int8(piece: EncodedRows, features: int, outliers: int) -> list[EncodedRows]:
    """Return float32 rows as int8 rows followed by their scales."""
    content, spans = piece
    whole = np.concatenate([content[start : start + count] for start, count in spans])
    rows = whole.view(np.float32).reshape(-1, features)
    at = first_nonfinite(whole, FLOAT32)
    if at is not None:
        raise Unstorable(*divmod(at, features), float(rows.reshape(-1)[at]))
    return [single_piece(part.reshape(-1).view(np.uint8)) for part in quantize(rows, outliers)]


def _cast(rows: Any, dtype: np.dtype) -> np.ndarray:
    if is_torch(rows):  # 20 times faster than numpy for float16
        import torch

        return host(rows.detach().to(getattr(torch, dtype.name)))
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(rows).astype(dtype)


def first_nonfinite(content: np.ndarray, dtype: np.dtype) -> int | None:
    """Return the index of the first NaN or infinity in *content*, uint8 of shape (bytes,), or None.

    Read as an integer, a float whose exponent bits are all set is larger than every finite one of its sign, so
    the maxima of the bytes as signed and as unsigned integers show if there is one.
    """
    if not len(content) or dtype.kind == "i":
        return None
    width = dtype.itemsize
    infinity, sign = _INFINITY[dtype.name], 1 << (8 * width - 1)
    signed, unsigned = content.view(f"<i{width}"), content.view(f"<u{width}")
    if int(signed.max()) < infinity and int(unsigned.max()) < infinity + sign:
        return None
    return int(np.flatnonzero((unsigned & np.array(sign - 1, unsigned.dtype)) >= infinity)[0])
