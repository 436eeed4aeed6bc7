"""The training stream beside reading the same bytes, and beside a permutation of a memory map.

    python -m benchmarks.stream [--mebibytes 1024] [--rounds 3]

One layer of bfloat16 rows of 2,048 features, cold: the page cache is dropped before each variant.

(1) Reading all shards front to back. (2) An epoch of the stream, in batches of 4,096 rows. (3) `np.memmap` of the
rows as one file, a batch of permuted rows at a time, on a tenth of them. Then how well rows are mixed, against an
exact shuffle: documents in a batch, and the deviation of batch means of the first feature, whose value drifts
along the store. And the memory that an epoch adds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import flexcache
from benchmarks.memory import added
from benchmarks.read import forget
from benchmarks.timing import interleave, ratio, show
from flexcache import training

FEATURES, LENGTH, BATCH = 2048, 512, 4096
BEFORE = """
    import flexcache
    stream = flexcache.training.stream(flexcache.open(sys.argv[1]), "resid_post", 0, pool_bytes=int(sys.argv[2]))
    next(iter(flexcache.training.stream(flexcache.open(sys.argv[1]), "resid_post", 0, rows=[0, 1])))  # loads libraries
"""
RUN = """
    for _ in stream:
        pass
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as folder:
        store = build(Path(folder) / "run.zarr", options.mebibytes)
        measure(store, Path(folder), options.rounds)
        quality(store)
        memory(store)


def build(path: Path, mebibytes: int) -> flexcache.Store:
    """Return a store of noise whose first feature is the row's share of the way through."""
    count = (mebibytes << 20) // (2 * FEATURES * LENGTH)
    documents = [{"id": str(i), "tokens": [1] * LENGTH} for i in range(count)]
    noise = np.random.default_rng(0).standard_normal((4096, FEATURES)).astype(np.float32)
    with flexcache.record(path, documents, sites={"resid_post": (1, FEATURES)}, model="noise", dtype="bfloat16") as to:
        total = count * LENGTH
        for batch in to.batches():
            values = noise[: len(batch.rows)].copy()
            values[:, 0] = np.asarray(batch.rows) / total
            to.put("resid_post", values, rows=batch.rows, layer=0)
    return flexcache.open(path)


def measure(store: flexcache.Store, folder: Path, rounds: int) -> None:
    shards = sorted((store.path / "resid_post" / "c").rglob("0"))
    shards = [path for path in shards if path.is_file()]
    flat = folder / "flat.bin"
    with flat.open("wb") as file:
        for path in shards:
            file.write(path.read_bytes()[: store.shard_rows * 2 * FEATURES])
    count = flat.stat().st_size // (2 * FEATURES)
    tenth = count // 10 // BATCH * BATCH

    def cold(run: Callable[[], None]) -> Callable[[], float]:
        def timed() -> float:
            forget(folder)
            began = time.perf_counter()
            run()
            return time.perf_counter() - began

        return timed

    def raw() -> None:
        buffer = bytearray(4 << 20)
        for path in shards:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    stream = training.stream(store, "resid_post", 0, batch_size=BATCH, keep_cache=True)

    def epoch() -> None:
        for _ in stream:
            pass

    def mapped() -> None:
        rows = np.memmap(flat, np.uint16, "r", shape=(count, FEATURES))
        order = np.random.default_rng(0).permutation(count)[:tenth]
        for first in range(0, tenth, BATCH):
            rows[order[first : first + BATCH]]

    bare, ours, other = "reading the bytes", "an epoch of the stream", "np.memmap, a tenth"
    seconds = interleave({bare: cold(raw), ours: cold(epoch), other: cold(mapped)}, rounds)
    whole = [value * count / tenth for value in seconds[other]]
    show(
        f"{count:,} rows of {FEATURES} bfloat16, cold, batches of {BATCH}",
        [
            ("rows a second: the stream ÷ reading the bytes", f"{ratio(seconds[bare], seconds[ours]):.2f}", "≥ 0.6"),
            ("rows a second: the stream ÷ np.memmap, permuted", f"{ratio(whole, seconds[ours]):.1f}", ""),
            ("rows a second of the stream", f"{count / statistics.median(seconds[ours]):,.0f}", ""),
        ],
    )


def quality(store: flexcache.Store) -> None:
    documents, means = [], []
    stream = training.stream(store, "resid_post", 0, batch_size=BATCH, return_tokens=True, drop_last=True)
    for batch in stream:
        assert isinstance(batch, dict)
        documents.append(len(np.unique(batch["document"].numpy())))
        means.append(float(batch["activations"][:, 0].float().mean()))
    total = store.n_rows // LENGTH
    expected = total * (1 - (1 - 1 / total) ** BATCH)
    spread = (1 / 12 / BATCH) ** 0.5  # of the mean of a batch of numbers even between 0 and 1
    show(
        "how well rows are mixed, beside an exact shuffle",
        [
            ("documents in a batch ÷ those of an exact shuffle", f"{np.mean(documents) / expected:.2f}", "1"),
            ("deviation of batch means of a drifting feature ÷ that", f"{np.std(means) / spread:.1f}", "1"),
        ],
    )


def memory(store: flexcache.Store) -> None:
    rows = []
    for pool in (64 << 20, 256 << 20):
        adds = added(BEFORE, RUN, str(store.path), str(pool))
        rows.append((f"peak memory that an epoch adds, pool of {pool >> 20} MiB", f"{adds:.0f} MiB", "3 pools"))
    show("memory", rows)


if __name__ == "__main__":
    main()
