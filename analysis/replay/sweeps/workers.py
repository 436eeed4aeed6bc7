"""Sweeps on Dask workers, each of which loads the model once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import cloudpickle
import torch
from torch import nn

from flexcache.errors import AnalysisError
from flexcache.store.storage.location import Place

if TYPE_CHECKING:
    from analysis.replay.engine.engine import Engine
    from analysis.replay.sweeps.sweep_plan import Part, Question
    from flexcache.recording.forward.batch import Batch

Loader = Callable[[], nn.Module]


def run_on_workers(
    store: Place,
    load: Loader,
    question: Question,
    batches: list[Batch],
    scheduler: str,
    workers: int,
    accept: Collection[str],
) -> Iterator[tuple[Batch, Part]]:
    """Yield batches and their answers, as they come, from Dask workers; see `analysis.replay.sweeps.sweep`.

    Raises
    ------
    AnalysisError
        There is no such scheduler.
    """
    asked = cloudpickle.dumps((str(store), load, question, tuple(accept), torch.get_num_threads()))
    if scheduler == "processes":
        from dask.base import compute
        from dask.delayed import delayed

        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            for first in range(0, len(batches), workers):
                together = batches[first : first + workers]
                work = [delayed(answer_one)(asked, batch) for batch in together]
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
            futures = {client.submit(answer_one, asked, batch, pure=False): batch for batch in batches}
            for future in as_completed(list(futures)):
                yield futures[future], future.result()
    else:
        raise AnalysisError(f"there is no scheduler {scheduler!r}", expected='"processes", or an address "tcp://…"')


def answer_one(asked: bytes, batch: Batch) -> Any:
    """Return the answer for one batch; the engine stays for the next."""
    from analysis.replay.sweeps.sweep_plan import answer

    engine, question = _engine(asked)
    return answer(engine, question, batch)


@lru_cache(maxsize=1)
def _engine(asked: bytes) -> tuple[Engine, Question]:
    from analysis.replay.engine.engine import Engine
    from flexcache.store.read.store import Store

    store, load, question, accept, threads = cloudpickle.loads(asked)
    torch.set_num_threads(threads)  # bits in bfloat16 depend on how many there are
    return Engine(Store(store), load(), accept), question
