"""Reading a store beside zarr-python, tensorstore, the raw file and np.memmap.

    python -m benchmarks.read [--mebibytes 512] [--rounds 7]

One layer of bfloat16 rows of 2,048 features. Scans are cold: the page cache of the files read is dropped first. Every
reader passes all bytes through memory and keeps none. Gathers are of 4,096 random rows, warm.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
import zarr

import flexcache
from benchmarks.timing import interleave, ratio, show

FEATURES = 2048
ROWS = 4096


def build(folder: Path, rows: int) -> tuple[flexcache.Store, Path]:
    """Return a store of random rows, and a plain file of the same bytes."""
    documents = [{"id": str(i), "tokens": [1] * 512} for i in range(rows // 512)]
    raw = folder / "raw"
    block = np.random.default_rng(0).standard_normal((4096, FEATURES)).astype("bfloat16")
    with (
        flexcache.record(
            folder / "run.zarr", documents, sites={"resid_post": (1, FEATURES)}, model="noise"
        ) as recorder,
        raw.open("wb") as file,
    ):
        for batch in recorder.batches():
            values = block[np.arange(batch.rows.start, batch.rows.stop) % 4096]
            recorder.put("resid_post", values, rows=batch.rows, layer=0)
            file.write(values.view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
    return flexcache.open(folder / "run.zarr"), raw


def forget(folder: Path) -> None:
    """Drop what the page cache holds of the files below *folder*."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def scans(store: flexcache.Store, raw: Path) -> dict[str, Callable[[], None]]:
    """Return the cold scans by name."""
    buffer = bytearray(4 << 20)
    array = _zarr(store)
    tensor = _tensorstore(store)

    def plain() -> None:
        with raw.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    def ours(as_stored: bool) -> None:
        for _ in store.scan("resid_post", 0, raw=as_stored):
            pass

    def blocks(read: Callable[[int, int], Any]) -> None:
        for start in range(0, store.n_rows, store.shard_rows):
            read(start, min(start + store.shard_rows, store.n_rows))

    return {
        "raw file": plain,
        "flexcache": lambda: ours(True),
        "flexcache, as float32": lambda: ours(False),
        "zarr-python": lambda: blocks(lambda a, b: array[0, a:b]),
        "tensorstore": lambda: blocks(lambda a, b: tensor[0, a:b].read().result()),
    }


def gathers(store: flexcache.Store, raw: Path) -> dict[str, Callable[[], None]]:
    """Return the warm gathers by name."""
    rows = np.random.default_rng(1).integers(0, store.n_rows, ROWS)
    mapped = np.memmap(raw, dtype=np.uint16, mode="r", shape=(store.n_rows, FEATURES))
    array = _zarr(store)
    tensor = _tensorstore(store)
    return {
        "np.memmap": lambda: _use(mapped[rows]),
        "flexcache": lambda: _use(store.read("resid_post", 0, rows, raw=True)),
        "flexcache, as float32": lambda: _use(store.read("resid_post", 0, rows)),
        "zarr-python": lambda: _use(array.oindex[0, rows, :]),
        "tensorstore": lambda: _use(tensor[0, rows].read().result()),
    }


def _use(values: Any) -> None:
    assert len(values) == ROWS


def _zarr(store: flexcache.Store) -> Any:
    return zarr.open_group(store.path, mode="r")["resid_post"]


def _tensorstore(store: flexcache.Store) -> Any:
    context = {"cache_pool": {"total_bytes_limit": 0}}
    kvstore = {"driver": "file", "path": str(store.path / "resid_post")}
    return tensorstore.open({"driver": "zarr3", "kvstore": kvstore, "context": context}).result()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; the current folder by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder or Path.cwd(), prefix=".bench-") as name:
        folder = Path(name)
        store, raw = build(folder, (options.mebibytes << 20) // (2 * FEATURES))
        cold = {}
        for label, scan in scans(store, raw).items():
            cold[label] = _cold(scan, folder)
        scanned = interleave(cold, options.rounds)
        gathered = interleave({k: _repeat(v) for k, v in gathers(store, raw).items()}, options.rounds)
    targets = {"flexcache": "≤ 1.2", "zarr-python": "a peer", "tensorstore": "a peer"}
    show(
        f"cold scan of {options.mebibytes} MiB ÷ reading the raw file",
        [(k, f"{ratio(scanned[k], scanned['raw file']):.2f}", targets.get(k, "")) for k in scanned if k != "raw file"],
    )
    show(
        f"gather of {ROWS} random rows, warm ÷ np.memmap",
        [
            (k, f"{ratio(gathered[k], gathered['np.memmap']):.2f}", targets.get(k, ""))
            for k in gathered
            if k != "np.memmap"
        ],
    )


def _cold(scan: Callable[[], None], folder: Path) -> Callable[[], float]:
    def run() -> float:
        forget(folder)
        began = time.perf_counter()
        scan()
        return time.perf_counter() - began

    return run


def _repeat(gather: Callable[[], None], times: int = 5) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            gather()

    return run


if __name__ == "__main__":
    main()
