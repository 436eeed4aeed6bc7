"""Find tensors of activations in files of other tools, and read them in place."""

from __future__ import annotations

import gzip
import io
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from flexcache.errors import DamagedError, StoreError
from flexcache.exchange.safetensors import read_header

ENDINGS = {"safetensors": (".safetensors",), "pt": (".pt", ".pth", ".bin"), "saelens": (".arrow",)}


@dataclass(frozen=True)
class FileTensor:
    """A tensor in a file.

    Attributes
    ----------
    file : str
        Path relative to the folder.
    name : str
        Name of the tensor in its file; empty if the file is one tensor.
    shape : tuple of int
    open : callable
        Function that returns the tensor as a numpy array, memory-mapped if the format allows it.
    """

    file: str
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    open: Callable[[], np.ndarray]

    def __str__(self) -> str:
        return f"{self.name} in {self.file}" if self.name else self.file


def find_tensors(folder: Path, kind: str) -> list[FileTensor]:
    """Return all tensors in a folder and its subfolders, files in natural order (``part2`` before ``part10``).

    Parameters
    ----------
    kind
        ``safetensors``, ``pt`` or ``saelens``.

    Raises
    ------
    StoreError
        The folder does not exist, or has no file of that kind.
    DamagedError
        A file cannot be read.
    """
    files = find_files(folder, kind, ENDINGS[kind])
    return [tensor for path in files for tensor in list_tensors(path, path.relative_to(folder).as_posix())]


def find_files(folder: Path, kind: str, endings: Sequence[str]) -> list[Path]:
    """Return the files of a folder and its subfolders with one of *endings*, in natural order, without hidden ones.

    Raises
    ------
    StoreError
        The folder does not exist, or has no such file.
    """
    if not folder.is_dir():
        raise StoreError(f"{folder} is not a folder", remedy="give the folder that holds the files")
    paths = (path for path in folder.rglob("*") if _belongs(path, folder, kind, endings))
    files = sorted(paths, key=_natural(folder))
    if not files:
        raise StoreError(f"{folder} holds no {kind} files", expected=f"files that end in {', '.join(endings)}")
    return files


def list_tensors(path: Path, name: str) -> list[FileTensor]:
    """Return the tensors of one file, whose format is given by its ending; *name* is its name in messages.

    Raises
    ------
    DamagedError
        The file cannot be read.
    """
    readers = {".safetensors": _safetensors, ".arrow": _arrow, ".npy": _npy}
    return list(readers.get(path.suffix, _torch)(path, name))


def _safetensors(path: Path, file: str) -> Iterator[FileTensor]:
    for name, entry in read_header(path)[0].items():
        yield FileTensor(file, name, entry.shape, entry.dtype, lambda entry=entry: entry.open(path))  # type: ignore[misc]


def _npy(path: Path, file: str) -> Iterator[FileTensor]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _unreadable(path, "npy", error) from error
    yield FileTensor(file, "", array.shape, array.dtype, lambda: array)


def _torch(path: Path, file: str) -> Iterator[FileTensor]:
    """Yield the tensors of a torch file; ``weights_only`` rejects pickles with anything else."""
    import torch

    from flexcache.store.write.row_encoding import host

    try:
        if path.suffix == ".gz":
            with gzip.open(path) as packed:
                content = torch.load(io.BytesIO(packed.read()), map_location="cpu", weights_only=True)
        else:
            try:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # files from before torch 1.6 cannot be mapped
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise any error
        raise _unreadable(path, "a file of torch with tensors alone", error) from error
    for name, tensor in _tensors(content, ""):
        if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
            array = host(tensor)
            yield FileTensor(file, name, array.shape, array.dtype, lambda array=array: array)  # type: ignore[misc]


def _tensors(content: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested dicts and lists with their dotted names."""
    if isinstance(content, dict):
        items: Any = content.items()
    elif isinstance(content, list | tuple):
        items = enumerate(content)
    else:
        yield name, content
        return
    for key, value in items:
        yield from _tensors(value, f"{name}.{key}" if name else str(key))


def _arrow(path: Path, file: str) -> Iterator[FileTensor]:
    """Yield the columns of a Hugging Face datasets file of SAELens' CacheActivationsRunner, memory-mapped.

    A column of activations holds lists of tokens of lists of features; ``token_ids`` holds lists of tokens.
    """
    try:
        with pa.memory_map(str(path)) as source:
            batches = list(pa.ipc.open_stream(source))
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, "an Arrow stream", error) from error
    for index, batch in enumerate(batches):
        for name in batch.schema.names:
            array = _unnested(batch.column(name), len(batch), path, name)
            if array is not None:
                part = file if len(batches) == 1 else f"{file}:{index:06d}"
                yield FileTensor(part, name, array.shape, array.dtype, lambda array=array: array)  # type: ignore[misc]


def _unnested(column: pa.Array, count: int, path: Path, name: str) -> np.ndarray | None:
    shape = [count]
    while True:
        if isinstance(column, pa.ExtensionArray):
            column = column.storage
        if not _is_list(column.type):
            break
        outer, column = len(column), column.flatten()
        if outer and len(column) % outer:
            raise _unreadable(path, "lists of one length", ValueError(f"the lists of column {name} differ in length"))
        shape.append(len(column) // max(1, outer))
    if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)) or column.null_count:
        return None
    return np.asarray(column.to_numpy(zero_copy_only=False)).reshape(shape)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _belongs(path: Path, folder: Path, kind: str, endings: Sequence[str]) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    stored = kind != "saelens" or path.name.startswith("data-")  # datasets also writes cache-*.arrow
    there = path.is_file() or (path.is_symlink() and not path.exists())  # a link to nothing is an error when it is read
    return path.name.endswith(tuple(endings)) and there and stored and not hidden


def _natural(folder: Path) -> Callable[[Path], list[Any]]:
    def key(path: Path) -> list[Any]:
        parts = re.split(r"(\d+)", path.relative_to(folder).as_posix())
        return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]

    return key


def _unreadable(path: Path, kind: str, error: Exception) -> DamagedError:
    return DamagedError(
        f"a file cannot be read as {kind}",
        where=str(path),
        found=_reason(error),
        remedy="write the file again, or leave it out of the folder",
    )


def _reason(error: Exception) -> str:
    """Return the cause of an error in one sentence, without the advice of torch to run the code in a file."""
    if isinstance(error, pickle.UnpicklingError):
        return "it is damaged, or holds something else than tensors"
    if isinstance(error, EOFError):
        return "it ends too early"
    first = (str(error).splitlines() or [""])[0].partition(". ")[0]
    return f"{type(error).__name__}: {first}"


class TensorStack:
    """The rows of several tensors of shape (…, features), concatenated and gathered by index."""

    def __init__(self, tensors: Sequence[FileTensor]) -> None:
        self.features = tensors[0].shape[-1]
        self.dtype = tensors[0].dtype
        self._arrays = [tensor.open().reshape(-1, self.features) for tensor in tensors]
        self._starts = np.cumsum([0, *(len(array) for array in self._arrays)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def gather_rows(self, rows: np.ndarray) -> np.ndarray:
        """Return the given rows in their order, shape (rows, features)."""
        out = np.empty((len(rows), self.features), self.dtype)
        owner = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(owner).tolist():
            here = owner == number
            out[here] = self._arrays[number][rows[here] - self._starts[number]]
        return out
