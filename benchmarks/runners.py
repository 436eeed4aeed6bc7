"""Capture beside tools that bring a runner of their own: SAELens' CacheActivationsRunner, and lmprobe's extract.

    python -m benchmarks.runners [--contexts 128] [--documents 300] [--rounds 3]

SmolLM2-135M on a CPU. (1) One layer, in float32, of contexts of 128 tokens, 16 in a forward: SAELens takes one hook a
run and cannot store bfloat16. FlexCache with a batch of the same tokens, with fsync, hashes and ledger. (2) All
layers of ragged texts, in bfloat16 where that is quick, else in float32: lmprobe by its local backend, 32 texts a
batch in the order of the corpus, padding kept; FlexCache from text to store, planning and its try of the largest
batch included. Models are loaded before. Each side is held against its bare forward: the blocks up to the layer for
(1), without lm_head for (2). A tool that is not installed is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import logging
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

import flexcache
from benchmarks.model import DTYPE, smollm2
from benchmarks.timing import interleave, ratio, show
from pipelines.demo import assets

LAYER, CONTEXT, TOGETHER, TEXTS = 14, 128, 16, 32
MISSING = ("is not installed", "–", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, default=128)
    parser.add_argument("--documents", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; the current folder by default")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(dir=options.folder or Path.cwd(), prefix=".bench-") as folder:
        one_layer(Path(folder).resolve(), options.contexts, options.rounds)
        all_layers(Path(folder).resolve(), options.documents, options.rounds)


def corpus(documents: int) -> list[dict[str, Any]]:
    """Return texts with their ids, in the order of the corpus."""
    return pq.read_table(assets.vader_sample(documents), columns=["id", "text"]).to_pylist()


def one_layer(folder: Path, contexts: int, rounds: int) -> None:
    title = f"layer {LAYER} alone, float32, {contexts} contexts of {CONTEXT} tokens"
    if importlib.util.find_spec("sae_lens") is None:
        show(title, [("SAELens", *MISSING[:2])])
        return
    source = smollm2("float32")
    model, tokenizer = source.load(), source.tokenizer()
    ids = tokenizer(" ".join(document["text"] for document in corpus(8 * contexts)))["input_ids"]
    lines = [ids[start : start + CONTEXT] for start in range(0, contexts * CONTEXT, CONTEXT)]
    assert len(lines[-1]) == CONTEXT
    documents = [{"id": str(number), "tokens": line} for number, line in enumerate(lines)]
    store, other = folder / "one.zarr", folder / "saelens"

    def bare() -> None:
        head = torch.nn.Module.__call__
        model.model.layers, whole = model.model.layers[: LAYER + 1], model.model.layers
        with torch.no_grad():
            for start in range(0, contexts, TOGETHER):
                head(model.model, torch.tensor(lines[start : start + TOGETHER]), use_cache=False)
        model.model.layers = whole

    def ours() -> None:
        shutil.rmtree(store, ignore_errors=True)
        flexcache.capture(
            model, None, documents, store, sites=["resid_post"], layers=[LAYER],
            batch_tokens=TOGETHER * CONTEXT, dtype="float32", progress=False,
        )  # fmt: skip

    seconds = interleave({"bare": bare, "flexcache": ours, "SAELens": saelens(source.name, lines, other)}, rounds)
    away = np.abs(saved(other) - flexcache.open(store).read("resid_post", LAYER)[in_order(store)]).max()
    show(
        title,
        [
            ("flexcache ÷ the blocks that run", f"{ratio(seconds['flexcache'], seconds['bare']):.3f}", ""),
            (
                "SAELens CacheActivationsRunner ÷ the same",
                f"{ratio(seconds['SAELens'], seconds['bare']):.3f}",
                "a peer",
            ),
            ("flexcache ÷ SAELens", f"{ratio(seconds['flexcache'], seconds['SAELens']):.3f}", ""),
            ("largest difference between their values", f"{away:.2g}", ""),
            ("seconds of flexcache", f"{statistics.median(seconds['flexcache']):.1f}", ""),
        ],
    )


def in_order(path: Path) -> np.ndarray:
    """Return the rows of a store in the order of the corpus and of positions."""
    store = flexcache.open(path)
    places = store.documents["source_index"].to_numpy()[store.coordinates["document"]]
    return np.lexsort((store.coordinates["position"], places))


def saved(folder: Path) -> np.ndarray:
    """Return what SAELens has written, as rows."""
    import datasets

    found = datasets.load_from_disk(str(folder)).with_format("numpy")[f"model.layers.{LAYER}"]
    return np.asarray(found).reshape(-1, np.shape(found)[-1])


def saelens(name: str, lines: list[list[int]], into: Path) -> Callable[[], float]:
    import datasets
    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig

    tokens = datasets.Dataset.from_dict({"input_ids": lines})
    rows, width = len(lines) * CONTEXT, 576

    def run() -> float:
        shutil.rmtree(into, ignore_errors=True)
        config = CacheActivationsRunnerConfig(
            dataset_path="contexts", model_name=name, model_class_name="AutoModelForCausalLM", device="cpu",
            model_batch_size=TOGETHER, hook_name=f"model.layers.{LAYER}", d_in=width, training_tokens=rows,
            context_size=CONTEXT, new_cached_activations_path=str(into), shuffle=False, dtype="float32",
            buffer_size_gb=(rows * width * 4 + 0.5) / 1e9, prepend_bos=False, streaming=False,
            model_from_pretrained_kwargs={"dtype": torch.float32},
        )  # fmt: skip
        runner = CacheActivationsRunner(config, override_dataset=tokens)
        began = time.perf_counter()
        with contextlib.redirect_stderr(io.StringIO()):
            runner.run()
        return time.perf_counter() - began

    return run


def all_layers(folder: Path, documents: int, rounds: int) -> None:
    title = f"all layers, {DTYPE}, {documents} ragged texts"
    if importlib.util.find_spec("lmprobe") is None:
        show(title, [("lmprobe", *MISSING[:2])])
        return
    source = smollm2()
    model, tokenizer = source.load(), source.tokenizer()
    texts = corpus(documents)
    store, other = folder / "all.zarr", folder / "lmprobe"

    def bare() -> None:
        with torch.no_grad():
            for batch in batches:
                model.model(**batch, use_cache=False)

    def ours() -> None:
        shutil.rmtree(store, ignore_errors=True)
        flexcache.capture(model, tokenizer, texts, store, sites=["resid_post"], progress=False)

    ours()
    batches = planned(store)
    with contextlib.redirect_stderr(io.StringIO()):
        seconds = interleave({"bare": bare, "flexcache": ours, "lmprobe": lmprobe(source.name, texts, other)}, rounds)
    sizes = {
        name: sum(p.stat().st_size for p in root.rglob("*") if p.is_file())
        for name, root in (("s", store), ("o", other))
    }
    show(
        title,
        [
            (
                "flexcache, from text to store ÷ bare forward of its batches",
                f"{ratio(seconds['flexcache'], seconds['bare']):.3f}",
                "",
            ),
            ("lmprobe extract ÷ the same", f"{ratio(seconds['lmprobe'], seconds['bare']):.3f}", "a peer"),
            ("flexcache ÷ lmprobe", f"{ratio(seconds['flexcache'], seconds['lmprobe']):.3f}", ""),
            ("bytes on the disk: lmprobe ÷ flexcache", f"{sizes['o'] / sizes['s']:.2f}", ""),
        ],
    )


def planned(path: Path) -> list[dict[str, torch.Tensor]]:
    """Return the batches of a store, as inputs of a forward."""
    from flexcache.recording.forward.batch_reader import BatchReader

    reader, store = BatchReader(path), flexcache.open(path)
    found = [batch for unit in range(store.n_units) for batch in reader.read_unit(unit)]
    return [
        {"input_ids": torch.from_numpy(batch.input_ids(0)), "attention_mask": torch.from_numpy(batch.attention_mask())}
        for batch in found
    ]


def lmprobe(name: str, documents: list[dict[str, Any]], into: Path) -> Callable[[], None]:
    from lmprobe import set_cache_backend
    from lmprobe.extract import extract

    set_cache_backend(str(into))
    texts = [document["text"] for document in documents]

    def run() -> None:
        shutil.rmtree(into, ignore_errors=True)
        extract(
            name, texts, "all", output_dir="run", batch_size=TEXTS, remote=False, device="cpu", backend="local",
            dtype=DTYPE,
        )  # fmt: skip

    return run


if __name__ == "__main__":
    main()
