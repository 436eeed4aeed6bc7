"""Say how rows would be read: from disk, or by which blocks of the model; needs no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flexcache.site import Layers
from flexcache.store.read.open_store import OpenStore
from flexcache.store.read.selection import ArrayKey, row_numbers, select
from flexcache.virtual.plan import ReadPlan, Segment, Starts, plan_walk, stored_starts
from flexcache.virtual.units import Unit, Units, possible_starts


def explain(store: OpenStore, site: str | Sequence[str] | None, layers: Layers, rows: Any) -> ReadPlan:
    """Return the plan of a read, as `flexcache.Store.explain` does."""
    attached = store.attached
    arrays = store.arrays if attached is None else attached.stored_arrays
    chosen = [array for array in select(store, site, layers, virtual=True) if array.name in arrays]
    keys = [(array.name, layer) for array in chosen for layer in array.captured]
    stored = tuple((name, layer) for name, layer in keys if layer not in arrays[name].virtual)
    virtual = [(name, layer) for name, layer in keys if layer in arrays[name].virtual]
    whole = np.arange(store.n_rows)
    numbers = np.unique(whole[rows] if isinstance(rows, slice) else row_numbers(rows, store.n_rows, store.path))
    read = sum(arrays[name].row_bytes for name, _ in stored) * len(numbers)
    found: dict[Segment, tuple[int, int]] = {}
    lacking: set[ArrayKey] = set()
    units, starts = Units(store), stored_starts(arrays)
    for number in np.unique(numbers // store.shard_rows).tolist() if virtual else ():
        unit = units.read(number)
        first = number * store.shard_rows
        wanted = unit.divide_rows(numbers[numbers // store.shard_rows == number] - first)

        def missing(key: ArrayKey, batch: int, unit: int = number, wanted: Any = wanted) -> bool:
            return attached is None or not attached.has_rows(*key, unit, wanted[batch])

        def find_starts(batch: int, unit: int = number, read: Unit = unit) -> Starts:
            if attached is not None:
                return attached.starts_of(unit, batch)
            return possible_starts(store, read, batch, starts)

        for segment, batches in plan_walk(virtual, wanted, missing, find_starts).items():
            held, tokens = found.get(segment, (0, 0))
            more = sum(unit.batches[batch].n_tokens for batch in batches)
            found[segment] = (held + len(batches), tokens + more)
            lacking |= {*segment.keys}
            if segment.start.skipped and segment.start in starts.values():
                read += sum(unit.batches[batch].n_tokens for batch in batches) * arrays[segment.start.site].row_bytes
    cached = tuple(key for key in virtual if key not in lacking)
    return ReadPlan(len(numbers), stored, cached, found, read)
