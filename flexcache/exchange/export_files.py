"""The files of an export: one for each site and layer, a table for each unit, or one with texts for each layer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow.parquet as pq

from flexcache.array_spec import DTYPES, ArraySpec
from flexcache.exchange import table
from flexcache.exchange.safetensors import header
from flexcache.exchange.text_export import (
    SIDECAR,
    TEXT_FORMATS,
    RowChoice,
    describe_choice,
    sidecar,
    write_text_table,
)
from flexcache.progress import ProgressCallback
from flexcache.store.format.schema import DOCUMENTS
from flexcache.store.manage.file_transfer import copy_verified
from flexcache.store.manage.store_contents import ledger_digest, shared_files
from flexcache.store.read.selection import ArrayKey, keys
from flexcache.store.read.store import Store
from flexcache.store.storage.atomic_files import fsync_folder, temporary_name

FORMATS = ("safetensors", "npy", "parquet")


def label(key: ArrayKey) -> str:
    """Return the name of a site and layer in files.

    >>> label(("resid_post", 12))
    'resid_post.layer_12'
    """
    name, layer = key
    return name if layer is None else f"{name}.layer_{layer}"


class FileExport:
    """One export: its files, and its progress in bytes."""

    def __init__(
        self, store: Store, folder: Path, to: str, arrays: list[ArraySpec], progress: ProgressCallback
    ) -> None:
        self.store, self.folder, self.to, self.arrays = store, folder, to, arrays
        self.keys = keys(arrays)
        self.units = store.committed_units.tolist()
        self.rows = store.committed_rows
        self.row_bytes = sum(len(array.slices) * array.features * written(array, to).itemsize for array in arrays)
        self._progress, self._done = progress, 0

    def manifest(self) -> dict[str, Any]:
        """Return what identifies the export, for JSON."""
        return {
            "schema": 1,
            "format": self.to,
            "store": self.store.path.name,
            "ledger_xxh3_128": ledger_digest(self.store),
            **({"labels": labels} if (labels := self.store.label_checksums()) else {}),
            "arrays": {array.name: {**array.to_json(), "dtype": written(array, self.to).name} for array in self.arrays},
            "rows": len(self.rows),
            "provenance": self.store.provenance.to_json(),
        }

    def run(self) -> list[Path]:
        """Write the files that are not there yet; return those with activations."""
        self._advance(0)
        documents = shared_files(self.store)[DOCUMENTS]
        if not (self.folder / DOCUMENTS).exists():
            with put_file(self.folder / DOCUMENTS) as temporary:
                if self.store.label_tables:
                    pq.write_table(self.store.documents, temporary, compression="zstd")
                else:
                    copy_verified(self.store.path / DOCUMENTS, temporary, documents)
        if self.to == "parquet":
            return [self._table(index, unit) for index, unit in enumerate(self.units)]
        self._numbers("rows", self.rows)
        self._numbers("token_id", np.asarray(self.store.coordinates["token_id"].values)[self.rows])
        return [self._tensor(key) for key in self.keys]

    def _numbers(self, name: str, values: np.ndarray) -> None:
        path = self.folder / f"{name}.npy"
        if not path.exists():
            with put_file(path) as temporary, temporary.open("wb") as file:
                np.save(file, values)

    def _tensor(self, key: ArrayKey) -> Path:
        path = self.folder / f"{label(key)}.{self.to}"
        array = self.store.arrays[key[0]]
        dtype = written(array, self.to)
        if path.exists():
            self._advance(len(self.rows) * array.features * dtype.itemsize)
            return path
        with put_file(path) as temporary, temporary.open("wb") as file:
            self._head(file, key, dtype, (len(self.rows), array.features))
            for _, values in self.store.scan(*key, raw=dtype == self.store.reader(key[0]).dtype):
                file.write(values.reshape(-1).view(np.uint8).data)
                self._advance(values.nbytes)
        return path

    def _head(self, file: BinaryIO, key: ArrayKey, dtype: np.dtype, shape: tuple[int, int]) -> None:
        if self.to == "npy":
            content = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, content)
            return
        name, layer = key
        model = self.store.provenance.model_name
        facts = {"store": self.store.path.name, "model": model, "site": name, "layer": layer, "dtype": dtype.name}
        file.write(header(label(key), dtype, shape, {k: str(v) for k, v in facts.items() if v is not None}))

    def _table(self, index: int, unit: int) -> Path:
        path = self.folder / "data" / f"train-{index:05d}-of-{len(self.units):05d}.parquet"
        if path.exists():
            self._advance(len(table.unit_rows(self.store, unit)) * self.row_bytes)
            return path
        path.parent.mkdir(exist_ok=True)
        columns = {label(key): (key, written(self.store.arrays[key[0]], self.to)) for key in self.keys}
        with put_file(path) as temporary:
            table.write_unit_table(
                self.store, unit, columns, temporary, lambda rows: self._advance(rows * self.row_bytes)
            )
        return path

    def _advance(self, count: int) -> None:
        self._done += count
        self._progress(self._done, len(self.rows) * self.row_bytes)


class TextExport(FileExport):
    """An export with texts: a table for each layer."""

    def __init__(
        self,
        store: Store,
        folder: Path,
        to: str,
        arrays: list[ArraySpec],
        progress: ProgressCallback,
        tokenizer: Any,
        choice: RowChoice,
    ) -> None:
        super().__init__(store, folder, to, arrays, progress)
        self._tokenizer, self._choice = tokenizer, choice
        self.rows = choice.select_rows(store, self.rows)

    def manifest(self) -> dict[str, Any]:
        """Return what identifies the export, with the choice of rows and the tokenizer."""
        return super().manifest() | describe_choice(self._choice, self._tokenizer)

    def run(self) -> list[Path]:
        """Write the tables that are not there yet, and return all."""
        self._advance(0)
        return [self._text_table(layer) for _, layer in self.keys if layer is not None]

    def _text_table(self, layer: int) -> Path:
        (array,) = self.arrays
        name = f"base.layer_{layer}" if self.to == "nla" else f"train.layer_{layer}"
        path, size = self.folder / f"{name}.parquet", array.features * 4
        if self.to == "nla":
            beside = path.with_name(path.name + SIDECAR)
            if not beside.exists():
                with put_file(beside) as temporary:
                    temporary.write_bytes(sidecar(self.store, layer, array.features, len(self.rows), self._choice))
        if path.exists():
            self._advance(len(self.rows) * size)
            return path
        with put_file(path) as temporary:
            write_text_table(
                self.store,
                layer,
                array,
                self.rows,
                self.to,
                self._tokenizer,
                temporary,
                lambda rows: self._advance(rows * size),
            )
        return path


def written(array: ArraySpec, to: str) -> np.dtype:
    """Return the dtype of an exported array: its own, or float32 for int8 and for bfloat16 in a format without it."""
    lacking = array.dtype == "int8" or (to != "safetensors" and array.dtype == "bfloat16") or to in TEXT_FORMATS
    return np.dtype(np.float32) if lacking else DTYPES[array.dtype]


@contextmanager
def put_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path whose file gets the name *path* once it is complete and flushed."""
    temporary = temporary_name(path)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)
