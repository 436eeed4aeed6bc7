"""Attach a model to a store, so that its virtual layers can be read."""

from __future__ import annotations

import hashlib
import shutil
import socket
import tempfile
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema

from flexcache.errors import ConfigError, SiteError
from flexcache.model import ModelSource
from flexcache.recording.run_options import parse_bytes
from flexcache.site import Layers, plain_layers, resolve_layers
from flexcache.store.format.text import size
from flexcache.store.read.selection import ArrayKey, row_numbers
from flexcache.store.read.shard_reader import RowReader
from flexcache.store.read.store import Store
from flexcache.store.storage.location import StoreLocation, is_location
from flexcache.validation import Options, validate
from flexcache.virtual.cache import SHARE, CachedShard, RowCache, file_bytes
from flexcache.virtual.reader import VirtualReader
from flexcache.virtual.recomputation import Recomputation

if TYPE_CHECKING:
    import torch

    from flexcache.virtual.walk import Walk

DEFAULT_CACHE = 4 << 30
"""Bytes of recomputed rows on disk."""


class AttachOptions(Options):
    """Options of an attached model: its cache of recomputed rows, and differences from the capture to accept.

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


class Attachment(Recomputation):
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

    def __init__(self, store: Store, source: Any, options: AttachOptions) -> None:
        self.options, self._source, self._detached = options, source, False
        cache = RowCache(self._make_folder(store), options.cache_bytes)
        super().__init__(store, cache, self._load_walk, options.tolerance is not None)

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
        options = self.options.model_copy(update={"cache": self.cache.folder.parent})
        return AttachmentRecipe, (self._source, options)

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
            Row numbers; all committed rows by default. Rows that are not committed are left out.

        Raises
        ------
        MismatchError
            Recomputed rows are not those of the capture.
        """
        virtual, asked = self.virtual.get(site, ()), plain_layers(layers)
        if not virtual:
            return
        depth = self.arrays[site].depth or 0
        wanted = [layer for layer in (virtual if asked == "all" else resolve_layers(asked, depth)) if layer in virtual]
        every = self.store.committed_rows
        numbers = every if rows is None else np.unique(row_numbers(rows, self.store.n_rows, self.store.path))
        by_unit = self._by_unit(numbers)
        if not wanted or all(self.has_rows(site, wanted[0], unit, local) for unit, local in by_unit.items()):
            return
        kept = {unit: self._units.read(unit).kept_rows(local) for unit, local in by_unit.items()}
        needed = sum(file_bytes(local, self.arrays[site].row_bytes) for local in kept.values())
        self.recompute_layers(site, wanted[: max(1, int(SHARE * self.options.cache_bytes / needed))], kept)

    def cached_shard(self, name: str, layer: int | None, unit: int, rows: np.ndarray) -> CachedShard:
        """Return the file of a virtual shard with some of its rows there; *rows* are numbers in the unit."""
        if self._detached:
            raise SiteError(
                "the model that recomputes virtual layers was detached",
                where=str(self.store.path),
                remedy="attach it again: flexcache.attach(store, model)",
            )
        return super().cached_shard(name, layer, unit, rows)

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

    def reader(self, stored: RowReader) -> RowReader:
        """Return the reader of an array that recomputes its virtual layers, from the reader of those on disk."""
        name = stored.array.name
        return VirtualReader(self, stored, self.arrays[name], self.virtual[name]) if name in self.virtual else stored

    def _load_walk(self) -> Walk:
        """Return the model, ready to run; a worker process loads it when it is first needed."""
        from flexcache.virtual.walk import Walk

        model = _load(self._source) if isinstance(self._source, ModelSource) else self._source
        return Walk(self.store, model, [self.arrays[name] for name in self.virtual])

    def check_model(self) -> None:
        """Compare the model with the one of the capture, and with a tolerance, what it recomputes."""
        walk = self.walk()
        if self.options.tolerance is not None:
            from flexcache.virtual.tolerance import check_tolerance

            self.notes += check_tolerance(self.store, walk, self._units, self.options.tolerance)

    def _by_unit(self, rows: np.ndarray) -> dict[int, np.ndarray]:
        """Return ascending rows as numbers in their units, of committed units."""
        rows = rows[self.store.committed[rows // self.store.shard_rows]]
        units, starts = np.unique(rows // self.store.shard_rows, return_index=True)
        parts = np.split(rows, starts[1:])
        return {int(unit): part - int(unit) * self.store.shard_rows for unit, part in zip(units, parts, strict=True)}

    def _make_folder(self, store: Store) -> Path:
        """Return the folder of this store in the cache, and remove those of earlier starts of the machine."""
        given = self.options.cache
        base = Path(tempfile.mkdtemp(prefix="flexcache-")) if given is None else given
        self._remove_folder = weakref.finalize(self, shutil.rmtree, base, True) if given is None else (lambda: None)
        identity = (store.provenance.created, store.reference.path, self.options.tolerance is not None)
        host, boot, content = (_short(text) for text in (socket.gethostname(), _boot(), repr(identity)))
        folder = base / f"{host}-{boot}-{content}"
        folder.mkdir(parents=True, exist_ok=True)
        for other in base.glob(f"{host}-*"):
            if not other.name.startswith(f"{host}-{boot}-"):
                shutil.rmtree(other, ignore_errors=True)
        return folder


@dataclass(frozen=True)
class AttachmentRecipe:
    """Source and options with which a worker process attaches the model."""

    source: ModelSource
    options: AttachOptions

    def attach(self, store: Store) -> None:
        """Attach the model to an unpickled store; it is loaded when it is first needed."""
        store.set_attached(Attachment(store, self.source, self.options))


@lru_cache(maxsize=1)
def _load(source: ModelSource) -> torch.nn.Module:
    """Return the model of a source, loaded once in each process."""
    return source.load()


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _boot() -> str:
    """Return a name of the current start of the machine: what the cache holds is not forced to the disk."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return ""
