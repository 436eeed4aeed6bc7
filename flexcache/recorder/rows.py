"""Activations into the bytes of stored rows: padding dropped, means taken, dtype cast, range checked."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from flexcache.recorder.batch import Batch
from flexcache.store.finite import first_nonfinite
from flexcache.store.int8 import quantize

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
    """Whether *values* is a torch tensor, without importing torch."""
    return type(values).__module__.partition(".")[0] == "torch"


def host(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor as a numpy array that shares its memory where it is on the CPU; bfloat16 as ml_dtypes'."""
    import torch
    from ml_dtypes import bfloat16

    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(bfloat16)
    return tensor.numpy()


def rows_of(batch: Batch, values: Any, dtype: np.dtype) -> list[Piece]:
    """Return the rows of padded activations, shape (sequences, longest, …), as bytes in the storage dtype.

    Nothing is copied where nothing is cast or averaged, since this runs inside hooks: the bytes are then those of
    the activations, padding included, and the spans say which of them are rows. Of int8, a second piece has the scales.

    Raises
    ------
    Unstorable
        See `stored`.
    """
    if dtype == np.int8:
        return _scaled(_rows_of(batch, values, FLOAT32), math.prod(values.shape[2:]))
    return [_rows_of(batch, values, dtype)]


def stored(rows: Any, dtype: np.dtype) -> list[Piece]:
    """Return rows, a numpy array or torch tensor of shape (rows, …), as bytes in the storage dtype, as `rows_of` does.

    Raises
    ------
    Unstorable
        A cast gave an infinity or NaN. Where nothing is cast, the writer looks for them instead.
    """
    if dtype == np.int8:
        return _scaled(_whole(_bytes(rows, FLOAT32)), math.prod(rows.shape[1:]))
    return [_whole(_bytes(rows, dtype))]


def _rows_of(batch: Batch, values: Any, dtype: np.dtype) -> Piece:
    same = str(values.dtype).removeprefix("torch.") == dtype.name
    if batch.mean:
        return _whole(_bytes(batch.kept(host(values) if is_torch(values) else values), dtype))
    if same and batch.picked is None:
        content = _bytes(values, dtype)
        width = len(content) // (batch.shape[0] * batch.shape[1])
        return content, [(start * width, count * width) for start, count in batch.spans]
    if is_torch(values):
        import torch

        return _whole(_bytes(torch.cat([values[line][places] for line, places in enumerate(batch.places)]), dtype))
    return _whole(_bytes(batch.kept(values), dtype))


def _whole(content: np.ndarray) -> Piece:
    return content, [(0, len(content))]


def _bytes(rows: Any, dtype: np.dtype) -> np.ndarray:
    """Return rows as one run of bytes."""
    given = host(rows) if is_torch(rows) else np.asarray(rows)
    if given.dtype == dtype:
        return np.ascontiguousarray(given).reshape(-1).view(np.uint8)
    content = np.ascontiguousarray(_cast(rows, dtype)).reshape(-1).view(np.uint8)
    at = first_nonfinite(content, dtype)
    if at is not None:
        row, feature = divmod(at, max(1, given[0].size))
        raise Unstorable(row, feature, float(given.reshape(-1)[at]))
    return content


def _scaled(piece: Piece, features: int) -> list[Piece]:
    """Return float32 rows as int8, and their scales."""
    content, spans = piece
    whole = np.concatenate([content[start : start + count] for start, count in spans])
    rows = whole.view(np.float32).reshape(-1, features)
    at = first_nonfinite(whole, FLOAT32)
    if at is not None:
        raise Unstorable(*divmod(at, features), float(rows.reshape(-1)[at]))
    return [_whole(part.reshape(-1).view(np.uint8)) for part in quantize(rows)]


def _cast(rows: Any, dtype: np.dtype) -> np.ndarray:
    if is_torch(rows):  # 20 times faster than numpy for float16
        import torch

        return host(rows.detach().to(getattr(torch, dtype.name)))
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(rows).astype(dtype)
