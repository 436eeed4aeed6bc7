"""Read and write headers of safetensors files, so that tensors can be streamed after them or memory-mapped.

The format is eight bytes with the length of the header, the header as JSON, and the tensors in C order
(https://huggingface.co/docs/safetensors). The package of that name also reads such files, but needs the whole tensor in
memory to write one.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from flexcache.errors import DamagedError

DTYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype("<i2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}
LARGEST_HEADER = 100 << 20


@dataclass(frozen=True)
class TensorEntry:
    """Location of a tensor in a file: dtype, shape, and offset in bytes."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def open(self, path: Path) -> np.ndarray:
        """Return the tensor as a read-only memory map."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        bits = np.memmap(path, np.dtype(f"<u{self.dtype.itemsize}"), "r", self.offset, self.shape)
        return bits.view(self.dtype)


def header(name: str, dtype: np.dtype, shape: tuple[int, ...], metadata: dict[str, str]) -> bytes:
    """Return the header of a file with one tensor.

    >>> len(header("x", np.dtype("<f4"), (2, 3), {})) % 8
    0
    """
    code = next(code for code, known in DTYPES.items() if known == dtype)
    size = math.prod(shape) * dtype.itemsize
    content: dict[str, Any] = {
        "__metadata__": metadata,
        name: {"dtype": code, "shape": list(shape), "data_offsets": [0, size]},
    }
    text = json.dumps(content, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Return the tensors of a file by name, as far as their dtype is in `DTYPES`, and the metadata of the file.

    Raises
    ------
    DamagedError
        The file is not a safetensors file, or is incomplete.
    """
    try:
        size = path.stat().st_size
        if size < 8:
            raise ValueError(f"the file has {size} bytes")
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(LARGEST_HEADER, size):
                raise ValueError(f"the header would be {length} bytes")
            content = json.loads(file.read(length))
        metadata = dict(content.pop("__metadata__", None) or {})
        entries = {}
        for name, item in content.items():
            start, stop = map(int, item["data_offsets"])
            if not 0 <= start <= stop <= size - 8 - length:
                raise ValueError(f"tensor {name} lies outside of the file")
            if item["dtype"] not in DTYPES:
                continue
            dtype, shape = DTYPES[item["dtype"]], tuple(map(int, item["shape"]))
            if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != stop - start:
                raise ValueError(f"tensor {name} has {stop - start} bytes, which is not its shape {shape}")
            entries[str(name)] = TensorEntry(dtype, shape, 8 + length + start)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as error:
        raise DamagedError(
            "a file cannot be read as safetensors",
            where=str(path),
            found=f"{type(error).__name__}: {error}",
            remedy="fetch or write the file again",
        ) from error
    return entries, metadata
