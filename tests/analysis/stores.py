"""Stores of given values, written by the public recorder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import flexcache


def value_store(
    path: Path,
    values: np.ndarray,
    lengths: list[int],
    *,
    dtype: str = "float32",
    labels: dict[str, list[Any]] | None = None,
    vocabulary: int = 11,
    text: bool = False,
    **options: Any,
) -> flexcache.Store:
    """Return a store of *values*, shape (layers, tokens, features), for the tokens in corpus order."""
    rng = np.random.default_rng(0)
    documents = []
    for i, length in enumerate(lengths):
        tokens = rng.integers(0, vocabulary, length).tolist()
        content = {"text": " ".join(f"w{t}" for t in tokens)} if text else {"tokens": tokens}
        documents.append({"id": f"d{i}", **content, **{k: v[i] for k, v in (labels or {}).items()}})
    if text:
        options["tokenizer"] = lambda texts: [[int(word[1:]) for word in t.split()] for t in texts]
    starts = np.cumsum([0, *lengths])
    depth, _, features = values.shape
    options = {"model": "made of numbers", "batch_tokens": max(32, max(lengths)), **options}
    with flexcache.record(path, documents, sites={"resid_post": (depth, features)}, dtype=dtype, **options) as recorder:
        place = corpus_rows(recorder.store, starts)
        for batch in recorder.batches():
            for layer in range(depth):
                recorder.put("resid_post", values[layer][place[batch.rows]], rows=batch.rows, layer=layer)
    return flexcache.open(path)


def corpus_rows(store: flexcache.Store, starts: np.ndarray) -> np.ndarray:
    """Return the index of the token of every row in corpus order."""
    source = store.documents["source_index"].to_numpy()
    document, position = store.coordinates["document"].values, store.coordinates["position"].values
    return np.asarray(starts[source[document]] + position)
