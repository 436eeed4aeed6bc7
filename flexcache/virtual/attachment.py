"""Attach a model to a store, so that its virtual layers can be read."""

from __future__ import annotations

import hashlib
import shutil
import socket
import tempfile
import threading
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import xxhash
from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema

from flexcache.errors import ConfigError, FlexCacheError, MismatchError, SiteError
from flexcache.model import ModelSource
from flexcache.recording.run_options import parse_bytes
from flexcache.site import Layers, plain_layers, resolve_layers
from flexcache.spec import DTYPES
from flexcache.store.format.shard import ShardLayout, shard_name
from flexcache.store.format.text import size
from flexcache.store.read.selection import ArrayKey
from flexcache.store.read.shard_reader import RowReader
from flexcache.store.read.store import Store
from flexcache.store.storage.location import StoreLocation, is_location
from flexcache.validation import Options, validate
from flexcache.virtual.cache import CachedShard, RowCache, file_bytes, full_disk
from flexcache.virtual.plan import BEGINNING, ReplayError, Segment, Start, plan_walk, start_after, stored_starts
from flexcache.virtual.reader import VirtualReader
from flexcache.virtual.units import Unit, Units, possible_starts

if TYPE_CHECKING:
    import torch

    from flexcache.recording.forward.batch import Batch
    from flexcache.virtual.walk import Walk

DEFAULT_CACHE = 4 << 30
"""Bytes of recomputed rows on disk."""
EVERY_BATCH = (-1, -1)
SHARE = 0.8
"""Share of the cache that rows which are recomputed ahead may fill."""


class AttachOptions(Options):
    """Options of an attached model: the cache of recomputed rows, and what may differ from the capture.

    >>> AttachOptions(cache_bytes="1 GiB").cache_bytes
    1073741824
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    cache: Path | None = Field(
        None, description="folder of the cache of recomputed rows; a temporary folder, removed afterwards, by default"
    )
    cache_bytes: Annotated[
        int, BeforeValidator(parse_bytes), WithJsonSchema({"type": ["integer", "string"], "minimum": 1})
    ] = Field(DEFAULT_CACHE, ge=1, description="bytes of the cache: a number, or text such as 4 GiB")
    tolerance: float | None = Field(
        None,
        gt=0,
        description="accept rows that were recomputed under other conditions than the capture's (device, versions,"
        " threads, kernel), if recomputed rows of the layers on disk differ by at most this much, relative to their"
        " largest value",
    )


def attach(
    store: Store | StoreLocation | str, model: torch.nn.Module | ModelSource | str, **options: Any
) -> Attachment:
    """Attach a model to a store: its virtual layers are recomputed when they are read, and proved by their digests.

    ::

        with flexcache.attach(store, model):
            store.read("mlp_post", layer=8, rows=[0, 1])

    The store is changed in place until `Attachment.detach` is called, or the context ends. A read runs only the
    batches of the capture that hold its rows, from the nearest residual stream before the layer. Rows are kept in a
    cache on disk. Arrays that were made from the store, such as ``store["resid_post"]``, can be sent to worker
    processes if the model is given by name or as `flexcache.ModelSource`, so that each worker loads it.

    Parameters
    ----------
    store
        An open store, or its path; the attachment has it as ``store``.
    model
        The model of the capture; its name or folder; or a source.
    options
        Fields of `AttachOptions`: cache, cache_bytes, tolerance.

    Raises
    ------
    MismatchError
        The model is not that of the capture; or *tolerance* is exceeded.
    ConfigError
        An option cannot be used, a model is attached already, or the model is on several processes.
    """
    chosen = validate(AttachOptions, options, "attach")
    if is_location(store) and not isinstance(store, Store):
        store = Store(store)
    if not isinstance(store, Store):
        raise ConfigError("a model is attached to a store", expected="a store, or its path", found=type(store).__name__)
    if store.attached is not None:
        raise ConfigError(
            "a model is attached to the store already",
            where=str(store.path),
            remedy="detach it: store.attached.detach()",
        )
    source = ModelSource(name=str(model)) if isinstance(model, str | Path) else model
    if isinstance(source, ModelSource):
        source = source.resolved()
    made = Attachment(store, source, chosen)
    made.check_model()
    store.set_attached(made)
    return made


class Attachment:
    """A model that is attached to a store; made by `attach`. Any number of threads may read.

    ::

        attached = flexcache.attach(store, model)
        store.read("mlp_post", 8)
        attached.detach()

    Attributes
    ----------
    store : Store
    virtual : mapping from str to tuple of int
        The virtual layers of each site.
    notes : list of str
        How recomputed rows may differ from those of the capture; empty if all were equal to the bit.
    """

    def __init__(self, store: Store, source: Any, options: AttachOptions, threads: int | None = None) -> None:
        self.store, self.options, self.notes, self._threads = store, options, list[str](), threads
        self.stored_arrays = store.arrays
        self.virtual = {name: array.virtual for name, array in store.arrays.items() if array.virtual}
        self.arrays = {
            name: replace(array, layers=tuple(sorted({*(array.layers or ()), *array.virtual})), virtual=())
            if array.virtual
            else array
            for name, array in store.arrays.items()
        }
        self._source, self._lock = source, threading.RLock()
        self._walk: Walk | None = None
        self._units = Units(store)
        self._starts = stored_starts(store.arrays)
        self._inexact = set[tuple[int, int]]()  # batches, by unit and number, whose replay was not exact
        self._detached = False
        self.cache = RowCache(self._make_folder(), options.cache_bytes)

    def __enter__(self) -> Store:
        return self.store

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __reduce__(self) -> tuple[Any, ...]:
        if not isinstance(self._source, ModelSource):
            raise ConfigError(
                "an attached model cannot be sent to another process",
                where=str(self.store.path),
                expected="a model that is attached by its name or as flexcache.ModelSource, which each worker loads",
                found=f"a loaded {type(self._source).__name__}",
                remedy='attach it by name, flexcache.attach(store, "NAME"), or read in this process (threads)',
            )
        import torch

        options = self.options.model_copy(update={"cache": self.cache.folder.parent})
        return AttachmentRecipe, (self._source, options, torch.get_num_threads())

    def __repr__(self) -> str:
        model = self._source.name if isinstance(self._source, ModelSource) else type(self._source).__name__
        layers = "; ".join(f"{site} {', '.join(map(str, layers))}" for site, layers in self.virtual.items())
        return f"<{model} attached to {self.store.path}: {layers or 'no virtual layers'}>"

    def detach(self) -> None:
        """Detach the model: virtual layers cannot be read any more. A temporary cache is removed.

        ::

            store.attached.detach()
        """
        if self.store.attached is self:
            self.store.set_attached(None)
        self._detached, self._walk = True, None
        self.cache.close()
        self._remove_folder()

    def prefetch(self, site: str, layers: Layers = "all", rows: Any = None) -> None:
        """Recompute rows of several layers in one walk up the blocks, as many layers as the cache has room for.

        ::

            store.attached.prefetch("resid_post", layers=[1, 2, 3], rows=store.rows(position=-1))

        Nothing is done if the rows of the first layer are there. Each block that is needed runs once for each batch.

        Parameters
        ----------
        rows
            Row numbers; all committed rows by default.
        """
        virtual, asked = self.virtual.get(site, ()), plain_layers(layers)
        depth = self.stored_arrays[site].depth or 0
        wanted = [layer for layer in (virtual if asked == "all" else resolve_layers(asked, depth)) if layer in virtual]
        numbers = np.unique(self.store.committed_rows if rows is None else np.asarray(rows, np.int64))
        if not wanted or not len(numbers):
            return
        by_unit = self._by_unit(numbers)
        if all(self._shard(site, wanted[0], unit).has(local) for unit, local in by_unit.items()):
            return
        kept = {unit: self._units.read(unit).kept_rows(local) for unit, local in by_unit.items()}
        needed = sum(file_bytes(local, self.arrays[site].row_bytes) for local in kept.values())
        count = max(1, int(SHARE * self.options.cache_bytes / needed))
        with self._lock:
            for unit, local in kept.items():
                keys = [(site, layer) for layer in wanted[:count]]
                self._recompute(unit, {key: self._shard(*key, unit) for key in keys}, local)

    def check_room(self, keys: Iterable[ArrayKey], rows: int) -> None:
        """Raise ConfigError if the cache cannot hold *rows* of the virtual layers among *keys*.

        ::

            store.attached.check_room([("resid_post", 8)], store.n_rows)
        """
        width = sum(self.arrays[name].row_bytes for name, layer in keys if layer in self.virtual.get(name, ()))
        if rows * width > SHARE * self.options.cache_bytes:
            raise ConfigError(
                "the cache cannot hold the recomputed rows, and they are read in random order, many times",
                where=str(self.cache.folder),
                expected=f"room for {size(rows * width)}",
                found=f"cache_bytes of {size(self.options.cache_bytes)}",
                remedy=f"attach with cache_bytes={int(rows * width / SHARE) + 1}, or write the layers to disk",
            )

    def cached_shard(self, name: str, layer: int | None, unit: int, rows: np.ndarray) -> CachedShard:
        """Return the file of a virtual shard with some of its rows there; *rows* are numbers in the unit."""
        shard = self._shard(name, layer, unit)
        if not shard.has(rows):
            with self._lock:
                self._recompute(unit, {(name, layer): shard}, self._units.read(unit).whole_batches(rows))
        self.cache.touch(shard)
        return shard

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

    def reader(self, stored: RowReader) -> RowReader:
        """Return the reader of an array that recomputes its virtual layers, from the reader of those on disk."""
        name = stored.array.name
        return VirtualReader(self, stored, self.arrays[name], self.virtual[name]) if name in self.virtual else stored

    def walk(self) -> Walk:
        """Return the model, ready to run; a worker process loads it when it is first needed."""
        if self._detached:
            raise SiteError(
                "the model that recomputes virtual layers was detached",
                where=str(self.store.path),
                remedy="attach it again: flexcache.attach(store, model)",
            )
        with self._lock:
            if self._walk is None:
                from flexcache.virtual.walk import Walk

                loaded = isinstance(self._source, ModelSource)
                model = _load(self._source, self._threads) if loaded else self._source
                self._walk = Walk(self.store, model, [self.arrays[name] for name in self.virtual])
            return self._walk

    def check_model(self) -> None:
        """Compare the model with the one of the capture, and with a tolerance, what it recomputes."""
        walk = self.walk()
        if self.options.tolerance is not None:
            from flexcache.virtual.tolerance import check_tolerance

            self.notes += check_tolerance(self.store, walk, self._units, self.options.tolerance)

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
            walk.run(segment, [unit.batches[number] for number in wanted], read, keep)
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
        now, then = self.walk().conditions, record.fingerprint
        changed = [f"{name} {then.get(name)}, now {now.get(name)}" for name in now if then.get(name) != now.get(name)]
        if changed and self.options.tolerance is not None:
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

    def _by_unit(self, rows: np.ndarray) -> dict[int, np.ndarray]:
        """Return ascending rows as numbers in their units."""
        units, starts = np.unique(rows // self.store.shard_rows, return_index=True)
        parts = np.split(rows, starts[1:])
        return {int(unit): part - int(unit) * self.store.shard_rows for unit, part in zip(units, parts, strict=True)}

    def _make_folder(self) -> Path:
        """Return the folder of this store in the cache, and remove those of earlier starts of the machine."""
        given = self.options.cache
        base = Path(tempfile.mkdtemp(prefix="flexcache-")) if given is None else given
        self._remove_folder = weakref.finalize(self, shutil.rmtree, base, True) if given is None else (lambda: None)
        identity = (self.store.provenance.created, self.store.reference.path, self.options.tolerance is not None)
        host, boot, store = (_short(text) for text in (socket.gethostname(), _boot(), repr(identity)))
        folder = base / f"{host}-{boot}-{store}"
        folder.mkdir(parents=True, exist_ok=True)
        for other in base.glob(f"{host}-*"):
            if not other.name.startswith(f"{host}-{boot}-"):
                shutil.rmtree(other, ignore_errors=True)
        return folder


@dataclass(frozen=True)
class AttachmentRecipe:
    """How a worker process attaches the model: by its source, with the number of threads that bits may depend on."""

    source: ModelSource
    options: AttachOptions
    threads: int

    def attach(self, store: Store) -> None:
        """Attach the model to an unpickled store; it is loaded when it is first needed."""
        store.set_attached(Attachment(store, self.source, self.options, self.threads))


@lru_cache(maxsize=1)
def _load(source: ModelSource, threads: int | None) -> torch.nn.Module:
    """Return the model of a source, loaded once in each process."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    return source.load()


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _boot() -> str:
    """Return a name of the current start of the machine: what the cache holds is not forced to the disk."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return ""
