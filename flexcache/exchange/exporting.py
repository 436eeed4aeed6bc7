"""Export a store to files of other tools: a file for each site and layer, or a table with a column for each."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow.parquet as pq

from flexcache.errors import ConfigError, DamagedError, MismatchError, PlanError, StoreError, UncommittedError, nearest
from flexcache.exchange import table
from flexcache.exchange.safetensors import header
from flexcache.paths import local_path
from flexcache.progress import ProgressCallback, ignore_progress
from flexcache.site import Layers
from flexcache.spec import DTYPES, ArraySpec
from flexcache.store.format.int8 import is_scale
from flexcache.store.format.schema import DOCUMENTS
from flexcache.store.manage.file_transfer import copy_verified
from flexcache.store.manage.store_contents import ledger_digest, shared_files
from flexcache.store.read.selection import ArrayKey, keys, select
from flexcache.store.read.store import Store
from flexcache.store.storage.atomic_files import fsync_folder, is_temporary, temporaries, temporary_name, write_json
from flexcache.store.storage.disk_errors import clear_errors
from flexcache.store.write.create import check_free_space

FORMATS = ("safetensors", "npy", "parquet")
MANIFEST = "export.json"


def export(
    store: str | Path,
    out: str | Path,
    to: str,
    *,
    sites: Sequence[str] | None = None,
    layers: Layers = "all",
    rows: str = "all",
    progress: ProgressCallback = ignore_progress,
) -> list[Path]:
    """Write activations as safetensors, npy or Parquet files; repeat the call to resume, file by file.

    ::

        flexcache.export("run.zarr", "exported", "safetensors", sites=["resid_post"], layers=[12])

    The folder also has ``documents.parquet``, as in the store; ``export.json``, which describes the export and its
    store; and for safetensors and npy ``rows.npy``, the row numbers in the store, and ``token_id.npy``. Memory is about
    100 MB.

    Parameters
    ----------
    to
        ``safetensors``: a file ``<site>.layer_<n>.safetensors`` for each layer, with one tensor of that name, shape
        (rows, features), in the stored dtype. ``npy``: the same, for ``np.load(…, mmap_mode="r")``, with bfloat16 as
        float32. ``parquet``: a file for each unit in ``data/``, with a line for each row and a column for each site and
        layer; bfloat16 as float32. See `flexcache.exchange.table`.
    sites, layers
        See `flexcache.store.read.selection.select`.
    rows
        ``all``, or ``committed`` for the committed rows of a partial store.

    Returns
    -------
    The files with activations.

    Raises
    ------
    ConfigError
        The format or choice of rows does not exist.
    SiteError
        The store does not have the site or layer.
    UncommittedError
        Rows are not committed, and *rows* is ``all``.
    MismatchError
        The folder holds another export.
    StoreError
        The folder is a file, or holds something else.
    PlanError
        The disk has too little room.
    CaptureError
        The disk cannot be written.
    """
    if to not in FORMATS:
        raise ConfigError(f"there is no format {to!r}", remedy=nearest(to, FORMATS))
    if rows not in ("all", "committed"):
        raise ConfigError(f"rows {rows!r} cannot be exported", expected="all or committed")
    origin, folder = Store(store), local_path(out)
    arrays = [array for array in select(origin, sites, layers) if not is_scale(array.name, origin.arrays)]
    _check_committed(origin, rows)
    work = _Export(origin, folder, to, arrays, progress)
    began = time.time()
    with clear_errors(folder):
        _begin(folder, work)
        files = work.run()
        _tidy(folder, began)
    return files


def label(key: ArrayKey) -> str:
    """Return the name of a site and layer in files.

    >>> label(("resid_post", 12))
    'resid_post.layer_12'
    """
    name, layer = key
    return name if layer is None else f"{name}.layer_{layer}"


class _Export:
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
        self._advance(0)
        documents = shared_files(self.store)[DOCUMENTS]
        if not (self.folder / DOCUMENTS).exists():
            with _put(self.folder / DOCUMENTS) as temporary:
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
            with _put(path) as temporary, temporary.open("wb") as file:
                np.save(file, values)

    def _tensor(self, key: ArrayKey) -> Path:
        path = self.folder / f"{label(key)}.{self.to}"
        array = self.store.arrays[key[0]]
        dtype = written(array, self.to)
        if path.exists():
            self._advance(len(self.rows) * array.features * dtype.itemsize)
            return path
        with _put(path) as temporary, temporary.open("wb") as file:
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
        with _put(path) as temporary:
            table.write_unit_table(
                self.store, unit, columns, temporary, lambda rows: self._advance(rows * self.row_bytes)
            )
        return path

    def _advance(self, count: int) -> None:
        self._done += count
        self._progress(self._done, len(self.rows) * self.row_bytes)


def written(array: ArraySpec, to: str) -> np.dtype:
    """Return the dtype of an exported array: its own, or float32 for int8 and for bfloat16 in a format without it."""
    lacking = array.dtype == "int8" or (to != "safetensors" and array.dtype == "bfloat16")
    return np.dtype(np.float32) if lacking else DTYPES[array.dtype]


def _begin(folder: Path, work: _Export) -> None:
    """Write the manifest into a new folder, or check the manifest of an earlier call."""
    path, manifest = folder / MANIFEST, work.manifest()
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder} is a file", remedy="choose another folder")
    if path.exists():
        try:
            found = json.loads(path.read_bytes())
            different = [key for key in manifest if found.get(key) != manifest[key]]
        except (ValueError, AttributeError, RecursionError) as error:
            raise DamagedError(
                "the manifest of an export cannot be read", where=str(path), found=str(error),
                remedy="remove the folder, and export again",
            ) from error  # fmt: skip
        if different:
            raise MismatchError(
                "the folder holds another export",
                where=str(folder),
                found=f"other {', '.join(different)}",
                remedy="choose another folder, or remove this one; a store that was extended, or whose labels changed,"
                " has to be exported again",
            )
        return
    if folder.exists() and not all(is_temporary(path) for path in folder.iterdir()):
        raise StoreError(
            f"{folder} is not empty and does not hold an export",
            remedy="choose another folder, or remove it if it is not needed",
        )
    try:
        check_free_space(folder, len(work.rows) * work.row_bytes)
    except PlanError as error:
        raise PlanError(
            "the export does not fit on the disk", where=error.where, expected=error.expected, found=error.found,
            remedy="make room, choose another disk, or export fewer sites and layers",
        ) from None  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, manifest)


def _check_committed(store: Store, rows: str) -> None:
    if rows == "all" and not store.complete:
        raise UncommittedError(
            "not all rows of the store are committed",
            where=str(store.path),
            expected=f"{store.n_units} units",
            found=f"{len(store.committed_units)} units",
            remedy="run the same capture again to complete the store, or export the committed rows"
            " (--rows committed, rows='committed')",
        )


def _tidy(folder: Path, began: float) -> None:
    """Remove temporary files of interrupted exports, which are older than *began*."""
    for path in temporaries(folder):
        if path.stat().st_mtime < began:
            path.unlink(missing_ok=True)


@contextmanager
def _put(path: Path) -> Iterator[Path]:
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
