"""Run the batches of a sweep on Dask workers, each of which loads the model once."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context

import cloudpickle
import torch

from analysis.replay.engine.engine import Engine
from analysis.replay.sweeps.arguments import ModelLoader
from analysis.replay.sweeps.batch_result import BatchResult, run_batch
from analysis.replay.sweeps.sweep_plan import SweepPlan
from flexcache.errors import AnalysisError
from flexcache.recording.forward.batch import Batch
from flexcache.store.read.store import Store
from flexcache.store.storage.location import StoreLocation


def run_batches_on_workers(
    store: StoreLocation,
    load: ModelLoader,
    plan: SweepPlan,
    batches: list[Batch],
    scheduler: str,
    workers: int,
    accept: Collection[str],
) -> Iterator[tuple[Batch, BatchResult]]:
    """Yield each batch with its result as Dask workers finish it; see `analysis.replay.sweep`.

    Raises
    ------
    AnalysisError
        There is no such scheduler.
    """
    task = cloudpickle.dumps((str(store), load, plan, tuple(accept), torch.get_num_threads()))
    if scheduler == "processes":
        from dask.base import compute
        from dask.delayed import delayed

        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            for first in range(0, len(batches), workers):
                together = batches[first : first + workers]
                work = [delayed(run_batch_on_worker)(task, batch) for batch in together]
                parts = compute(*work, scheduler="processes", num_workers=workers, chunksize=1, pool=pool)
                yield from zip(together, parts, strict=True)
    elif "://" in scheduler:
        try:
            from distributed import Client, as_completed
        except ImportError as error:
            raise AnalysisError(
                "a Dask cluster needs the package distributed", found=str(error), remedy="pip install distributed"
            ) from error

        with Client(scheduler) as client:
            futures = {client.submit(run_batch_on_worker, task, batch, pure=False): batch for batch in batches}
            for future in as_completed(list(futures)):
                yield futures[future], future.result()
    else:
        raise AnalysisError(f"there is no scheduler {scheduler!r}", expected='"processes", or an address "tcp://…"')


def run_batch_on_worker(task: bytes, batch: Batch) -> BatchResult:
    """Return the result of one batch; the engine is kept for the next batch."""
    engine, plan = _engine(task)
    return run_batch(engine, plan, batch)


@lru_cache(maxsize=1)
def _engine(task: bytes) -> tuple[Engine, SweepPlan]:
    store, load, plan, accept, threads = cloudpickle.loads(task)
    torch.set_num_threads(threads)  # bits in bfloat16 depend on how many there are
    return Engine(Store(store), load(), accept), plan
