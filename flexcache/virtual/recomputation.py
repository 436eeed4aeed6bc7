"""Recompute rows of virtual layers into a cache, and prove them by the digests of the capture."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from flexcache.array_spec import DTYPES, ArraySpec
from flexcache.errors import FlexCacheError, MismatchError
from flexcache.store.format.shard import ShardLayout, shard_name
from flexcache.store.read.selection import ArrayKey
from flexcache.store.read.store import Store
from flexcache.virtual.cache import CachedShard, RowCache, file_bytes, full_disk
from flexcache.virtual.plan import BEGINNING, ReplayError, Segment, Start, plan_walk, start_after, stored_starts
from flexcache.virtual.units import Unit, Units, possible_starts

if TYPE_CHECKING:
    from flexcache.recording.forward.batch import Batch
    from flexcache.virtual.walk import Walk

EVERY_BATCH = (-1, -1)


class Recomputation:
    """The virtual rows of a store, recomputed by a model. Any number of threads may call it.

    Attributes
    ----------
    arrays : mapping from str to ArraySpec
        The arrays of the store, with virtual layers among their layers.
    virtual : mapping from str to tuple of int
        The virtual layers of each site.
    notes : list of str
        How recomputed rows may differ from those of the capture; empty if all were equal to the bit.

    Parameters
    ----------
    load
        Returns the model, ready to run; it is called once, when rows are first recomputed.
    any_conditions
        Accept rows with other digests that were recomputed under other conditions than those of the capture.
    """

    def __init__(self, store: Store, cache: RowCache, load: Callable[[], Walk], any_conditions: bool = False) -> None:
        self.store, self.cache = store, cache
        self.stored_arrays, self.notes = store.arrays, list[str]()
        self.virtual = {name: array.virtual for name, array in store.arrays.items() if array.virtual}
        self.arrays = {name: _with_all_layers(array) for name, array in store.arrays.items()}
        self._load, self._any_conditions, self._lock = load, any_conditions, threading.RLock()
        self._walk: Walk | None = None
        self._units = Units(store)
        self._starts = stored_starts(store.arrays)
        self._inexact = set[tuple[int, int]]()  # batches, by unit and number, whose replay was not exact

    def walk(self) -> Walk:
        """Return the model, ready to run."""
        with self._lock:
            if self._walk is None:
                self._walk = self._load()
            return self._walk

    def cached_shard(self, name: str, layer: int | None, unit: int, rows: np.ndarray) -> CachedShard:
        """Return the file of a virtual shard with some of its rows there; *rows* are numbers in the unit."""
        shard = self._shard(name, layer, unit)
        if not shard.has(rows):
            with self._lock:
                self._recompute(unit, {(name, layer): shard}, self._units.read(unit).whole_batches(rows))
        self.cache.touch(shard)
        return shard

    def recompute_layers(self, site: str, layers: list[int], rows: Mapping[int, np.ndarray]) -> None:
        """Recompute rows of some layers in one walk; *rows* are ascending numbers in each unit."""
        with self._lock:
            for unit, local in rows.items():
                self._recompute(unit, {(site, layer): self._shard(site, layer, unit) for layer in layers}, local)

    def recompute_unit(self, unit: int, keys: Collection[ArrayKey]) -> dict[ArrayKey, CachedShard]:
        """Recompute all rows of a unit at some sites and layers in one walk, and return their files in the cache."""
        shards: dict[ArrayKey, CachedShard] = {key: self._shard(*key, unit) for key in keys}
        with self._lock:
            count = sum(len(batch.rows) for batch in self._units.read(unit).batches)
            self._recompute(unit, shards, np.arange(count))
        return shards

    def unit(self, number: int) -> Unit:
        """Return a committed unit, with the digests that its rows are compared with."""
        return self._units.read(number)

    def use_units(self, units: Units) -> None:
        """Compare rows with the digests of other units than those of the store."""
        self._units = units

    def has_rows(self, name: str, layer: int | None, unit: int, rows: np.ndarray) -> bool:
        """Return True if rows of a virtual layer are in the cache; *rows* are numbers in the unit."""
        shard = self._shard(name, layer, unit, create=False)
        return shard is not None and shard.has(rows)

    def starts_of(self, unit: int, number: int, cached: Mapping[Start, CachedShard] | None = None) -> dict[int, Start]:
        """Return the residual streams that a batch of a unit can start from: on disk, or in the cache."""
        read = self._units.read(unit)
        if EVERY_BATCH in self._inexact or (unit, number) in self._inexact:
            return {}
        found = dict(possible_starts(self.store, read, number, self._starts))
        if not read.crosses(number):
            held = self._cached_starts(unit) if cached is None else cached
            there = {start.skipped: start for start, shard in held.items() if shard.has(read.span(number))}
            found = there | found
        return found

    def _recompute(self, unit: int, shards: Mapping[ArrayKey, CachedShard], rows: np.ndarray) -> None:
        """Recompute the rows of a unit, as numbers in it, that some shards lack."""
        read, wanted = self._units.read(unit), self._units.read(unit).divide_rows(rows)
        starts = self._cached_starts(unit)
        walked = plan_walk(
            [*shards],
            wanted,
            lambda key, number: not shards[key].has(wanted[number]),
            lambda number: self.starts_of(unit, number, starts),
        )
        for segment, numbers in walked.items():
            crossing = [number for number in numbers if segment.start.skipped and read.crosses(number)]
            whole = [number for number in numbers if number not in crossing]
            for some in ([whole] if whole else []) + [[number] for number in crossing]:
                part = {number: wanted[number] for number in some}
                try:
                    self._run(segment, read, part, shards, starts)
                except (MismatchError, ReplayError) as error:
                    if not segment.start.skipped:
                        raise
                    self._run(replace(segment, start=BEGINNING), read, part, shards, starts)
                    self._note_inexact(unit, some, crossing, segment, error)

    def _note_inexact(
        self, unit: int, numbers: list[int], crossing: list[int], segment: Segment, error: FlexCacheError
    ) -> None:
        """Remember batches that were exact only from the beginning: those of documents in two units, or all of them."""
        if numbers[0] in crossing:
            self._inexact.update((unit, number) for number in numbers)
            return
        self._inexact.add(EVERY_BATCH)
        self.notes.append(
            f"A replay from {segment.start} is not exact for this model, so blocks are run from the beginning:"
            f" {error.message}."
        )

    def _run(
        self,
        segment: Segment,
        unit: Unit,
        wanted: Mapping[int, np.ndarray],
        shards: Mapping[ArrayKey, CachedShard],
        starts: Mapping[Start, CachedShard],
    ) -> None:
        """Run a segment on some batches of a unit, and keep the *wanted* rows of each if the digest is right."""
        walk = self.walk()
        numbers = {id(unit.batches[number]): number for number in wanted}
        rows = np.concatenate([*wanted.values()])
        needed = sum(file_bytes(rows, self.arrays[name].row_bytes) for name, _ in segment.keys)
        self.cache.make_room(needed, {shard.path for shard in (*shards.values(), *starts.values())})

        def read(start: Start, batch: Batch) -> np.ndarray:
            held, rows = starts.get(start), unit.sequence_rows(numbers[id(batch)]) or batch.rows
            if held is None:
                return self.store.reader(start.site).scan(start.layer, rows.start, rows.stop, raw=True)
            local = slice(rows.start - unit.first, rows.stop - unit.first)
            return held.rows[local].view(DTYPES[self.arrays[start.site].dtype])

        def keep(batch: Batch, key: ArrayKey, pieces: list[memoryview]) -> None:
            number = numbers[id(batch)]
            self._check_digest(unit, number, key, pieces)
            rows, first = wanted[number], unit.span(number).start
            if len(rows) == len(batch.rows):
                shards[key].write(first, pieces)
                return
            content = np.frombuffer(b"".join(pieces), np.uint8).reshape(len(batch.rows), -1)
            for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
                shards[key].write(int(run[0]), [content[run[0] - first : run[-1] + 1 - first]])

        try:
            walk.run(segment, [unit.batches[number] for number in wanted], read, keep, unit.record.fingerprint)
        except OSError as error:
            raise full_disk(self.cache.folder, error) from error

    def _check_digest(self, unit: Unit, number: int, key: ArrayKey, pieces: list[memoryview]) -> None:
        """Raise MismatchError if rows of a batch are not those of the capture, unless other conditions are accepted."""
        hasher = xxhash.xxh3_128()
        for piece in pieces:
            hasher.update(piece)
        record = unit.record
        expected = unit.digests(*key)[number]
        if hasher.hexdigest() == expected:
            return
        then = record.fingerprint
        now = {name: value for name, value in self.walk().conditions.items() if name != "threads"}  # those of then
        changed = [f"{name} {then.get(name)}, now {now.get(name)}" for name in now if then.get(name) != now.get(name)]
        if changed and self._any_conditions:
            note = "Recomputed under other conditions than the capture's, so that bits differ: " + "; ".join(changed)
            if note not in self.notes:
                self.notes.append(note)
            return
        raise MismatchError(
            "recomputed rows are not those of the capture",
            where=f"{self.store.path}, unit {record.unit}, batch {number}, {key[0]} of layer {key[1]}",
            expected=f"rows with XXH3-128 {expected}",
            found=hasher.hexdigest() + ("; captured under other conditions: " + "; ".join(changed) if changed else ""),
            remedy="recompute under the conditions of the capture, or accept others: attach(…, tolerance=0.001)"
            if changed
            else "leave the model as it was captured: hooks, weights and modes; flexcache verify tells if the store is"
            " damaged",
        )

    def _cached_starts(self, unit: int) -> dict[Start, CachedShard]:
        """Return the residual streams of a unit that are in the cache, in part or whole."""
        found = {}
        for name, layers in self.virtual.items():
            for layer in layers:
                start = start_after(name, layer)
                shard = None if start is None else self._shard(name, layer, unit, create=False)
                if start is not None and shard is not None:
                    found[start] = shard
        return found

    def _shard(self, name: str, layer: int | None, unit: int, create: bool = True) -> Any:
        array = self.arrays[name]
        digests = self._units.read(unit).digests(name, layer)
        made_of = xxhash.xxh3_64_hexdigest("".join(digests).encode())  # an extension or repair changes them
        layout = ShardLayout(self.store.n_rows, self.store.shard_rows, array.row_bytes)
        bits = np.dtype(f"<u{DTYPES[array.dtype].itemsize}")
        return self.cache.shard(f"{shard_name(name, layer, unit)}-{made_of}", layout, unit, bits, create=create)


def _with_all_layers(array: ArraySpec) -> ArraySpec:
    if not array.virtual:
        return array
    return replace(array, layers=tuple(sorted({*(array.layers or ()), *array.virtual})), virtual=())
