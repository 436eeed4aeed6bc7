"""Other tools that read arrays, in a process and an environment of their own (Python 3.13, no torch).

    python3.13 reading.py ARRAY TOOL [key=value …]

ARRAY is a Zarr array (rows, features); TOOL is zarr, tensorstore or annbatch. The tool's version goes out first; then
each line that comes in names what to do, and the seconds that it took go out:

    scan                    read the array by shards
    gather SEED COUNT       read some random rows, a tool's best of sorted and unsorted
    epoch BATCH_SIZE        one shuffled epoch, by annbatch

``codecs`` is the codec pipeline of zarr-python: batched, fused or zarrs. Other keys are arguments of annbatch's Loader.
"""

from __future__ import annotations

import importlib.metadata
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import zarr

CODECS = {
    "batched": "zarr.core.codec_pipeline.BatchedCodecPipeline",
    "fused": "zarr.core.codec_pipeline.FusedCodecPipeline",
    "zarrs": "zarrs.ZarrsCodecPipeline",
}


def main() -> None:
    path, tool, *settings = sys.argv[1:]
    chosen = dict(setting.split("=") for setting in settings)
    warnings.simplefilter("ignore")
    codecs = chosen.pop("codecs", "fused")
    if codecs == "zarrs":
        import zarrs  # noqa: F401
    zarr.config.set({"codec_pipeline.path": CODECS[codecs]})
    array = zarr.open_array(path, mode="r")
    tensor = _tensor(path) if tool == "tensorstore" else None
    print(importlib.metadata.version(tool), flush=True)

    def read(rows: Any) -> Any:
        if tensor is not None:
            return tensor[rows].read().result()
        return array[rows] if isinstance(rows, slice) else array.oindex[rows]

    def scan() -> None:
        for start in range(0, array.shape[0], array.shards[0]):
            read(slice(start, start + array.shards[0]))

    mixing = {key: int(value) for key, value in chosen.items()}
    for line in sys.stdin:
        what, *numbers = line.split()
        if what == "scan":
            took = timed(scan)
        elif what == "gather":
            seed, count = map(int, numbers)
            rows = np.random.default_rng(seed).integers(0, array.shape[0], count)
            took = min(timed(partial(read, rows)), timed(partial(read, np.sort(rows))))
        else:
            took = timed(partial(epoch, array, int(numbers[0]), mixing))
        print(took, flush=True)


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def epoch(array: Any, batch_size: int, mixing: dict[str, int]) -> None:
    """Run one shuffled epoch of annbatch."""
    import annbatch

    loader = annbatch.Loader(batch_size=batch_size, shuffle=True, preload_to_gpu=False, **mixing)
    rows = sum(len(batch["X"]) for batch in loader.add_dataset(array))
    if rows != array.shape[0]:
        raise RuntimeError(f"{rows} of {array.shape[0]} rows came")


def _tensor(path: str) -> Any:
    import tensorstore

    context = {"cache_pool": {"total_bytes_limit": 0}}
    kvstore = {"driver": "file", "path": path}
    return tensorstore.open({"driver": "zarr3", "kvstore": kvstore, "context": context}).result()


if __name__ == "__main__":
    main()
