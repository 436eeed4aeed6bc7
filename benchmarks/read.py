"""Reading a store beside zarr-python, tensorstore, the raw file and np.memmap.

    python -m benchmarks.read [--mebibytes 512] [--rounds 7]

One layer of bfloat16 rows of 2,048 features. Scans are cold: the page cache of the files read is dropped first. Every
reader passes all bytes through memory and keeps none; the raw file is read by `readinto`, and the kernel is told to
read ahead, as it is by FlexCache. Gathers are of 4,096 random rows, warm.

zarr-python and tensorstore run in an environment of their own, on Python 3.13, over the same shard files, which are
linked below an array of 16-bit integers: zarr-python by its fused pipeline and by that of earlier versions, both with
reads of neighbouring chunks joined (its default), and the quicker of sorted and unsorted rows for both tools. They are
left out where that environment is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import flexcache
from benchmarks import reading_peers
from benchmarks.timing import interleave, ratio, show

FEATURES = 2048
ROWS = 4096
SEED = 1
PEERS = {
    "zarr-python {}, fused pipeline": ("zarr", ["codecs=fused"]),
    "zarr-python {}, batched pipeline": ("zarr", ["codecs=batched"]),
    "tensorstore {}": ("tensorstore", []),
}
Variants = dict[str, Callable[[], float | None]]


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


def read_through(path: Path) -> None:
    """Read a file from start to end."""
    buffer = bytearray(4 << 20)
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while file.readinto(buffer):
            pass


def scans(store: flexcache.Store, raw: Path) -> Variants:
    """Return the scans of our own by name."""

    def ours(as_stored: bool) -> None:
        for _ in store.scan("resid_post", 0, raw=as_stored):
            pass

    return {
        "raw file": lambda: read_through(raw),
        "flexcache": lambda: ours(True),
        "flexcache, as float32": lambda: ours(False),
    }


def gathers(store: flexcache.Store, raw: Path) -> Variants:
    """Return the gathers of our own by name."""
    rows = np.random.default_rng(SEED).integers(0, store.n_rows, ROWS)
    mapped = np.memmap(raw, dtype=np.uint16, mode="r", shape=(store.n_rows, FEATURES))
    return {
        "np.memmap": lambda: _use(mapped[rows]),
        "np.memmap, then astype(float32)": lambda: _use(mapped[rows].view("bfloat16").astype(np.float32)),
        "new memory for float32, filled": lambda: np.empty((ROWS, FEATURES), np.float32).fill(1),
        "flexcache": lambda: _use(store.read("resid_post", 0, rows, raw=True)),
        "flexcache, as float32": lambda: _use(store.read("resid_post", 0, rows)),
    }


def _use(values: Any) -> None:
    assert len(values) == ROWS


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; the current folder by default")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(dir=options.folder or Path.cwd(), prefix=".bench-"))
        folder = Path(name)
        store, raw = build(folder, (options.mebibytes << 20) // (2 * FEATURES))
        scanned, gathered = scans(store, raw), {k: _repeat(v) for k, v in gathers(store, raw).items()}
        array = reading_peers.flattened(store, folder / "flat.zarr")
        for called, (tool, settings) in PEERS.items() if reading_peers.PYTHON.exists() else ():
            peer = reading_peers.ReadingPeer(array, tool, settings, stack)
            scanned[called.format(peer.version)] = partial(peer.ask, "scan")
            gathered[called.format(peer.version)] = partial(_repeated, peer)
        _show(
            f"cold scan of {options.mebibytes} MiB ÷ reading the raw file",
            {k: _cold(v, folder) for k, v in scanned.items()},
            options.rounds,
            {"flexcache": "≤ 1.2"},
        )
        _show(
            f"gather of {ROWS} random rows, warm ÷ np.memmap",
            gathered,
            options.rounds,
            {"flexcache": "≤ 1.2", "flexcache, as float32": "≤ 2"},
        )


def _show(title: str, variants: Variants, rounds: int, targets: dict[str, str]) -> None:
    """Measure variants, and show each beside the first."""
    seconds = interleave(variants, rounds)
    floor, *others = seconds
    show(
        title,
        [
            (
                name,
                f"{ratio(seconds[name], seconds[floor]):.2f}",
                targets.get(name, "a peer" * name.startswith(("zarr", "tens"))),
            )
            for name in others
        ],
    )


def _cold(scan: Callable[[], float | None], folder: Path) -> Callable[[], float]:
    def run() -> float:
        forget(folder)
        began = time.perf_counter()
        return scan() or time.perf_counter() - began

    return run


def _repeat(gather: Callable[[], float | None], times: int = 5) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            gather()

    return run


def _repeated(peer: reading_peers.ReadingPeer, times: int = 5) -> float:
    return sum(peer.ask(f"gather {SEED} {ROWS}") for _ in range(times))


if __name__ == "__main__":
    main()
