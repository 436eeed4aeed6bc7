"""Activations that are read while completions are generated, in one file next to each file of completions.

A file holds the rows of one array and layer after those of another, in each by document, then by token. A document has
room for its longest completion; what a shorter one leaves free is never read, and mostly takes no space on the disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import nn

from flexcache import hooks
from flexcache.array_spec import DTYPES
from flexcache.errors import CaptureError, DamagedError
from flexcache.hooks.read.activation_hooks import ActivationHooks
from flexcache.store.read.selection import ArrayKey
from flexcache.store.write.row_encoding import host

OPEN_FILES = 8


class ActivationLayout:
    """The place of each token's activations in the file of a part.

    Parameters
    ----------
    arrays
        As `describe_arrays` returns them.
    room : sequence of int, shape (documents,)
        Most tokens of each document, prompt and completion.
    """

    def __init__(self, arrays: dict[str, Any], room: Sequence[int]) -> None:
        self._starts = np.append(0, np.cumsum(np.asarray(room, np.int64)))
        self._rows: dict[ArrayKey, tuple[int, int, np.dtype, int]] = {}
        self.size = 0
        for array, kind in arrays.items():
            dtype = DTYPES.get(kind["dtype"]) or np.dtype(kind["dtype"])
            width = kind["features"] * dtype.itemsize
            for layer in kind["layers"] or [None]:
                self._rows[array, layer] = self.size, width, dtype, kind["features"]
                self.size += int(self._starts[-1]) * width

    def offset(self, key: ArrayKey, document: int, token: int = 0) -> int:
        """Return the byte at which the row of a token begins; *document* is its number in the part."""
        start, width, *_ = self._rows[key]
        return start + (int(self._starts[document]) + token) * width

    def room(self, document: int) -> int:
        """Return the most tokens of a document."""
        return int(self._starts[document + 1] - self._starts[document])

    def view(self, content: np.ndarray, key: ArrayKey, document: int) -> np.ndarray:
        """Return the activations of a document in the bytes of a file: shape (room, features)."""
        _, width, dtype, features = self._rows[key]
        start = self.offset(key, document)
        return content[start : start + self.room(document) * width].view(dtype).reshape(-1, features)

    def read_document(self, path: Path, document: int, tokens: int) -> dict[ArrayKey, torch.Tensor]:
        """Return the first activations of a document of a file, in float32, by array and layer."""
        content = np.fromfile(path, np.uint8)
        return {
            key: torch.from_numpy(self.view(content, key, document)[:tokens].astype(np.float32)) for key in self._rows
        }


def describe_arrays(
    points: Sequence[hooks.HookPoint], measured: dict[hooks.HookPoint, hooks.Activation]
) -> dict[str, Any]:
    """Return layers, features and dtype of each array, of the activations as they are computed, as plain values."""
    found: dict[str, Any] = {}
    for point in points:
        shape, dtype = measured[point]
        kind = {"layers": [], "features": int(np.prod(shape)), "dtype": str(dtype).removeprefix("torch.")}
        layers = found.setdefault(point.array, kind)["layers"]
        if point.layer is not None:
            layers.append(point.layer)
    return found


class ActivationReader:
    """Reads the activations of every step of a generation into the file of a part. Use it as a context manager.

    Parameters
    ----------
    arrays
        As `describe_arrays` returns them.
    """

    def __init__(self, model: nn.Module, points: Sequence[hooks.HookPoint], arrays: dict[str, Any]) -> None:
        from transformers import GenerationMixin

        self._arrays = arrays
        self._hooks = ActivationHooks(model, points, self._keep, stop=False)
        self._generating = next((one for one in model.modules() if isinstance(one, GenerationMixin)), model)
        self._file: BinaryIO | None = None
        self._first = self._next = 0
        self._last = False

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._hooks.__exit__(*raised)

    @contextmanager
    def open_file(self, path: Path, room: Sequence[int]) -> Iterator[None]:
        """Write the activations of the context to a new file, flushed at the end; *room* as for `ActivationLayout`."""
        self._layout = ActivationLayout(self._arrays, room)
        with path.open("wb") as file:
            self._file = file
            try:
                yield
                file.truncate(self._layout.size)
                file.flush()
                os.fsync(file.fileno())
            finally:
                self._file = None

    @contextmanager
    def follow_batch(self, documents: Sequence[int], pads: Sequence[int]) -> Iterator[None]:
        """Read the steps of one batch, whose lines are *documents* of the part after some *pads* of padding each."""
        self._documents, self._pads, self._next, self._last = documents, pads, 0, False
        with self._hooks.follow(self._generating, self._begin):
            yield

    def begin_last_step(self, place: int) -> None:
        """Say that the next step reads only the token at *place*, padding included.

        CaptureError if the steps so far have not read each earlier token once, as with a guided generation.
        """
        if self._next != place:
            raise _other_steps(f"{place} tokens", f"{self._next} tokens in all steps")
        self._last = True

    def _begin(self, sequences: int, tokens: int) -> None:
        if sequences != len(self._documents):
            raise _other_steps(f"{len(self._documents)} sequences", f"{sequences} sequences in a step")
        if self._last and tokens != 1:
            raise CaptureError(
                "the model does not continue from its cache",
                where="generate.capture",
                expected="a step of 1 token",
                found=f"{tokens} tokens",
                remedy="set generate.capture to false: prompts and completions are then run again",
            )
        self._first, self._next = self._next, self._next + tokens

    def _keep(self, point: hooks.HookPoint, tensor: torch.Tensor) -> None:
        values, count = host(tensor).reshape(*tensor.shape[:2], -1), tensor.shape[1]
        for line, (document, pad) in enumerate(zip(self._documents, self._pads, strict=True)):
            start = max(0, pad - self._first)
            stop = min(count, self._layout.room(document) + pad - self._first)
            if start < stop:
                self._write(point, document, self._first + start - pad, values[line, start:stop])

    def _write(self, point: hooks.HookPoint, document: int, token: int, values: np.ndarray) -> None:
        assert self._file is not None
        self._file.seek(self._layout.offset((point.array, point.layer), document, token))
        self._file.write(np.ascontiguousarray(values).view(np.uint8).data)


class DecodedActivations:
    """The activations of all completions of a folder, until they are in the store.

    Parameters
    ----------
    arrays
        As `describe_arrays` returns them.
    part_size
        Documents of a part.
    max_new_tokens
        Most tokens of a completion.
    """

    def __init__(self, folder: Path, arrays: dict[str, Any], part_size: int, max_new_tokens: int) -> None:
        self._folder, self._arrays, self._size, self._new = folder, arrays, part_size, max_new_tokens
        self._open = lru_cache(OPEN_FILES)(self._open_part)

    def read(self, key: ArrayKey, document: int, tokens: int) -> np.ndarray:
        """Return the first activations of a document, given by its place in the corpus: shape (tokens, features)."""
        layout, content = self._open(document // self._size)
        return layout.view(content, key, document % self._size)[:tokens]

    def remove(self) -> None:
        """Remove the files: the store has every row."""
        self._open.cache_clear()
        for path in self._folder.glob("part-*.activations"):
            path.unlink(missing_ok=True)

    def _open_part(self, number: int) -> tuple[ActivationLayout, np.ndarray]:
        path = activations_file(self._folder, number)
        prompts = pq.read_table(self._folder / f"part-{number:06d}.parquet", columns=["prompt_tokens"])
        layout = ActivationLayout(self._arrays, prompts.column(0).to_numpy() + self._new)
        try:
            content = np.memmap(path, np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise _damaged(path, layout, str(error)) from error
        if len(content) != layout.size:
            raise _damaged(path, layout, f"{len(content)} bytes")
        return layout, content


def activations_file(folder: Path, number: int) -> Path:
    """Return the file of the activations of a part."""
    return folder / f"part-{number:06d}.activations"


def _other_steps(expected: str, found: str) -> CaptureError:
    return CaptureError(
        "the steps of the generation do not read each token once",
        where="generate.capture",
        expected=expected,
        found=found,
        remedy="leave beams, guidance and prompt lookup out of model.generation_config; or set generate.capture to"
        " false: prompts and completions are then run again",
    )


def _damaged(path: Path, layout: ActivationLayout, found: str) -> DamagedError:
    return DamagedError(
        "activations of completions cannot be read",
        where=str(path),
        expected=f"{layout.size} bytes",
        found=found,
        remedy="delete the file and run the capture again, which makes it again",
    )
