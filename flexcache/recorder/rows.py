"""Activations into the bytes of stored rows: padding dropped, means taken, dtype cast, range checked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from flexcache.recorder.batch import Batch
from flexcache.store.finite import first_nonfinite

if TYPE_CHECKING:
    import torch


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


def pieces(batch: Batch, values: Any, dtype: np.dtype) -> Iterator[Any]:
    """Yield the rows of padded activations, shape (sequences, longest, …), a piece at a time and without a copy."""
    if is_torch(values) and str(values.dtype) == f"torch.{dtype.name}":
        values = host(values)  # numpy slices cost a third of torch's
    if batch.mean:
        yield batch.kept(host(values) if is_torch(values) else values)
        return
    for line, (start, stop) in enumerate(batch.keep):
        yield values[line, start:stop]


def stored(rows: Any, dtype: np.dtype) -> np.ndarray:
    """Return rows, a numpy array or a torch tensor, as one run of bytes in the storage dtype.

    Raises
    ------
    Unstorable
        A cast gave an infinity or NaN. Where nothing is cast, the writer looks for them instead.
    """
    given = host(rows) if is_torch(rows) else np.asarray(rows)
    if given.dtype == dtype:
        return np.ascontiguousarray(given).reshape(-1).view(np.uint8)
    content = np.ascontiguousarray(_cast(rows, dtype)).reshape(-1).view(np.uint8)
    at = first_nonfinite(content, dtype)
    if at is not None:
        row, feature = divmod(at, max(1, given[0].size))
        raise Unstorable(row, feature, float(given.reshape(-1)[at]))
    return content


def _cast(rows: Any, dtype: np.dtype) -> np.ndarray:
    if is_torch(rows):  # 20 times faster than numpy for float16
        import torch

        return host(rows.detach().to(getattr(torch, dtype.name)))
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(rows).astype(dtype)
