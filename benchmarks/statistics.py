"""Statistics of a store beside reading its bytes, scikit-learn, and themselves on more workers.

    python -m benchmarks.statistics [--mebibytes 512] [--rounds 5]

One layer of bfloat16 rows of 2,048 features for moments, of 576 for principal components. Reads are cold where it says
so: the page cache of the files is dropped first. Everything is measured in turn, in one run.
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
import torch
from sklearn.decomposition import PCA, IncrementalPCA
from threadpoolctl import threadpool_limits

import flexcache
from analysis.readout import lens
from analysis.statistics import geometry, onepass
from analysis.statistics.moments import Moments
from analysis.statistics.onepass import DocumentSample
from analysis.survey import PARTS, survey
from benchmarks.memory import added
from benchmarks.read import forget
from benchmarks.timing import interleave, ratio, show
from flexcache.store.read.shard_reader import RowReader

BEFORE = """
    import flexcache
    from analysis import onepass
    from analysis.statistics.moments import Moments
    store = flexcache.open(sys.argv[1])
    store.documents, store.tokens
    store.read("resid_post", 0, slice(0, 8))
    read = lambda: onepass.read(store, "resid_post", {"moments": Moments()}, workers=2, progress=False)
    read()  # loads libraries
"""


def build(path: Path, rows: int, features: int, layers: int = 1) -> flexcache.Store:
    """Return a store of random rows."""
    documents = [{"id": str(i), "tokens": [1] * 512} for i in range(rows // 512)]
    block = np.random.default_rng(0).standard_normal((4096, features)).astype("bfloat16")
    with flexcache.record(path, documents, sites={"resid_post": (layers, features)}, model="noise") as recorder:
        for batch in recorder.batches():
            values = block[np.arange(batch.rows.start, batch.rows.stop) % 4096]
            for layer in range(layers):
                recorder.put("resid_post", values, rows=batch.rows, layer=layer)
    return flexcache.open(path)


def cold(run: Callable[[], Any], folder: Path) -> Callable[[], float]:
    """Return *run* with the page cache dropped before it, timed without that."""

    def measured() -> float:
        forget(folder)
        began = time.perf_counter()
        run()
        return time.perf_counter() - began

    return measured


def moments(folder: Path, mebibytes: int, rounds: int) -> None:
    """Mean and variance, and all four moments, beside a plain read of the shard files."""
    store = build(folder / "wide.zarr", (mebibytes << 20) // 4096, 2048)
    shards = sorted((store.path / "resid_post" / "c").rglob("0"))
    buffer = bytearray(4 << 20)
    threads = os.cpu_count() or 1

    def plain() -> None:
        for shard in shards:
            if shard.is_file():
                with shard.open("rb", buffering=0) as file:
                    while file.readinto(buffer):
                        pass

    def ours(order: int, workers: int) -> Callable[[], Any]:
        statistics = {"moments": Moments(order=order)}
        return lambda: onepass.read(store, "resid_post", statistics, workers=workers, progress=False)

    named = {
        "reading the bytes": plain,
        f"mean and variance, {threads} threads": ours(2, threads),
        "mean and variance, 1 thread": ours(2, 1),
        f"four moments, {threads} threads": ours(4, threads),
    }
    found = interleave({name: cold(run, store.path) for name, run in named.items()}, rounds)
    floor = found.pop("reading the bytes")
    targets = {f"mean and variance, {threads} threads": "≤ 1.5"}
    lines = [(name, f"{ratio(seconds, floor):.2f}", targets.get(name, "")) for name, seconds in found.items()]
    show(f"{mebibytes} MiB of bfloat16, cold ÷ reading the bytes ({mebibytes / np.median(floor):,.0f} MiB/s)", lines)


def components(folder: Path, rounds: int, rows: int = 16_384) -> None:
    """Principal components of one layer beside scikit-learn's, reading included; BLAS on all cores for all of them."""
    store = build(folder / "narrow.zarr", rows, 576)

    def read() -> np.ndarray:
        return np.asarray(store.read("resid_post", 0))

    def incremental() -> None:
        model = IncrementalPCA(64)
        for start in range(0, rows, 1024):
            model.partial_fit(store.read("resid_post", 0, slice(start, start + 1024)))

    named: dict[str, Callable[[], Any]] = {
        "flexcache": lambda: geometry.pca(store, "resid_post", rows=None, progress=False),
        "scikit-learn PCA, float64": lambda: PCA().fit(read().astype(np.float64)),
        "scikit-learn PCA, full SVD": lambda: PCA(svd_solver="full").fit(read().astype(np.float64)),
        "scikit-learn IncrementalPCA(64)": incremental,
    }

    def timed(run: Callable[[], Any]) -> Callable[[], float]:
        def measured() -> float:
            began = time.perf_counter()
            with threadpool_limits(os.cpu_count()):
                run()
            return time.perf_counter() - began

        return measured

    found = interleave({name: timed(run) for name, run in named.items()}, rounds)
    own = found.pop("flexcache")
    lines = [(f"{name} ÷ flexcache", f"{ratio(seconds, own):.1f}", "a peer") for name, seconds in found.items()]
    show(f"PCA of {rows:,} rows of 576 (flexcache {np.median(own):.2f} s)", lines)


def reads(folder: Path) -> None:
    """How often each row of a shard is read, for one statistic and for all."""
    store = build(folder / "read.zarr", 16_384, 64, layers=3)
    counted = 0
    scan = RowReader._scan_shard

    def counting(self: RowReader, layer: int | None, shard: int, first: int, out: np.ndarray) -> None:
        nonlocal counted
        counted += len(out)
        scan(self, layer, shard, first, out)

    RowReader._scan_shard = counting  # type: ignore[method-assign]
    lines = []
    try:
        for parts in (("moments",), tuple(part for part in PARTS if part != "lens")):
            counted = 0
            survey(store, only=parts, similarity_rows=512, permutations=0, progress=False)
            lines.append((f"{len(parts)} statistics", f"{counted / (3 * store.n_rows):.3f}", "1"))
    finally:
        RowReader._scan_shard = scan  # type: ignore[method-assign]
    show("rows read ÷ rows of the store", lines)


def logit_lens(folder: Path, rounds: int, rows: int = 2350, layers: int = 18) -> None:
    """Compare the logit lens of a vocabulary of 262,144 and a hidden size of 640 with its products alone."""
    store = build(folder / "lens.zarr", rows + 512, 640, layers)
    random = torch.Generator().manual_seed(0)
    head = lens.Head(torch.nn.RMSNorm(640), torch.randn(262_144, 640, generator=random) / 25)
    used = lens.affordable_rows(head, layers)
    residual = np.concatenate([store.read("resid_post", layer, slice(0, used)) for layer in range(layers)])
    seconds: dict[str, list[float]] = {"lens": [], "products": []}

    def products() -> None:
        for start in range(0, len(residual), 1024):
            hidden = head.normalize(residual[start : start + 1024])
            for first in range(0, len(head.weight), 8192):
                head.logits(hidden, slice(first, first + 8192))

    def measured(name: str, run: Callable[[], Any]) -> Callable[[], float]:
        def call() -> float:
            began, wall = time.process_time(), time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - wall)
            return time.process_time() - began

        return call

    named = {"lens": lambda: void(lens.compute(store, head, progress=False)), "products": products}
    found = interleave({name: measured(name, run) for name, run in named.items()}, rounds, warm=False)
    lines = [
        ("products alone ÷ lens, CPU seconds", f"{ratio(found['products'], found['lens']):.2f}", "≥ 0.5"),
        ("CPU seconds of the lens", f"{np.median(found['lens']):.0f}", "two cores: ≤ 120"),
        ("seconds by the clock, lens and products", ", ".join(f"{np.median(s):.0f}" for s in seconds.values()), "≤ 60"),
    ]
    show(f"logit lens, {used} of {rows:,} rows, {layers} layers, vocabulary 262,144", lines)


def scaling(folder: Path, mebibytes: int, rounds: int) -> None:
    """Two worker processes beside one; clusters are up before, and BLAS has one thread each."""
    from distributed import Client, LocalCluster

    store = build(folder / "layers.zarr", (mebibytes << 20) // (4 * 1152), 576, layers=4)
    statistics = {"moments": Moments(), "pca": geometry.PCA(DocumentSample(0.5))}
    clusters = {n: LocalCluster(n_workers=n, threads_per_worker=1, dashboard_address=":0") for n in (1, 2)}
    clients = {n: Client(cluster) for n, cluster in clusters.items()}
    try:

        def on(n: int) -> Callable[[], None]:
            return lambda: void(onepass.read(store, "resid_post", statistics, scheduler=clients[n], progress=False))

        found = interleave({f"{n} workers": on(n) for n in (1, 2)}, rounds)
    finally:
        for n in (1, 2):
            clients[n].close()
            clusters[n].close()
    show("worker processes", [("two ÷ one", f"{ratio(found['2 workers'], found['1 workers']):.2f}", "≤ 0.6")])


def memory(folder: Path, mebibytes: int) -> None:
    """Peak memory that a read adds, for a store and for one four times as large."""
    lines = []
    for size in (mebibytes // 4, mebibytes):
        store = build(folder / f"memory-{size}.zarr", (size << 20) // 4096, 2048)
        adds = added(BEFORE, "read()", str(store.path))
        lines.append((f"{size} MiB in {store.n_units} shards", f"{adds:.0f} MiB", "block + statistics"))
    show("peak memory that moments add, 2 threads", lines)


def void(_: Any) -> None:
    """Forget a result, so that a call is timed by its length."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; the current folder by default")
    parser.add_argument("--only", default="moments,components,reads,lens,scaling,memory")
    options = parser.parse_args()
    size, rounds = options.mebibytes, options.rounds
    with tempfile.TemporaryDirectory(dir=options.folder or Path.cwd(), prefix=".bench-") as name:
        folder = Path(name)
        parts: dict[str, Callable[[], None]] = {
            "moments": lambda: moments(folder, size, rounds),
            "components": lambda: components(folder, rounds),
            "reads": lambda: reads(folder),
            "lens": lambda: logit_lens(folder, rounds),
            "scaling": lambda: scaling(folder, size, rounds),
            "memory": lambda: memory(folder, size),
        }
        for part in options.only.split(","):
            parts[part]()


if __name__ == "__main__":
    main()
