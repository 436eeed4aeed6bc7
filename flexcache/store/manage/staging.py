"""Write the metadata, tables and coordinates of an extended store, for documents, layers or sites that are added."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import xxhash
import zarr

from flexcache.array_spec import ArraySpec
from flexcache.plan import Plan, batch_groups
from flexcache.sequences import TokenizedCorpus
from flexcache.sequences.special_tokens import DOUBLED
from flexcache.spec import CaptureSpec
from flexcache.store.format.ledger import Ledger
from flexcache.store.format.metadata import largest_batch
from flexcache.store.format.schema import COORDINATES, SEQUENCES, read_attributes
from flexcache.store.manage.derive import add_history, derived_content, write_changed, write_derived
from flexcache.store.manage.file_transfer import copy_verified
from flexcache.store.manage.store_contents import shared_files
from flexcache.store.read.store import Store
from flexcache.store.write.create import check_free_space, total_bytes
from flexcache.store.write.skeleton import create_arrays, create_coordinate
from flexcache.store.write.tables import write_tables


def stage_arrays(store: Store, folder: Path, arrays: list[ArraySpec], spec: CaptureSpec, request: Any) -> None:
    """Write a store over the same plan with more arrays or layers into *folder*.

    *arrays* and *spec* are those of the extended store; the *request* is for its history.

    Raises
    ------
    PlanError
        The disk has too little free space for the new rows.
    DamagedError
        A table or coordinate of the store is damaged.
    """
    before, after = (total_bytes(held, store.n_rows, store.shard_rows) for held in (store.arrays.values(), arrays))
    check_free_space(store.path, after - before)
    content = derived_content(store, arrays, spec, {"extended_by": request})
    write_derived(store.path.resolve().name, folder, store, arrays, content)


def plan_extension(store: Store, corpus: TokenizedCorpus) -> Plan:
    """Return the plan of documents that follow those of a store, in units of the same size."""
    spec, rows = store.spec, store.n_rows
    shared = rows // store.shard_rows if rows % store.shard_rows else None
    batches = 0
    if shared is not None:
        with pq.ParquetFile(store.path / SEQUENCES) as file:
            last = file.read_row_group(file.num_row_groups - 1, columns=["batch"]).column("batch")
            batches = int(last[-1].as_py()) + 1
    sequences = corpus.segmentation
    return Plan(
        corpus.input_lengths.max(axis=1),
        sequences.kept,
        store.shard_rows,
        spec.batch_tokens,
        spec.seed,
        rows,
        batches,
        sequences.linked,
        batch_groups(store.provenance.batching or "padded", corpus.input_lengths),
    )


def stage_documents(store: Store, folder: Path, plan: Plan, corpus: TokenizedCorpus, entry: dict[str, Any]) -> None:
    """Write a store of the same arrays with more documents into *folder*; its ledger has the unchanged units.

    *plan* is the result of `plan_extension`; *entry* is for the history: the request, and the versions of the software.

    Raises
    ------
    PlanError
        The disk has too little free space for the new rows.
    DocumentsError
        A label has another type than in the store.
    DamagedError
        A coordinate of the store is damaged.
    """
    arrays = list(store.arrays.values())
    total = total_bytes(arrays, plan.n_rows, store.shard_rows)
    first = plan.first_row // store.shard_rows
    kept = first * store.shard_rows
    check_free_space(store.path, total - (total_bytes(arrays, kept, store.shard_rows) if kept else 0))
    content = _content(store, plan, corpus, total, entry)

    def add_arrays(group: zarr.Group) -> dict[str, zarr.Array]:
        create_arrays(group, arrays, plan.n_rows, store.shard_rows, store.spec.compression)
        coordinates = {}
        for name in COORDINATES:
            chunk = int(zarr.open_array(store.path / name, mode="r").chunks[0])
            coordinates[name] = create_coordinate(group, name, plan.n_rows, chunk)
        for name, record in shared_files(store).items():
            if "/c/" in name:
                copy_verified(store.path / name, folder / name, record)
        return coordinates

    def add_tables(coordinates: dict[str, zarr.Array]) -> None:
        write_tables(folder, plan, corpus, coordinates, store.path, int(store.plan["documents"]))

    write_changed(store.path.resolve().name, folder, store, arrays, content, add_arrays, add_tables)
    ledger = Ledger(folder)
    for unit in range(first):
        source, target = str(store.ledger.path(unit)), str(ledger.path(unit))
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)


def _content(store: Store, plan: Plan, corpus: TokenizedCorpus, total: int, entry: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes of the extended store."""
    given = read_attributes(store.path)
    before = given["plan"]
    run, padded, largest = plan.forwards()
    known = largest_batch(before)
    added = {
        "documents": len(corpus.lengths),
        **({"sequences": len(corpus.segmentation.lengths)} if "sequences" in before else {}),
        "tokens": int(corpus.lengths.sum(dtype=np.int64)),
        "tokens_run": run,
        "tokens_padded": padded,
        "truncated_documents": corpus.truncated,
        "skipped_documents": corpus.skipped,
        "rowless_documents": corpus.rowless,
        **({DOUBLED: corpus.doubled} if corpus.doubled else {}),
    }
    numbers = {
        **before,
        **{name: int(before.get(name, 0)) + value for name, value in added.items()},
        "rows": plan.n_rows,
        "units": plan.n_units,
        "files": plan.n_units * sum(len(array.slices) for array in store.arrays.values()),
        "bytes": total,
        "largest_batch": known and max(known, largest, key=lambda batch: batch.tokens),
        "longest_document": max(int(before.get("longest_document", 0)), int(corpus.lengths.max())),
        "corpus_xxh3_128": xxhash.xxh3_128_hexdigest(f"{before.get('corpus_xxh3_128')} {corpus.digest}".encode()),
    }
    if left_out := Counter(before.get("left_out", {})) + corpus.left_out:
        numbers["left_out"] = dict(sorted(left_out.items()))
    rows = [plan.first_row, plan.n_rows]
    return add_history({**given, "plan": numbers}, {**entry, "rows": rows, "corpus_xxh3_128": corpus.digest})
