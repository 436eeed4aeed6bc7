"""Measure how far a model, under the conditions of now, is from the rows that are on disk."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from flexcache.array_spec import DTYPES
from flexcache.errors import MismatchError
from flexcache.recording.forward.batch import Batch
from flexcache.store.read.selection import ArrayKey
from flexcache.store.read.store import Store
from flexcache.virtual.plan import BEGINNING, Start, divide, stored_starts
from flexcache.virtual.units import Units
from flexcache.virtual.walk import Walk


def check_tolerance(store: Store, walk: Walk, units: Units, tolerance: float) -> list[str]:
    """Recompute the layers on disk for one batch, and return a note on the largest difference from the stored rows.

    Each layer is run from the residual stream before it, as virtual layers are.

    Raises
    ------
    MismatchError
        A value differs by more than *tolerance*, relative to the largest of its layer.
    """
    keys = [(name, layer) for name in walk.arrays for layer in store.arrays[name].layers or ()]
    committed = store.committed_units.tolist()
    if not keys or not committed:
        return ["No layer of the recomputed sites is on disk, so the difference to the capture was not measured."]
    unit = units.read(committed[0])
    number = int(np.argmin([batch.shape[0] * batch.shape[1] for batch in unit.batches]))
    found: dict[ArrayKey, float] = {}

    def read(start: Start, batch: Batch) -> np.ndarray:
        rows = unit.sequence_rows(number) or batch.rows
        return store.read(start.site, start.layer, slice(rows.start, rows.stop), raw=True)

    def compare(batch: Batch, key: ArrayKey, pieces: list[memoryview]) -> None:
        dtype = DTYPES[store.arrays[key[0]].dtype]
        now = np.frombuffer(b"".join(pieces), dtype).astype(np.float64)
        held = store.read(*key, slice(batch.rows.start, batch.rows.stop)).astype(np.float64).reshape(-1)
        found[key] = float(np.abs(now - held).max() / max(float(np.abs(held).max()), 1e-30))

    starts = stored_starts(store.arrays) if not unit.crosses(number) else {}
    for segment in divide(keys, starts):
        segment = segment if segment.blocks else replace(segment, start=BEGINNING)
        walk.run(segment, [unit.batches[number]], read, compare, unit.record.fingerprint)
    (site, layer), worst = max(found.items(), key=lambda item: item[1])
    where = f"{site} of layer {layer}, unit {committed[0]}, batch {number}"
    if not worst <= tolerance:
        raise MismatchError(
            "recomputed rows differ from those on disk by more than the tolerance",
            where=f"{store.path}, {where}",
            expected=f"at most {tolerance:g} of the largest value",
            found=f"{worst:.3g}",
            remedy="recompute under the conditions of the capture, or raise the tolerance",
        )
    return [
        f"Recomputed layers that are on disk differ by at most {worst:.2g} of their largest value ({where})."
    ] * bool(worst)
