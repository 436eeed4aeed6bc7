"""The stream: a torch dataset of shuffled batches, and a loader that knows where it is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import cloudpickle
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from flexcache.errors import ConfigError, StoreError, UncommittedError
from flexcache.parallel.launch import launch
from flexcache.site import Layers, plain_layers
from flexcache.spec import dtype_name, is_whole, listed
from flexcache.store.read.row_alignment import matching_rows
from flexcache.store.read.selection import layer_number, row_numbers, select
from flexcache.store.read.store import Store
from flexcache.store.storage.object_path import RemotePath
from flexcache.training.order import Ints, Order, turns
from flexcache.training.pools import ArraySource, PoolReader

RUN_BYTES, POOL_BYTES, THREADS = 256 << 10, 256 << 20, 8
SAMPLE = 64
"""Runs that a normalisation is estimated from."""
IDENTITY = {
    "seed": "seed",
    "batch_size": "batch_size",
    "run_rows": "size of runs, in rows (run_bytes)",
    "pool_rows": "size of pools, in rows (pool_bytes)",
    "unit_rows": "number of rows in a unit of the store",
    "rows_xxh3_128": "set of rows, by digest",
    "drop_last": "drop_last",
    "ranks": "number of ranks",
    "workers": "number of workers",
}
"""Entries of a state that must equal those of the stream, and what messages call them."""
TOLD = ("token_id", "position", "document")
Normalize = Literal["none", "center", "unit_norm", "standard"]
StreamBatch = torch.Tensor | dict[str, torch.Tensor]


class Stream(IterableDataset[StreamBatch]):
    """Batches of a store's rows in shuffled order, each row once an epoch; made by `stream`.

    Iterating gives one epoch, and the next iteration the next. In a `torch.utils.data.DataLoader` with
    ``batch_size=None``, workers share the rows; so do the ranks of a data-parallel group. `loader` makes a DataLoader
    that can be saved and resumed in the middle of an epoch; torchdata's ``StatefulDataLoader`` does it as well.

    Attributes
    ----------
    order : Order
    epoch : int
        The one that the next iteration gives.
    mean, scale : list of Tensor of float32, (features,)
        What the values of each source are less by, and then multiplied with; empty where not normalised.
    """

    def __init__(
        self,
        sources: Mapping[str, ArraySource],
        order: Order,
        *,
        stacked: bool,
        normalize: Normalize,
        dtype: torch.dtype | None,
        transform: Callable[[StreamBatch], StreamBatch] | None,
        told: bool,
        drop_last: bool,
        pool_bytes: int,
        keep_cache: bool,
        threads: int,
        rank: int,
        ranks: int,
    ) -> None:
        super().__init__()
        self.sources, self.order, self.epoch = dict(sources), order, 0
        self.stacked, self.told, self.drop_last, self.transform = stacked, told, drop_last, transform
        self.pool_bytes, self.keep_cache, self.threads = pool_bytes, keep_cache, threads
        self.rank, self.ranks = rank, ranks
        self.mean: list[torch.Tensor] = []
        self.scale: list[torch.Tensor] = []
        self.dtype = dtype
        self._skip = 0  # batches of this process that the next iteration leaves out
        self._of_rank = False  # whether they are of all workers of the rank, in turns
        self._saved_workers: int | None = None  # of the state that was loaded
        self._given = 0
        self._buffers: list[list[NDArray]] = []
        if normalize != "none":
            self._estimate(normalize)

    def __len__(self) -> int:
        """Batches that this rank gets in an epoch, with the workers that iterate now, or none."""
        return sum(self._totals(self.epoch, self._workers()[1]))

    def __repr__(self) -> str:
        rows, size = f"{len(self.order.rows):,} rows", f"batches of {self.order.batch_size}"
        return f"<Stream of {', '.join(self.sources)}: {rows} in {size}; next epoch {self.epoch}>"

    @property
    def bytes_per_row(self) -> int:
        """Bytes of a row of all sources, as they are stored."""
        return sum(source.row_bytes for source in self.sources.values())

    def __iter__(self) -> Iterator[StreamBatch]:
        worker, workers = self._workers()
        skip = self._skip
        if skip and self._saved_workers is not None:
            _check_same({"workers": self._saved_workers}, {"workers": workers})
        if self._of_rank:
            totals = self._totals(self.epoch, workers)
            done, then = turns(totals, skip), turns(totals, skip + 1)
            following = next((n for n in range(workers) if then[n] > done[n]), 0)
            worker = (worker + following) % workers  # a DataLoader begins with its first worker: whose turn it is
            skip = done[worker]
        consumer, consumers = self.rank * workers + worker, self.ranks * workers
        epoch, self._skip, self._of_rank, self._given = self.epoch, 0, False, skip
        pools = self.order.pools_of(epoch, consumer, consumers)
        reader = PoolReader(self.order, list(self.sources.values()), self.keep_cache, self.threads, self._buffers)
        try:
            for batch in self._batches(reader, pools, epoch, consumer, skip):
                self._given += 1
                yield batch
        finally:
            reader.close()
        self.epoch, self._given = epoch + 1, 0

    def __getstate__(self) -> dict[str, Any]:
        transform = None if self.transform is None else cloudpickle.dumps(self.transform)  # a lambda as well
        return {**self.__dict__, "_buffers": [], "transform": transform}  # a worker process has its own buffers

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.transform = None if state["transform"] is None else cloudpickle.loads(state["transform"])

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch and the batches given by this process, with everything that the order depends on.

        torchdata asks each worker for it.
        """
        return self._state(self._given, self._workers()[1], of_rank=False)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume where `state_dict`, or that of a `Loader`, was taken.

        A state of an earlier version, which has only the seed of the order, is taken as well.

        Raises
        ------
        ConfigError
            It is not the state of a stream, or that of a stream with another order: another seed, batch_size,
            run_bytes, pool_bytes, drop_last or number of ranks, or other rows.
        """
        _check_state(state)
        _check_same(state, {**self.order.describe(), "drop_last": self.drop_last, "ranks": self.ranks})
        self.epoch, self._skip, self._of_rank = int(state["epoch"]), int(state["batches"]), bool(state["of_rank"])
        self._given, self._saved_workers = self._skip, state.get("workers")

    def loader(self, num_workers: int = 0, **options: Any) -> Loader:
        """Return a DataLoader over this stream whose position can be saved; *options* are a DataLoader's."""
        return Loader(self, num_workers, **options)

    # Private

    def _state(self, batches: int, workers: int, of_rank: bool) -> dict[str, Any]:
        position = {"epoch": self.epoch, "batches": batches, "of_rank": of_rank}
        shared = {"drop_last": self.drop_last, "ranks": self.ranks, "workers": workers}
        return {**position, **self.order.describe(), **shared}

    def _batches(
        self, reader: PoolReader, pools: Sequence[Ints], epoch: int, consumer: int, skip: int
    ) -> Iterator[StreamBatch]:
        size, left = self.order.batch_size, skip * self.order.batch_size
        sizes = [int(np.diff(self.order.runs[pool], axis=1).sum()) for pool in pools]
        first = 0
        while first < len(pools) and left >= sizes[first]:
            left -= sizes[first]
            first += 1
        rest: tuple[Ints, list[torch.Tensor]] | None = None
        for number, (rows, stored) in enumerate(reader.read_pools(pools[first:]), start=first):
            arrays = [_tensor(array, source) for array, source in zip(stored, self.sources.values(), strict=True)]
            mixed = self.order.mixing_order(epoch, consumer, number, len(rows))[left:]
            left = 0
            at = 0
            if rest is not None:
                at = size - len(rest[0])
                taken = mixed[:at]
                joined = [torch.cat([old, _some(new, taken)]) for old, new in zip(rest[1], arrays, strict=True)]
                rest = (np.concatenate([rest[0], rows[taken]]), joined)
                if len(rest[0]) < size:
                    continue
                yield self._made(*rest)
                rest = None
            while at + size <= len(mixed):
                taken = mixed[at : at + size]
                yield self._made(rows[taken], [_some(array, taken) for array in arrays])
                at += size
            if at < len(mixed):
                taken = mixed[at:]
                rest = (rows[taken], [_some(array, taken) for array in arrays])
        if rest is not None and not self.drop_last:
            yield self._made(*rest)

    def _made(self, rows: Ints, tensors: list[torch.Tensor]) -> StreamBatch:
        for number, tensor in enumerate(tensors):
            if self.mean:
                tensor = (tensor.float() - self.mean[number]) * self.scale[number]
            tensors[number] = tensor if self.dtype is None else tensor.to(self.dtype)
        named = dict(zip(self.sources, tensors, strict=True))
        batch: StreamBatch = torch.stack(tensors, 1) if self.stacked else tensors[0] if len(tensors) == 1 else named
        if self.told:
            store = next(iter(self.sources.values())).store
            batch = batch if isinstance(batch, dict) else {"activations": batch}
            batch["row"] = torch.from_numpy(rows)
            for name in TOLD:
                batch[name] = torch.from_numpy(np.asarray(store.coordinates[name].values)[rows].astype(np.int64))
        return batch if self.transform is None else self.transform(batch)

    def _workers(self) -> tuple[int, int]:
        info = get_worker_info()
        return (0, 1) if info is None else (info.id, info.num_workers)

    def _totals(self, epoch: int, workers: int) -> list[int]:
        consumers = self.ranks * workers
        return [
            self.order.count_batches(epoch, self.rank * workers + worker, consumers, self.drop_last)
            for worker in range(workers)
        ]

    def _estimate(self, normalize: Normalize) -> None:
        """Set mean and scale from some runs, the same whatever the seed."""
        drawn = np.random.default_rng(0).permutation(len(self.order.runs))[:SAMPLE]
        reader = PoolReader(self.order, list(self.sources.values()), True, self.threads, [])
        try:
            _, arrays = next(iter(reader.read_pools([drawn])))
        finally:
            reader.close()
        for array, source in zip(arrays, self.sources.values(), strict=True):
            values = _tensor(array, source).double()
            mean = torch.zeros(values.shape[1]) if normalize == "unit_norm" else values.mean(0)
            away = values - mean
            if normalize == "standard":
                deviation = away.square().mean(0).sqrt()
                scale = torch.where(deviation > 0, 1 / deviation, 1.0)
            elif normalize == "unit_norm":
                scale = (values.shape[1] / away.square().sum(1).mean()).sqrt().expand(values.shape[1])
            else:
                scale = torch.ones(values.shape[1])
            self.mean.append(mean.float())
            self.scale.append(scale.float())


class Loader:
    """A DataLoader over a `Stream` that counts the batches it has given, so that it can be saved at any of them."""

    def __init__(self, stream: Stream, num_workers: int = 0, **options: Any) -> None:
        self.stream = stream
        self._loader = DataLoader(stream, batch_size=None, num_workers=num_workers, **options)
        self._workers = max(1, num_workers)
        self._start = 0
        self._given = 0

    def __iter__(self) -> Iterator[StreamBatch]:
        stream, epoch = self.stream, self.stream.epoch
        stream._skip, stream._of_rank = self._start, True
        self._given, self._start = self._start, 0
        for batch in self._loader:
            self._given += 1
            yield batch
        stream.epoch, self._given = epoch + 1, 0

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return sum(self.stream._totals(self.stream.epoch, self._workers))

    def state_dict(self) -> dict[str, Any]:
        """Return where the loader is: to be saved with the model."""
        return self.stream._state(self._given, self._workers, of_rank=True)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume where `state_dict` was taken, with as many workers and ranks.

        Raises
        ------
        ConfigError
            It is not the state of a loader, or that of one with other numbers of workers or ranks, or with another
            order (see `Stream.load_state_dict`): either would give other batches.
        """
        _check_state(state, "workers", "ranks")
        _check_same(state, {"workers": self._workers})
        if not state["of_rank"] and self._workers > 1:
            raise ConfigError(
                "the state is of one worker of several",
                expected="what state_dict() of a loader returned",
                remedy="save the loader's state_dict(), not the stream's",
            )
        self.stream.load_state_dict(state)
        self._start = self._given = int(state["batches"])


def stream(
    store: Store | Mapping[str, Store] | str | os.PathLike,
    site: str | Sequence[str],
    layer: int | None = None,
    *,
    layers: Layers | None = None,
    batch_size: int = 4096,
    seed: int = 0,
    rows: ArrayLike | None = None,
    normalize: Normalize = "none",
    dtype: Any = None,
    transform: Callable[[StreamBatch], StreamBatch] | None = None,
    return_tokens: bool = False,
    drop_last: bool = False,
    pool_bytes: int = POOL_BYTES,
    run_bytes: int = RUN_BYTES,
    keep_cache: bool | None = None,
    threads: int = THREADS,
    rank: int | None = None,
    ranks: int | None = None,
) -> Stream:
    """Return the committed rows of a store as a stream of shuffled batches.

    Rows are read in runs of *run_bytes*, in drawn order; a pool of them is mixed, and given batch by batch, while the
    next is read. The order depends on the store's rows, *seed* and the epoch alone, and on how many ranks and workers
    share them.

    Parameters
    ----------
    store
        Or its path; or several by name, over the same documents: rows are joined by document id and position, and those
        that not all stores have are left out.
    site, layer, layers
        One site and layer give tensors (batch, features). *layers* give (batch, layers, features): numbers in any
        order, or text such as ``"all"``, ``"0,8"`` or ``"8:24"``. Several sites, or stores, give dicts of tensors by
        name.
    batch_size
        Rows; the last batch of an epoch may be smaller, unless *drop_last*.
    rows
        Row numbers, each once, or a boolean mask of all rows; by default every committed one.
    normalize
        ``"center"``: less the mean. ``"standard"``: and divided by each feature's deviation. ``"unit_norm"``: scaled so
        that the mean squared norm is the number of features. Estimated from some runs; `Stream.mean` and `Stream.scale`
        say what it is.
    dtype
        A floating-point dtype of torch or numpy, or its name; by default as stored, or float32 where normalised.
    transform
        Of each batch.
    return_tokens
        Give dicts with ``activations``, and each row's ``row``, ``token_id``, ``position`` and ``document`` as well.
    pool_bytes
        Memory for a pool; three are alive at times: the one that is given, the next, and one batch.
    keep_cache
        Whether pages that were read stay in the page cache; by default where all of them fit into a quarter of memory.
    rank, ranks
        Of a data-parallel group; by default those of the launcher, or of torch.distributed.

    Raises
    ------
    SiteError
        A site or layer that a store does not have.
    UncommittedError
        *rows* names rows that are not committed.
    ConfigError, StoreError
        Arguments that cannot be used; a row or layer given twice, or none; stores without common rows; *drop_last*
        where no rank has a whole batch.
    """
    if isinstance(store, str | bytes | os.PathLike | RemotePath):
        store = Store(store)
    stores: Mapping[str, Store] = {"": store} if isinstance(store, Store) else store  # a store is a mapping as well
    if not all(is_whole(n) and n >= 1 for n in (batch_size, pool_bytes, run_bytes, threads)):
        raise ConfigError("batch_size, pool_bytes, run_bytes and threads are whole numbers of at least 1")
    if not is_whole(seed) or seed < 0:
        raise ConfigError("seed is a whole number of at least 0", found=repr(seed))
    if not isinstance(stores, Mapping) or not stores or not all(isinstance(one, Store) for one in stores.values()):
        raise ConfigError(
            "that is no store", expected="a store, its path, or a dict of stores by name", found=repr(store)
        )
    if transform is not None and not callable(transform):
        raise ConfigError("transform is a function of a batch", found=repr(transform))
    if layers is not None and layer is not None:
        raise ConfigError("layer and layers are both given", remedy="leave one of them out")
    if normalize not in ("none", "center", "unit_norm", "standard"):
        raise ConfigError(f"there is no normalisation {normalize!r}", expected="none, center, unit_norm or standard")
    first = next(iter(stores.values()))
    chosen = _chosen(first, rows)
    sources: dict[str, ArraySource] = {}
    sites = listed(site, str, "site")
    if not sites:
        raise ConfigError("no site is given", expected=f"one or several of {', '.join(first.sites)}", found=repr(site))
    for name, one in stores.items():
        match = None
        if one is not first:
            match = _match(first, one)
            chosen = chosen[match[chosen] >= 0]
            there = np.isin(match[chosen] // one.shard_rows, one.committed_units)
            chosen = chosen[there]
        for at in sites:
            for number in [layer] if layers is None else _numbers(one, at, layers):
                found = layer_number(one.reader(at).array, number, one.path)
                parts = [name] * bool(name) + [at] * (len(sites) > 1 or not name)
                parts += [str(found)] * (layers is not None)
                key = ".".join(parts)
                if key in sources:
                    raise ConfigError("a site or layer is given twice", found=key, remedy="give each once")
                sources[key] = ArraySource(one, at, found, match)
    if not len(chosen):
        raise StoreError("there are no rows to stream", where=str(first.path))
    mine, all_of = _group(rank, ranks)
    if drop_last and len(chosen) < batch_size * all_of:  # else a loop over epochs waits for a batch for ever
        raise ConfigError(
            "an epoch has no whole batch, and others are dropped",
            where=str(first.path),
            expected=f"at least {batch_size * all_of:,} rows: batches of {batch_size:,} on {all_of} ranks",
            found=f"{len(chosen):,}",
            remedy="lower batch_size, or keep the last batch: drop_last=False",
        )
    width = sum(source.row_bytes for source in sources.values())
    order = Order(
        rows=chosen,
        unit_rows=first.shard_rows,
        run_rows=max(1, int(run_bytes) // width),
        pool_rows=max(1, int(pool_bytes) // width),
        batch_size=int(batch_size),
        seed=int(seed),
    )
    if keep_cache is None:
        keep_cache = len(chosen) * width < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 4
    return Stream(
        sources,
        order,
        stacked=layers is not None and len(sites) == 1 and len(stores) == 1,
        normalize=normalize,
        dtype=_dtype(dtype),
        transform=transform,
        told=return_tokens,
        drop_last=bool(drop_last),
        pool_bytes=pool_bytes,
        keep_cache=keep_cache,
        threads=threads,
        rank=mine,
        ranks=all_of,
    )


def _check_state(state: Any, *more: str) -> None:
    """Raise ConfigError if a value is not the state of a stream, or lacks *more* entries."""
    names = ("epoch", "batches", "seed", "of_rank", *more)
    missing = [name for name in names if not isinstance(state, Mapping) or name not in state]
    counts = () if missing else (state["epoch"], state["batches"])
    if missing or not all(is_whole(count) and count >= 0 for count in counts):
        found = f"{type(state).__name__} {state!r}"
        raise ConfigError(
            "that is not a state to resume from",
            expected=f"what state_dict() returned: a dict with {', '.join(names)}",
            found=found if len(found) <= 200 else f"{found[:200]}…",
            remedy="save state_dict() of the stream or loader, and load the same",
        )


def _check_same(state: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Raise ConfigError if an entry of *state* differs; entries that it lacks are of an earlier version."""
    for name, value in mine.items():
        if name in state and state[name] != value:
            raise ConfigError(
                f"the state is of another {IDENTITY[name]}",
                expected=f"{state[name]}, as in the state",
                found=str(value),
                remedy="make the stream and its loader with the rows and arguments of when the state was saved",
            )


def _numbers(store: Store, site: str, layers: Layers) -> list[int | None]:
    """Return the layers of a site that are asked for, in the order in which they are asked for."""
    asked = plain_layers(layers)
    if isinstance(asked, str):  # those of a range that the store has
        return [layer for array in select(store, site, asked) if array.name == site for layer in array.slices]
    if asked == []:
        raise ConfigError(
            "no layer is given", expected=f"some of {', '.join(map(str, store.layers(site)))}", found="[]"
        )
    return list(asked) if isinstance(asked, list) else [asked]


def _dtype(dtype: Any) -> torch.dtype | None:
    if dtype is None:
        return None
    name = dtype_name(dtype)
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(
            "dtype cannot be read",
            expected="a floating-point dtype of torch or numpy, or its name: bfloat16, float16, float32 or float64",
            found=repr(dtype),
        )
    return found


def _chosen(store: Store, rows: ArrayLike | None) -> Ints:
    if rows is None:
        return store.committed_rows
    try:
        given = row_numbers(rows, store.n_rows, store.path)
    except (IndexError, ValueError) as error:
        raise ConfigError(
            "rows cannot be read",
            where=str(store.path),
            expected=f"row numbers from 0 to {store.n_rows - 1}, or a boolean mask of {store.n_rows} entries",
            found=str(error),
        ) from None
    wanted = np.unique(given)
    if len(wanted) < len(given):
        raise ConfigError(
            "rows has a row more than once, and an epoch gives each row once",
            where=str(store.path),
            expected="row numbers, each once, or a boolean mask",
            found=f"{len(given):,} numbers of {len(wanted):,} rows",
            remedy="convert a mask of 0 and 1 with mask.astype(bool), and numbers with numpy.unique(rows)",
        )
    missing = wanted[~store.committed[wanted // store.shard_rows]]
    if len(missing):
        raise UncommittedError(
            f"{len(missing)} of the rows are not committed, the first is row {missing[0]}",
            where=str(store.path),
            remedy="complete the capture, or leave rows out to stream what is there",
        )
    return wanted


def _match(first: Store, other: Store) -> Ints:
    """Return the row of *other* for each row of *first*, −1 where it has none."""
    return matching_rows(other, first)


def _group(rank: int | None, ranks: int | None) -> tuple[int, int]:
    if (rank is None) != (ranks is None):
        raise ConfigError("rank and ranks are given together")
    if rank is not None and ranks is not None:
        if not is_whole(rank) or not is_whole(ranks):
            raise ConfigError("rank and ranks are whole numbers", found=f"{rank!r} and {ranks!r}")
        if not 0 <= rank < ranks:
            raise ConfigError("rank is a number below ranks", expected=f"0 to {ranks - 1}", found=str(rank))
        return int(rank), int(ranks)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    place = launch()
    return place.rank, place.world


def _some(rows: torch.Tensor, chosen: Ints) -> torch.Tensor:
    """Return a copy of some rows; torch copies them in several threads."""
    return rows.index_select(0, torch.from_numpy(chosen))


def _tensor(bits: NDArray, source: ArraySource) -> torch.Tensor:
    """Return stored bits as a tensor of the stored dtype, without a copy."""
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    signed = bits.view(np.int16 if bits.dtype.itemsize == 2 else np.int32)
    return torch.from_numpy(signed).view(dtype["float32" if source.scaled else source.store.arrays[source.site].dtype])
