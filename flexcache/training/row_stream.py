"""A torch dataset of shuffled batches, and a loader that can be saved in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import cloudpickle
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from flexcache.errors import ConfigError
from flexcache.store.storage.backend import disk_path
from flexcache.training.normalization import Normalize, as_tensor, estimate_normalization
from flexcache.training.order import Ints, Order, turns
from flexcache.training.pools import ArraySource, PoolReader
from flexcache.training.reader_options import ReaderOptions
from flexcache.training.stream_state import check_same_order, check_state

TOKEN_COORDINATES = ("token_id", "position", "document")
StreamBatch = torch.Tensor | dict[str, torch.Tensor]


class Stream(IterableDataset[StreamBatch]):
    """Shuffled batches of the rows of a store, each row once per epoch; made by `stream`.

    ::

        stream = flexcache.training.stream(store, "resid_post", layer=12)
        for batch in stream:            # one epoch; the next loop gives the next one
            train_step(batch)

    In a `torch.utils.data.DataLoader` with ``batch_size=None``, workers share the rows, and so do the ranks of a
    data-parallel group. `loader` makes a DataLoader that can be saved and resumed in the middle of an epoch;
    torchdata's ``StatefulDataLoader`` can do that as well.

    Attributes
    ----------
    order : Order
    epoch : int
        The epoch that the next iteration gives.
    mean, scale : list of Tensor of float32, (features,)
        Mean (subtracted) and scale (multiplied) of each source; empty if not normalised.
    """

    def __init__(
        self,
        sources: Mapping[str, ArraySource],
        order: Order,
        reading: ReaderOptions,
        *,
        stacked: bool,
        normalize: Normalize,
        dtype: torch.dtype | None,
        transform: Callable[[StreamBatch], StreamBatch] | None,
        return_tokens: bool,
        drop_last: bool,
    ) -> None:
        super().__init__()
        self.sources, self.order, self.epoch = dict(sources), order, 0
        self.stacked, self.return_tokens, self.drop_last, self.transform = stacked, return_tokens, drop_last, transform
        self.keep_cache, self.threads = bool(reading.keep_cache), reading.threads
        self.rank, self.ranks = reading.rank or 0, reading.ranks or 1
        self.mean: list[torch.Tensor] = []
        self.scale: list[torch.Tensor] = []
        self.dtype = dtype
        self._skip = 0  # batches that the next iteration leaves out
        self._of_rank = False  # True if they count the batches of all workers of the rank, in turns
        self._saved_workers: int | None = None  # number of workers in the loaded state
        self._given = 0
        self._buffers: list[list[NDArray]] = []
        if normalize != "none":
            self.mean, self.scale = estimate_normalization(order, list(sources.values()), self.threads, normalize)

    def __len__(self) -> int:
        """Number of batches that this rank gets in an epoch, with the current number of workers."""
        return sum(self._count_batches(self.epoch, self._worker_share()[1]))

    def __repr__(self) -> str:
        rows, size = f"{len(self.order.rows):,} rows", f"batches of {self.order.batch_size}"
        return f"<Stream of {', '.join(self.sources)}: {rows} in {size}; next epoch {self.epoch}>"

    @property
    def bytes_per_row(self) -> int:
        """Bytes of a row over all sources, as stored."""
        return sum(source.row_bytes for source in self.sources.values())

    def __iter__(self) -> Iterator[StreamBatch]:
        worker, workers = self._worker_share()
        skip = self._skip
        if skip and self._saved_workers is not None:
            check_same_order({"workers": self._saved_workers}, {"workers": workers})
        if self._of_rank:
            totals = self._count_batches(self.epoch, workers)
            done, then = turns(totals, skip), turns(totals, skip + 1)
            following = next((n for n in range(workers) if then[n] > done[n]), 0)
            worker = (worker + following) % workers  # a DataLoader starts with worker 0: it takes the next turn
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
        transform = None if self.transform is None else cloudpickle.dumps(self.transform)  # may be a lambda
        return {**self.__dict__, "_buffers": [], "transform": transform}  # a worker process has its own buffers

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.transform = None if state["transform"] is None else cloudpickle.loads(state["transform"])

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, the number of batches given by this process, and everything that the order depends on.

        torchdata calls this in each worker.
        """
        return self._state(self._given, self._worker_share()[1], of_rank=False)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a state of `state_dict`, or of `Loader.state_dict`.

        States of earlier versions, which hold only the seed of the order, are accepted as well.

        Raises
        ------
        ConfigError
            The value is not the state of a stream, or the stream has another order: another seed, batch_size,
            run_bytes, pool_bytes, drop_last or number of ranks, or other rows.
        """
        check_state(state)
        check_same_order(state, {**self.order.describe(), "drop_last": self.drop_last, "ranks": self.ranks})
        self.epoch, self._skip, self._of_rank = int(state["epoch"]), int(state["batches"]), bool(state["of_rank"])
        self._given, self._saved_workers = self._skip, state.get("workers")

    def loader(self, num_workers: int = 0, **options: Any) -> Loader:
        """Return a DataLoader over this stream whose position can be saved; *options* go to the DataLoader.

        Workers start by spawn if a store is on object storage, whose clients do not survive a fork.

        ::

            loader = stream.loader(num_workers=4)
            torch.save(loader.state_dict(), "position.pt")
        """
        if num_workers and any(disk_path(source.store.path) is None for source in self.sources.values()):
            options.setdefault("multiprocessing_context", "spawn")
        return Loader(self, num_workers, **options)

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
        left_over: tuple[Ints, list[torch.Tensor]] | None = None
        for number, (rows, stored) in enumerate(reader.read_pools(pools[first:]), start=first):
            arrays = [as_tensor(array, source) for array, source in zip(stored, self.sources.values(), strict=True)]
            mixed = self.order.mixing_order(epoch, consumer, number, len(rows))[left:]
            left = 0
            at = 0
            if left_over is not None:
                at = size - len(left_over[0])
                chosen = mixed[:at]
                pairs = zip(left_over[1], arrays, strict=True)
                joined = [torch.cat([old, _select_rows(new, chosen)]) for old, new in pairs]
                left_over = (np.concatenate([left_over[0], rows[chosen]]), joined)
                if len(left_over[0]) < size:
                    continue
                yield self._make_batch(*left_over)
                left_over = None
            while at + size <= len(mixed):
                chosen = mixed[at : at + size]
                yield self._make_batch(rows[chosen], [_select_rows(array, chosen) for array in arrays])
                at += size
            if at < len(mixed):
                chosen = mixed[at:]
                left_over = (rows[chosen], [_select_rows(array, chosen) for array in arrays])
        if left_over is not None and not self.drop_last:
            yield self._make_batch(*left_over)

    def _make_batch(self, rows: Ints, tensors: list[torch.Tensor]) -> StreamBatch:
        for number, tensor in enumerate(tensors):
            if self.mean:
                tensor = (tensor.float() - self.mean[number]) * self.scale[number]
            tensors[number] = tensor if self.dtype is None else tensor.to(self.dtype)
        named = dict(zip(self.sources, tensors, strict=True))
        batch: StreamBatch = torch.stack(tensors, 1) if self.stacked else tensors[0] if len(tensors) == 1 else named
        if self.return_tokens:
            store = next(iter(self.sources.values())).store
            batch = batch if isinstance(batch, dict) else {"activations": batch}
            batch["row"] = torch.from_numpy(rows)
            for name in TOKEN_COORDINATES:
                batch[name] = torch.from_numpy(np.asarray(store.coordinates[name].values)[rows].astype(np.int64))
        return batch if self.transform is None else self.transform(batch)

    def _worker_share(self) -> tuple[int, int]:
        info = get_worker_info()
        return (0, 1) if info is None else (info.id, info.num_workers)

    def _count_batches(self, epoch: int, workers: int) -> list[int]:
        consumers = self.ranks * workers
        return [
            self.order.count_batches(epoch, self.rank * workers + worker, consumers, self.drop_last)
            for worker in range(workers)
        ]


class Loader:
    """A DataLoader over a `Stream` that can be saved after any batch and resumed there.

    ::

        loader = stream.loader(num_workers=4)
        for batch in loader:
            ...
            state = loader.state_dict()         # save it together with the model
        again.loader(num_workers=4).load_state_dict(state)
    """

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
        """Number of batches in an epoch."""
        return sum(self.stream._count_batches(self.stream.epoch, self._workers))

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the loader, to be saved with the model."""
        return self.stream._state(self._given, self._workers, of_rank=True)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a state of `state_dict`, with the same number of workers and ranks.

        Raises
        ------
        ConfigError
            The value is not the state of a loader, or the number of workers or ranks or the order differs (see
            `Stream.load_state_dict`), which would give other batches.
        """
        check_state(state, "workers", "ranks")
        check_same_order(state, {"workers": self._workers})
        if not state["of_rank"] and self._workers > 1:
            raise ConfigError(
                "the state is of one worker of several",
                expected="what state_dict() of a loader returned",
                remedy="save the loader's state_dict(), not the stream's",
            )
        self.stream.load_state_dict(state)
        self._start = self._given = int(state["batches"])


def _select_rows(rows: torch.Tensor, chosen: Ints) -> torch.Tensor:
    """Return a copy of the chosen rows; torch copies in several threads."""
    return rows.index_select(0, torch.from_numpy(chosen))
