"""Small corpora of tokens, and stores of values that a test can compute again from row numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import flexcache
from flexcache.array_spec import ArraySpec, divide_layers
from flexcache.documents import open_documents
from flexcache.identity.tokenizer import describe_tokenizer
from flexcache.recording.planning.planning import PlanInputs
from flexcache.recording.planning.store_plan import plan_store
from flexcache.site import resolve_layers
from flexcache.spec import CaptureSpec
from flexcache.store.storage.location import parse_location


def token_documents(lengths: list[int], seed: int = 0, vocabulary: int = 257) -> list[dict[str, Any]]:
    """Documents of these lengths with random tokens, a label and a score."""
    rng = np.random.default_rng(seed)
    return [
        {
            "id": f"doc-{index}",
            "tokens": rng.integers(3, vocabulary, size=length).tolist(),
            "label": ("even", "odd")[index % 2],
            "score": index / 7,
        }
        for index, length in enumerate(lengths)
    ]


def lengths(count: int, longest: int = 40, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(1, longest + 1, size=count).tolist()


def activation(token_id: np.ndarray, position: np.ndarray, layer: int, features: int) -> np.ndarray:
    """A float32 value for each token, position, layer and feature; distinct in every dim."""
    rows = token_id[..., None] * 0.37 + position[..., None] * 1.7 + layer * 31.0
    return (rows + np.arange(features) * 0.01).astype(np.float32)


def padded_activation(batch: Any, layer: int, features: int) -> np.ndarray:
    ids = batch.input_ids(pad=0)
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    return activation(ids, positions, layer, features)


SITES = {"resid_post": (5, 24), "model.embed": 6}
LAYERS = [0, 3]


def open_recorder(path: Path, documents: Any, **options: Any) -> flexcache.Recorder:
    settings: dict[str, Any] = {"sites": SITES, "layers": LAYERS, "model": "arithmetic", "batch_tokens": 128}
    return flexcache.record(path, documents, **{**settings, **options})


def plan_virtual(
    path: Any, documents: Any, sites: dict[str, tuple[int, int]], keep: dict[str, Any], **fields: Any
) -> None:
    """Plan a store with virtual layers, which only a capture of a model does otherwise."""
    spec = CaptureSpec(**{"sites": list(sites), "keep": keep, "dtype": "bfloat16", **fields})
    arrays = [
        divide_layers(
            ArraySpec(name, name, resolve_layers(spec.sites[name], depth), depth, features, "hidden", spec.dtype), keep
        )
        for name, (depth, features) in sites.items()
    ]
    model = {"name": "arithmetic", "class": "arithmetic"}
    identity = describe_tokenizer(None, False, None)
    plan_store(parse_location(path), PlanInputs(open_documents(documents), None, arrays, spec, model, identity))


def put_batch(recorder: flexcache.Recorder, batch: Any) -> None:
    for name, array in recorder.store.arrays.items():
        for layer in array.captured:
            values = batch.kept(padded_activation(batch, layer or 0, array.features))
            recorder.put(name, values, rows=batch.rows, layer=layer)


def build_store(path: Path, documents: Any = None, **options: Any) -> flexcache.Store:
    """A complete store of `activation` values."""
    with open_recorder(path, token_documents(lengths(120)) if documents is None else documents, **options) as recorder:
        for batch in recorder.batches():
            put_batch(recorder, batch)
    return flexcache.open(path)


def expected_rows(store: flexcache.Store, layer: int, features: int) -> np.ndarray:
    token_id, position = (store.coordinates[name].values for name in ("token_id", "position"))
    return activation(token_id, position, layer, features)
