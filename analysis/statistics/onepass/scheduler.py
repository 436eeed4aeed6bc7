"""Run tasks in threads of this process, worker processes of this machine, or a cluster given by its address."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import dask.local
import dask.threaded
from dask.callbacks import Callback
from rich.console import Console
from threadpoolctl import threadpool_limits

from analysis.progress import bar
from flexcache.errors import AnalysisError, ConfigError, nearest

TIMEOUT = 10
"""Seconds to wait for the answer of a scheduler."""
LOCAL = ("threads", "synchronous", "processes")


@dataclass(frozen=True)
class Scheduler:
    """Run Dask graphs, with BLAS limited to one thread so that products have the same bits everywhere."""

    name: Any
    workers: int

    def run_graph(self, graph: dict[Any, Any], keys: list[Any], what: str, tasks: int, progress: bool) -> list[Any]:
        """Return the values of *keys*.

        Raises
        ------
        AnalysisError
            No scheduler answers at the address, or it lost its workers.
        """
        if self.name in ("threads", "synchronous"):
            with _bar(what, tasks, progress) as advance, threadpool_limits(1), _Counter(advance):
                options = {"num_workers": self.workers} if self.name == "threads" else {}
                getter = dask.threaded.get if self.name == "threads" else dask.local.get_sync
                return list(getter(graph, keys, **options))
        with _client(self.name, self.workers) as client:
            if progress:
                Console(stderr=True).print(f"dashboard: {client.dashboard_link}", style="dim", highlight=False)
            with _bar(what, len(keys), progress) as advance:
                return _gather(client, graph, keys, advance)


def choose_scheduler(name: str | Any = "threads", workers: int | None = None) -> Scheduler:
    """Return a scheduler by name, address or client.

    Raises
    ------
    ConfigError
        The name is not a known scheduler, or *workers* is less than 1.
    """
    if isinstance(name, str) and name not in LOCAL and "://" not in name:
        raise ConfigError(
            f"there is no scheduler {name!r}",
            expected=f"{', '.join(LOCAL)}, or an address such as tcp://head:8786",
            remedy=nearest(name, LOCAL),
        )
    if workers is not None and workers < 1:
        raise ConfigError("there must be a worker", expected="workers of at least 1", found=str(workers))
    return Scheduler(name, workers or os.cpu_count() or 1)


class _Counter(Callback):
    """Count shards as they are completed."""

    def __init__(self, advance: Any) -> None:
        def after(key: Any, *_: Any) -> None:
            if isinstance(key, tuple) and str(key[0]).startswith("shard"):
                advance()

        super().__init__(posttask=after)


@contextmanager
def _client(name: Any, workers: int) -> Iterator[Any]:
    try:
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise ConfigError(
            "worker processes and clusters need dask's distributed",
            found=str(error),
            remedy="pip install 'flexcache-activations[cluster]', or scheduler threads",
        ) from error
    if not isinstance(name, str):
        yield name
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Port .* is already in use")
        if name == "processes":
            with (
                LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=":0") as cluster,
                Client(cluster) as client,
            ):
                yield client
            return
        try:
            client = Client(name, timeout=TIMEOUT)
        except (OSError, TimeoutError, ValueError) as error:
            raise AnalysisError(
                f"there is no scheduler at {name}",
                found=f"{type(error).__name__}: {error}",
                remedy="start one with  dask scheduler,  workers with  dask worker ADDRESS,  and give its address",
            ) from error
        with client:
            yield client


def _gather(client: Any, graph: dict[Any, Any], keys: list[Any], advance: Any) -> list[Any]:
    from distributed import KilledWorker, as_completed

    client.run(_single_thread)
    futures = client.get(graph, keys, sync=False)
    try:
        for _ in as_completed(futures):
            advance()
        return list(client.gather(futures))
    except KilledWorker as error:
        raise AnalysisError(
            "workers died while they read a shard",
            found=str(error).splitlines()[0],
            remedy="see the logs of the workers; the usual cause is too little memory: use fewer layers, groups or"
            " statistics, or larger workers",
        ) from error


def _single_thread() -> None:
    threadpool_limits(1)


@contextmanager
def _bar(what: str, total: int, show: bool) -> Iterator[Any]:
    with bar(show) as bars:
        task = bars.add_task(what, total=total)
        yield lambda: bars.advance(task)
