"""Say how rows would be read: from disk, or by which blocks of the model; needs no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flexcache.site import Layers
from flexcache.store.format.text import layer_text, size
from flexcache.store.read.selection import ArrayKey, row_numbers, select
from flexcache.store.read.store import Store
from flexcache.virtual.plan import Segment, Starts, plan_walk, stored_starts
from flexcache.virtual.units import Unit, Units, possible_starts


@dataclass(frozen=True)
class ReadPlan:
    """The plan of a read; made by `flexcache.Store.explain`.

    Attributes
    ----------
    rows : int
        Rows of each site and layer.
    stored : tuple of (site, layer)
        Read from disk.
    cached : tuple of (site, layer)
        All rows are in the cache of the attached model.
    segments : mapping from Segment to (batches, tokens)
        The blocks that run from each start, and for how many batches of the capture and tokens without padding.
    bytes : int
        Bytes that are read from disk: rows, and residual streams at which the model starts.
    """

    rows: int
    stored: tuple[ArrayKey, ...]
    cached: tuple[ArrayKey, ...]
    segments: Mapping[Segment, tuple[int, int]]
    bytes: int

    @property
    def blocks(self) -> int:
        """Forwards of single blocks, over all batches."""
        return sum(len(segment.blocks) * batches for segment, (batches, _) in self.segments.items())

    @property
    def batches(self) -> int:
        """Forwards of batches, each of some blocks."""
        return sum(batches for batches, _ in self.segments.values())

    @property
    def tokens(self) -> int:
        """Tokens of these forwards."""
        return sum(tokens for _, tokens in self.segments.values())

    def __repr__(self) -> str:
        lines = [
            f"{self.rows:,} rows: {size(self.bytes)} from disk, {self.blocks:,} blocks in {self.batches:,} batches"
        ]
        lines += [f"  from disk: {_names(self.stored)}"] * bool(self.stored)
        lines += [f"  from the cache: {_names(self.cached)}"] * bool(self.cached)
        for segment, (batches, tokens) in self.segments.items():
            ran = segment.blocks
            blocks = f"blocks {ran[0]} to {ran[-1]}" if len(ran) > 1 else f"block {ran[0]}" if ran else "no block"
            lines.append(
                f"  recomputed: {_names(segment.keys)}, from {segment.start}, {blocks}, {batches:,} batches,"
                f" {tokens:,} tokens"
            )
        return "\n".join(lines)


def explain(store: Store, site: str | Sequence[str] | None, layers: Layers, rows: Any) -> ReadPlan:
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


def _names(keys: Sequence[ArrayKey]) -> str:
    by_site: dict[str, list[int]] = {}
    for name, layer in keys:
        by_site.setdefault(name, []).extend([] if layer is None else [layer])
    return ", ".join(f"{name} {layer_text(tuple(layers))}".strip() for name, layers in by_site.items())
