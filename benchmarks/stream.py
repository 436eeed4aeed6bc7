"""The training stream beside reading the same bytes, a permutation of a memory map, and the loaders of other tools.

    python -m benchmarks.stream [--mebibytes 1024] [--rounds 3]

One layer of bfloat16 rows of 2,048 features, cold: the page cache is dropped before each variant.

(1) Reading all shards front to back, with the advice to read ahead. (2) An epoch of the stream, in batches of 4,096
rows, past the page cache, as it reads epochs that are large beside memory, and through it. (3) `np.memmap` of the rows
as one file, a batch of permuted rows at a time, on a tenth of them. (4) annbatch's loader, shuffled, over the same
shard files (hard links below the metadata of an array of two dimensions), by each codec pipeline of zarr-python and by
zarrs, and with runs and pool of the stream; in an environment of its own, on Python 3.13. (5) SAELens'
ActivationsStore over its own files of the same rows, in float32, since it cannot hold bfloat16. Peers that are not
installed are left out.

Then how well rows are mixed, against an exact shuffle: documents in a batch, and the deviation of batch means of the
first feature, whose value drifts along the store. And the memory that an epoch adds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

import flexcache
from benchmarks import reading_peers
from benchmarks.memory import added
from benchmarks.read import forget, read_through
from benchmarks.reading_peers import flattened
from benchmarks.timing import interleave, ratio, show
from flexcache import training

FEATURES, LENGTH, BATCH = 2048, 512, 4096
RUN, RUNS = 64, 1024
"""Rows of a run of the stream, and runs of its pool."""
ANNBATCHES: dict[str, list[str]] = {
    "as it comes": ["codecs=batched"],
    "by zarr's fused pipeline": ["codecs=fused"],
    "by zarrs": ["codecs=zarrs"],
    "by zarrs, mixing as the stream does": ["codecs=zarrs", f"chunk_size={RUN}", f"preload_nchunks={RUNS}"],
}
BEST = "annbatch at the best of these"
BEFORE = """
    import flexcache
    stream = flexcache.training.stream(flexcache.open(sys.argv[1]), "resid_post", 0, pool_bytes=int(sys.argv[2]))
    next(iter(flexcache.training.stream(flexcache.open(sys.argv[1]), "resid_post", 0, rows=[0, 1])))  # loads libraries
"""
EPOCH = """
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

    def raw() -> None:
        for path in shards:
            read_through(path)

    def epoch(keep_cache: bool) -> Callable[[], None]:
        stream = training.stream(store, "resid_post", 0, batch_size=BATCH, keep_cache=keep_cache)

        def run() -> None:
            for _ in stream:
                pass

        return run

    def mapped() -> None:
        rows = np.memmap(flat, np.uint16, "r", shape=(count, FEATURES))
        order = np.random.default_rng(0).permutation(count)[:tenth]
        for first in range(0, tenth, BATCH):
            rows[order[first : first + BATCH]]

    bare, ours, kept = "reading the bytes", "the stream", "the stream through the page cache"
    runs: dict[str, tuple[Callable[[], float | None], int]] = {
        bare: (raw, count),
        ours: (epoch(keep_cache=False), count),
        kept: (epoch(keep_cache=True), count),
        "np.memmap, permuted": (mapped, tenth),
    }
    targets = {BEST: "≥ 3"}
    with contextlib.ExitStack() as stack:
        array = flattened(store, folder / "flat.zarr")
        for how, settings in ANNBATCHES.items() if reading_peers.PYTHON.exists() else ():
            peer = reading_peers.ReadingPeer(array, "annbatch", settings, stack)
            runs[f"annbatch {peer.version}, {how}"] = partial(peer.ask, f"epoch {BATCH}"), count
        if (activations := saelens(store, folder)) is not None:
            runs["SAELens ActivationsStore, float32"] = activations
        seconds = interleave({name: cold(folder, run) for name, (run, _) in runs.items()}, rounds)
    spent = {name: [value * count / part for value in seconds[name]] for name, (_, part) in runs.items()}
    peers = [name for name in runs if name not in (bare, ours, kept)]
    loaders = [spent[name] for name in peers if name.startswith("annbatch")]
    if loaders:
        spent[BEST] = [min(values) for values in zip(*loaders, strict=True)]
        peers.append(BEST)
    show(
        f"{count:,} rows of {FEATURES} bfloat16, cold, batches of {BATCH}; rows a second",
        [
            ("the stream ÷ reading the bytes", f"{ratio(spent[bare], spent[ours]):.2f}", "≥ 0.8"),
            (f"{kept} ÷ reading the bytes", f"{ratio(spent[bare], spent[kept]):.2f}", ""),
            *(
                (f"the stream ÷ {name}", f"{ratio(spent[name], spent[ours]):.1f}", targets.get(name, ""))
                for name in peers
            ),
            ("the stream", f"{count / statistics.median(seconds[ours]):,.0f}", ""),
        ],
    )


def cold(folder: Path, run: Callable[[], float | None]) -> Callable[[], float]:
    """Return what runs after the page cache is dropped, and tells its seconds: those it returns, or those it took."""

    def timed() -> float:
        forget(folder)
        began = time.perf_counter()
        return run() or time.perf_counter() - began

    return timed


def saelens(store: flexcache.Store, folder: Path) -> tuple[Callable[[], None], int] | None:
    """Return SAELens over files of its own, of an eighth of the rows, and how many those are."""
    try:
        import datasets
        from sae_lens.training.activations_store import ActivationsStore
    except ImportError:
        return None
    path, eighth = folder / "saelens", store.n_rows // 8 // LENGTH * LENGTH
    features = datasets.Features({"hook": datasets.Array2D((LENGTH, FEATURES), "float32")})

    rows = store.read("resid_post", 0, slice(0, eighth)).reshape(-1, LENGTH, FEATURES)
    with contextlib.redirect_stderr(io.StringIO()):
        datasets.Dataset.from_dict({"hook": rows}, features=features).save_to_disk(str(path))

    def epoch() -> None:
        loader = ActivationsStore(
            cached_activations_path=str(path), dtype="float32", hook_name="hook", context_size=LENGTH, d_in=FEATURES,
            n_batches_in_buffer=32, total_training_tokens=eighth, store_batch_size_prompts=8,
            train_batch_size_tokens=BATCH, seqpos_slice=(None,), device=torch.device("cpu"), prepend_bos=False,
            hook_head_index=None, dataset=None, streaming=False, model=None, normalize_activations="none",
            model_kwargs=None, autocast_lm=False, dataset_trust_remote_code=None,
        )  # fmt: skip
        for _ in range(eighth // BATCH):
            next(loader)

    return epoch, eighth


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
        adds = added(BEFORE, EPOCH, str(store.path), str(pool))
        rows.append((f"peak memory that an epoch adds, pool of {pool >> 20} MiB", f"{adds:.0f} MiB", "3 pools"))
    show("memory", rows)


if __name__ == "__main__":
    main()
