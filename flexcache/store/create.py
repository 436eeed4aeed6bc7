"""Creating a store: metadata, plan and coordinates, complete before the first forward and visible in one step."""

from __future__ import annotations

import fcntl
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from zarr.codecs import ZstdCodec

from flexcache.errors import MismatchError, PlanError, StoreError
from flexcache.plan import Plan, UnitPlan, ranges
from flexcache.sequences import Spool
from flexcache.spec import DTYPES, ArraySpec
from flexcache.store.bfloat16 import BFloat16
from flexcache.store.files import digest, fsync_folder, fsync_tree, relative_files, write_json
from flexcache.store.schema import ATTRIBUTE, COORDINATES, DOCUMENTS, PLAN_RECORD, RESERVED, SCHEMA, SEQUENCES
from flexcache.store.shard import ShardLayout

GROUP_TOKENS = 1 << 20
COORDINATE_CHUNK = 1 << 20


@contextmanager
def building(path: Path) -> Iterator[Path]:
    """Give a fresh folder beside *path*, and remove it afterwards unless it was renamed into place.

    Raises
    ------
    MismatchError
        Another process is planning the same store.
    StoreError
        The place is taken by something else.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise StoreError(
            f"{path} exists and is not a store",
            remedy="choose another path, or remove it if it is not needed",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.with_name(f".{path.name}.planning")
    lock = os.open(path.with_name(f".{path.name}.lock"), os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise MismatchError(
                f"another process is planning {path}", remedy="wait for it, then run the same command again"
            ) from None
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        path.with_name(f".{path.name}.lock").unlink(missing_ok=True)
        os.close(lock)


def total_bytes(arrays: list[ArraySpec], n_rows: int, shard_rows: int) -> int:
    """Return the bytes of all shard files of a complete, uncompressed store."""
    total = 0
    for array in arrays:
        layout = ShardLayout(n_rows, shard_rows, array.row_bytes)
        whole, last = max(0, layout.n_shards - 1), layout.n_shards - 1
        total += len(array.slices) * (whole * layout.file_bytes(0) + layout.file_bytes(last))
    return total


def check_room(path: Path, needed: int) -> None:
    """Refuse a plan that the disk cannot hold.

    Raises
    ------
    PlanError
        Fewer bytes are free than the store needs.
    """
    place = next(parent for parent in [path, *path.absolute().parents] if parent.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise PlanError(
            "the store does not fit on the disk",
            where=str(path),
            expected=f"{needed / 1e9:.1f} GB free",
            found=f"{free / 1e9:.1f} GB free",
            remedy="make room, choose another disk, fewer layers, rows: last or mean, or a max_length",
        )


def create(
    path: Path,
    folder: Path,
    plan: Plan,
    corpus: Spool,
    arrays: list[ArraySpec],
    summary: dict[str, Any],
    content: dict[str, Any],
    *,
    compression: str,
    card: str,
) -> None:
    """Write a store without activations into *folder*, and rename it to *path*.

    Parameters
    ----------
    summary
        The plan in numbers: rows, units, shard_rows, tokens, …
    content
        Spec and provenance.
    card
        The store's README.md.
    """
    store = folder / "store"
    store.mkdir()
    check_names(arrays)
    n_rows = plan.n_rows
    group = zarr.create_group(zarr.storage.LocalStore(store), zarr_format=3)
    for array in arrays:
        _create_array(group, array, n_rows, plan.shard_rows, compression)
    coordinates = {name: _create_coordinate(group, name, n_rows) for name in COORDINATES}
    group.attrs.update(
        {
            ATTRIBUTE: {
                "schema": SCHEMA,
                "arrays": {array.name: array.to_json() for array in arrays},
                "plan": {**summary, "corpus_xxh3_128": corpus.digest},
                **content,
            }
        }
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Consolidated metadata is currently not part")
        zarr.consolidate_metadata(group.store)  # before the tables: zarr warns of files that are not its own
    _write_tables(store, plan, corpus, coordinates)
    (store / "README.md").write_text(card, encoding="utf-8")
    files = relative_files(store)
    (store / "ledger" / "0").mkdir(parents=True)
    write_json(
        store / PLAN_RECORD,
        {
            "schema": 1,
            "files": {
                name: {"size": (store / name).stat().st_size, "xxh3_128": digest(store / name)} for name in files
            },
        },
    )
    fsync_tree(store)
    store.rename(path)
    fsync_folder(path.parent)


def check_names(arrays: list[ArraySpec]) -> None:
    """Refuse arrays that cannot stand side by side in one store."""
    names = [array.name for array in arrays]
    taken = sorted({name for name in names if name in RESERVED or names.count(name) > 1})
    if taken:
        raise StoreError(
            f"two arrays of the store would be named {', '.join(taken)}", remedy="leave one of the sites out"
        )


def _create_array(group: zarr.Group, array: ArraySpec, n_rows: int, shard_rows: int, compression: str) -> None:
    layout = ShardLayout(n_rows, shard_rows, array.row_bytes)
    stacked = array.layers is not None
    lead = (1,) if stacked else ()
    depth = (array.depth or 0,) if stacked else ()
    group.create_array(
        array.name,
        shape=(*depth, n_rows, array.features),
        shards=(*lead, shard_rows, array.features),
        chunks=(*lead, layout.chunk_rows, array.features),
        dtype=BFloat16() if array.dtype == "bfloat16" else DTYPES[array.dtype],
        fill_value=float("nan"),
        compressors=ZstdCodec(level=1) if compression == "zstd" else None,
        filters=None,
        dimension_names=array.dims,
        attributes={
            "site": array.site,
            "coordinates": " ".join(COORDINATES),
            **({"layers": list(array.layers)} if array.layers is not None else {}),
        },
    )


def _create_coordinate(group: zarr.Group, name: str, n_rows: int) -> zarr.Array:
    chunk = min(COORDINATE_CHUNK, 1 << max(0, n_rows - 1).bit_length())
    return group.create_array(
        name,
        shape=(n_rows,),
        chunks=(chunk,),
        dtype=COORDINATES[name],
        compressors=ZstdCodec(level=1),
        dimension_names=("token",),
    )


def _write_tables(store: Path, plan: Plan, corpus: Spool, coordinates: dict[str, zarr.Array]) -> None:
    documents = _TableWriter(store / DOCUMENTS)
    sequences = _TableWriter(store / SEQUENCES)
    rows = {name: _RowWriter(array) for name, array in coordinates.items()}
    n_documents = 0
    for unit in plan.units():
        lowest = int(unit.documents.min())
        table = corpus.take(lowest, int(unit.documents.max()) + 1).take(pa.array(unit.documents - lowest))
        tokens = table.column("tokens").combine_chunks()
        lengths = np.diff(tokens.offsets.to_numpy())
        numbers = n_documents - int(not unit.begins[0]) + np.arange(len(unit.documents))
        sequences.write(_sequence_table(unit, numbers, tokens), int(lengths.sum()))
        documents.write(_document_table(unit, table, lengths, plan), len(table))
        for name, values in _coordinates(unit, numbers, tokens, plan).items():
            rows[name].write(values)
        n_documents += int(unit.begins.sum())
    documents.close()
    sequences.close()
    for writer in rows.values():
        writer.close()


def _sequence_table(unit: UnitPlan, numbers: np.ndarray, tokens: pa.ListArray) -> pa.Table:
    count = len(numbers)
    return pa.table(
        {
            "document": pa.array(numbers, pa.int64()),
            "unit": pa.array(np.full(count, unit.unit, np.int32)),
            "batch": pa.array(unit.batches),
            "start": pa.array(np.zeros(count, np.int32)),
            "tokens": tokens,
            "keep_start": pa.array(unit.keep_start),
            "n_rows": pa.array(unit.n_rows),
            "row_start": pa.array(unit.row_start),
        }
    )


def _document_table(unit: UnitPlan, table: pa.Table, lengths: np.ndarray, plan: Plan) -> pa.Table:
    total = lengths if plan.rows == "all" else np.ones_like(lengths)
    table = table.drop_columns(["tokens"])
    table = table.add_column(2, "n_tokens", pa.array(lengths, pa.int32()))
    table = table.append_column("row_start", pa.array(unit.row_start))
    table = table.append_column("n_rows", pa.array(total, pa.int64()))
    return table.filter(pa.array(unit.begins))


def _coordinates(unit: UnitPlan, numbers: np.ndarray, tokens: pa.ListArray, plan: Plan) -> dict[str, np.ndarray]:
    document = np.repeat(numbers, unit.n_rows)
    if plan.rows == "mean":
        none = np.full(len(document), -1, np.int32)
        return {"token_id": none, "position": none, "document": document}
    offsets = tokens.offsets.to_numpy()[:-1]
    flat = tokens.values.to_numpy(zero_copy_only=False)
    return {
        "token_id": flat[ranges(offsets + unit.keep_start, unit.n_rows)],
        "position": ranges(unit.keep_start, unit.n_rows).astype(np.int32),
        "document": document,
    }


class _TableWriter:
    """A Parquet file whose row groups hold whole units, about a million tokens each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: pq.ParquetWriter | None = None
        self._pending: list[pa.Table] = []
        self._weight = 0

    def write(self, table: pa.Table, weight: int) -> None:
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, table.schema, compression="zstd")
        self._pending.append(table)
        self._weight += weight
        if self._weight >= GROUP_TOKENS:
            self._flush()

    def _flush(self) -> None:
        if self._pending and self._writer is not None:
            table = pa.concat_tables(self._pending)
            self._writer.write_table(table, row_group_size=max(1, len(table)))
            self._pending.clear()
            self._weight = 0

    def close(self) -> None:
        self._flush()
        if self._writer is not None:
            self._writer.close()


class _RowWriter:
    """A one-dimensional Zarr array that is written front to back, in whole chunks."""

    def __init__(self, array: zarr.Array) -> None:
        self._array = array
        self._pending: list[np.ndarray] = []
        self._held = 0
        self._done = 0

    def write(self, values: np.ndarray) -> None:
        self._pending.append(values)
        self._held += len(values)
        if self._held >= self._array.chunks[0]:
            self._flush(self._held - self._held % self._array.chunks[0])

    def _flush(self, count: int) -> None:
        values = np.concatenate(self._pending) if self._pending else np.zeros(0, self._array.dtype)
        if count:
            self._array[self._done : self._done + count] = values[:count]
        self._done += count
        self._pending = [values[count:]]
        self._held = len(values) - count

    def close(self) -> None:
        self._flush(self._held)
