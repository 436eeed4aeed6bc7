"""Epochs of annbatch's loader, in a process of its own: annbatch needs Python 3.12, and no torch.

    python3.12 annbatch_epochs.py ARRAY BATCH_SIZE [zarrs] [CHUNK CHUNKS]

ARRAY is a Zarr array (rows, features). annbatch's version goes out first; then, for each line that comes in, one
shuffled epoch is run, and its seconds go out.
"""

from __future__ import annotations

import importlib.metadata
import sys
import time
import warnings

import annbatch
import zarr


def main() -> None:
    path, batch_size, *more = sys.argv[1:]
    warnings.simplefilter("ignore")
    if more[:1] == ["zarrs"]:
        del more[0]
        import zarrs  # noqa: F401

        zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    mixing = {"chunk_size": int(more[0]), "preload_nchunks": int(more[1])} if more else {}
    array = zarr.open_array(path, mode="r")
    print(importlib.metadata.version("annbatch"), flush=True)
    for _ in sys.stdin:
        began, rows = time.perf_counter(), 0
        loader = annbatch.Loader(batch_size=int(batch_size), shuffle=True, preload_to_gpu=False, **mixing)
        for batch in loader.add_dataset(array):
            rows += len(batch["X"])
        if rows != array.shape[0]:
            raise RuntimeError(f"{rows} of {array.shape[0]} rows came")
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main()
