"""Write a store with all rows in random order: an exact shuffle, made once and then read sequentially."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from flexcache.array_spec import ArraySpec
from flexcache.errors import ConfigError, StoreError
from flexcache.paths import local_path
from flexcache.progress import ProgressCallback, ignore_progress
from flexcache.recording.external_forward import record
from flexcache.site import Layers
from flexcache.store.format.int8 import is_scale
from flexcache.store.format.provenance import recorded_model
from flexcache.store.manage.copy import check_separate
from flexcache.store.manage.store_contents import describe_origin, ledger_digest
from flexcache.store.read.selection import select
from flexcache.store.read.store import Store

BLOCK_ROWS = 1024
"""Rows of a document of the result, which is an arbitrary block of rows."""
BLOCK_BYTES = 64 << 20
SOURCE_ROW = "source_row"


def preshuffle(
    source: str | Path | Store,
    target: str | Path,
    *,
    sites: Sequence[str] | None = None,
    layers: Layers = "all",
    seed: int = 0,
    progress: ProgressCallback = ignore_progress,
) -> Store:
    """Write the rows of a complete store in random order into another store; repeat the call to resume.

    ::

        from flexcache.training.preshuffle import preshuffle

        shuffled = preshuffle("run.zarr", "shuffled.zarr", seed=0)
        shuffled.token_label("source_row")      # the row of run.zarr for each row

    Every order of the rows is equally likely, and all sites and layers have the same order. The result is an ordinary
    store that can be verified, copied, and read by `flexcache.training.stream` or sequentially. Its documents are
    arbitrary blocks of rows, and the token label ``source_row`` holds the original row. Several processes may write it
    together.

    Rows are gathered in pieces of about 64 MB. Each piece is read in file order and so passes once through the source,
    which is slow if the source is much larger than memory, but has to be done only once. Memory is about 20 bytes per
    row for the order and its map, plus the piece.

    Parameters
    ----------
    source
        The store: its path, or an open store with a model that recomputes virtual layers (`flexcache.attach`).
    sites, layers
        Sites and layers to write; see `flexcache.store.select`. All must have the same dtype, and sites with layers the
        same layers.
    seed
        Seed of the order.
    progress
        Function that is called with the number of finished rows and of all rows.

    Returns
    -------
    The target, complete.

    Raises
    ------
    StoreError
        The source is not complete, or one store is inside the other.
    ConfigError
        The sites have different dtypes or layers; or the cache of recomputed rows is too small for all of them.
    MismatchError
        The target holds another store.
    CaptureError
        The disk cannot be written.
    """
    store = source if isinstance(source, Store) else Store(source)
    check_separate(store.path, local_path(target))
    if not store.complete:
        raise StoreError(
            "the store is not complete, so its rows cannot be shuffled yet",
            where=str(store.path),
            found=f"{len(store.committed_units)} of {store.n_units} units committed",
            remedy="finish the capture first",
        )
    arrays = [array for array in select(store, sites, layers) if not is_scale(array.name, store.arrays)]
    dtype, chosen = _alike(arrays)
    order = np.random.default_rng(seed).permutation(store.n_rows)
    width = sum(len(array.slices) * array.row_bytes for array in arrays)
    if store.attached is not None:
        store.attached.check_room([(array.name, layer) for array in arrays for layer in array.slices], store.n_rows)
    model = store.provenance.model
    with record(
        target,
        _blocks(store, order),
        sites={a.name: a.features if a.depth is None else (a.depth, a.features) for a in arrays},
        layers=chosen,
        model={
            "name": store.provenance.model_name or "unknown",
            "class": "preshuffled",
            "preshuffled": {**describe_origin(store), "seed": seed, "model": {**model, **recorded_model(store)}},
        },
        dtype=dtype,
        token_labels=[SOURCE_ROW],
        batch_tokens=BLOCK_ROWS * max(1, BLOCK_BYTES // (width * BLOCK_ROWS)),
        compression=store.spec.compression,
        fingerprint={"preshuffled": ledger_digest(store)},
    ) as recorder:
        starts = recorder.store.documents.column("source_index").to_numpy() * BLOCK_ROWS
        position, document = (np.asarray(recorder.store.coordinates[name].values) for name in ("position", "document"))
        progress(recorder.rows_done, store.n_rows)
        for batch in recorder.batches():
            span = slice(batch.rows.start, batch.rows.stop)
            rows = order[starts[document[span]] + position[span]]
            forward = np.argsort(rows)  # file order
            for name, layer in recorder.keys:
                values = _gathered(store, name, layer, rows, forward)
                recorder.put(name, values, rows=batch.rows, layer=layer)
            progress(recorder.rows_done + len(batch.rows), store.n_rows)
    return Store(target)


def _alike(arrays: Sequence[ArraySpec]) -> tuple[str, Layers]:
    """Return the common dtype of arrays, and the common layers of arrays that have layers."""
    dtypes = {array.dtype for array in arrays}
    layers = {array.layers for array in arrays if array.layers is not None}
    if len(dtypes) > 1 or len(layers) > 1:
        raise ConfigError(
            "sites that are shuffled together must have one dtype and the same layers",
            found="; ".join(f"{array.name}: {array.dtype}, layers {array.layers}" for array in arrays),
            remedy="choose sites or layers, or shuffle them one by one with the same seed, which gives the same order",
        )
    return dtypes.pop(), list(layers.pop()) if layers else "all"


def _blocks(store: Store, order: np.ndarray) -> pa.Table:
    """Return documents of consecutive rows of the order, with their tokens and original rows."""
    token_id = np.maximum(np.asarray(store.coordinates["token_id"].values)[order], 0)  # a mean has no token
    offsets = pa.array(np.minimum(np.arange(0, len(order) + BLOCK_ROWS, BLOCK_ROWS), len(order)).astype(np.int32))
    lists: dict[str, Any] = {
        "tokens": pa.ListArray.from_arrays(offsets, pa.array(token_id.astype(np.int32))),
        SOURCE_ROW: pa.ListArray.from_arrays(offsets, pa.array(order.astype(np.int64))),
    }
    return pa.table({"id": [f"block-{number}" for number in range(len(offsets) - 1)], **lists})


def _gathered(store: Store, name: str, layer: int | None, rows: np.ndarray, forward: np.ndarray) -> np.ndarray:
    found = store.read(name, layer, rows[forward], raw=store.arrays[name].dtype != "int8")
    values = np.empty_like(found)
    values[forward] = found
    return values
