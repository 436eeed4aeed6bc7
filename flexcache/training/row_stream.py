"""A torch dataset of shuffled batches, and a loader that can be saved in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import cloudpickle
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from flexcache.errors import ConfigError
from flexcache.store.storage.backend import disk_path
from flexcache.training.normalization import Normalize, as_tensor, estimate_normalization
from flexcache.training.order import Ints, Order
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

    The ranks of a data-parallel group share each batch. In a `torch.utils.data.DataLoader` with ``batch_size=None``,
    workers give batches in turns. `loader` makes a DataLoader that can be saved and resumed in the middle of an epoch;
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
        self._next = 0  # batch of the epoch that the next iteration starts with
        self._given = 0  # batches of the epoch that precede the next one of this iteration
        self._saved_worker: list[int] | None = None  # worker, and number of workers, of the loaded state
        self._buffers: list[list[NDArray]] = []
        if normalize != "none":
            self.mean, self.scale = estimate_normalization(order, list(sources.values()), self.threads, normalize)

    def __repr__(self) -> str:
        rows, size = f"{len(self.order.rows):,} rows", f"batches of {self.order.batch_size // self.ranks}"
        return f"<Stream of {', '.join(self.sources)}: {rows} in {size}; next epoch {self.epoch}>"

    @property
    def bytes_per_row(self) -> int:
        """Bytes of a row over all sources, as stored."""
        return sum(source.row_bytes for source in self.sources.values())

    def __iter__(self) -> Iterator[StreamBatch]:
        return (batch for batch in self.iterate(in_parts=False) if batch is not None)

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return self.order.count_batches(self.drop_last, self.rank, self.ranks)

    def iterate(self, *, in_parts: bool) -> Iterator[StreamBatch | None]:
        """Yield the rest of an epoch as far as this worker gives it, and None for a batch of which it has no row.

        Parameters
        ----------
        in_parts
            Each worker of a DataLoader gives a part of every batch of the rank, and reads no more than that part;
            otherwise workers give whole batches in turns, and each reads the rows of all.
        """
        worker, workers = _worker_share()
        parts, turns = (workers, 1) if in_parts else (1, workers)
        if self._saved_worker is not None:
            check_same_order({"worker": self._saved_worker}, {"worker": [worker, workers]})
        first = self._next * workers if self._saved_worker is not None else self._next
        first += worker if turns > 1 else 0
        consumer = self.rank * parts + (worker if in_parts else 0)
        epoch, self._next, self._saved_worker = self.epoch, 0, None
        count = self.order.count_batches(self.drop_last)
        reader = PoolReader(self.order.rows, list(self.sources.values()), self.keep_cache, self.threads, self._buffers)
        try:
            number = first
            pools = self.order.read_pools(epoch, consumer, self.ranks * parts, first)
            for pool, rows, stored in reader.read_pools(pools):
                arrays = [as_tensor(array, source) for array, source in zip(stored, self.sources.values(), strict=True)]
                for chosen in pool.batches:
                    if number < count and (number - first) % turns == 0:
                        self._given = number // turns + 1
                        tensors = [_select_rows(array, chosen) for array in arrays]
                        yield self._make_batch(rows[chosen], tensors) if len(chosen) else None
                    number += 1
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
        """Return the epoch, the number of batches given, and everything that the order depends on.

        torchdata calls this in each worker; then the number is that of the batches of the worker.
        """
        worker, workers = _worker_share()
        return self._state(self._given, [worker, workers] if workers > 1 else None)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a state of `state_dict`, or of `Loader.state_dict`, with any number of ranks and workers.

        Raises
        ------
        ConfigError
            The value is not the state of a stream, or the stream has another order: another seed, number of rows in the
            batches of all ranks together, run_bytes, pool_bytes or drop_last, or other rows.
        """
        check_state(state)
        check_same_order(state, {**self.order.describe(), "drop_last": self.drop_last})
        self.epoch, self._next, self._saved_worker = int(state["epoch"]), int(state["batches"]), state["worker"]
        self._given = self._next

    def loader(self, num_workers: int = 0, **options: Any) -> Loader:
        """Return a DataLoader over this stream whose position can be saved; *options* go to the DataLoader.

        Workers start by spawn if a store is on object storage, whose clients do not survive a fork. Each worker reads a
        part of every batch; with a transform, ``collate_fn`` or ``pin_memory``, which need whole batches, each gives
        batches in turn and reads all rows.

        ::

            loader = stream.loader(num_workers=4)
            torch.save(loader.state_dict(), "position.pt")
        """
        if num_workers and any(disk_path(source.store.path) is None for source in self.sources.values()):
            options.setdefault("multiprocessing_context", "spawn")
        return Loader(self, num_workers, **options)

    def _state(self, batches: int, worker: list[int] | None) -> dict[str, Any]:
        position = {"epoch": self.epoch, "batches": batches, "worker": worker}
        return {**position, **self.order.describe(), "drop_last": self.drop_last}

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


class BatchParts(IterableDataset[StreamBatch | None]):
    """The parts of the batches of a stream that a worker of a DataLoader reads."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self.stream = stream

    def __iter__(self) -> Iterator[StreamBatch | None]:
        return self.stream.iterate(in_parts=True)


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
        whole = stream.transform is not None or options.get("pin_memory") or options.get("collate_fn") is not None
        self._parts = 1 if whole else max(1, num_workers)  # parts of a batch that arrive one after the other
        dataset = BatchParts(stream) if self._parts > 1 else stream
        self._loader = DataLoader(dataset, batch_size=None, num_workers=num_workers, **options)
        self._start = 0
        self._given = 0

    def __iter__(self) -> Iterator[StreamBatch]:
        stream, epoch = self.stream, self.stream.epoch
        stream._next, stream._saved_worker = self._start, None
        self._given, self._start = self._start, 0
        parts = iter(self._loader)
        try:
            while arrived := list(islice(parts, self._parts)):
                self._given += 1
                if found := [part for part in arrived if part is not None]:
                    yield _join(found)
        finally:
            stream._next = 0
        stream.epoch, self._given = epoch + 1, 0

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return len(self.stream)

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the loader, to be saved with the model."""
        return self.stream._state(self._given, None)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a state of `state_dict`, with any number of workers and ranks.

        Raises
        ------
        ConfigError
            The value is not the state of a loader, or the order differs (see `Stream.load_state_dict`), which would
            give other batches.
        """
        self.stream.load_state_dict(state)
        if state["worker"] is not None:
            raise ConfigError(
                "the state is of one worker of several",
                expected="what state_dict() of a loader returned",
                remedy="save the loader's state_dict(), not the stream's",
            )
        self._start = self._given = int(state["batches"])


def _worker_share() -> tuple[int, int]:
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


def _join(parts: list[StreamBatch]) -> StreamBatch:
    """Return the parts of a batch as one."""
    if len(parts) == 1:
        return parts[0]
    named = [part for part in parts if isinstance(part, dict)]
    if named:
        return {name: torch.cat([part[name] for part in named]) for name in named[0]}
    return torch.cat([part for part in parts if isinstance(part, torch.Tensor)])


def _select_rows(rows: torch.Tensor, chosen: Ints) -> torch.Tensor:
    """Return a copy of the chosen rows; torch copies in several threads."""
    return rows.index_select(0, torch.from_numpy(chosen))
