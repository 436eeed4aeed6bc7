"""The states that inference engines give: fewer than tokens after a cached prefix, or a capture for each chunk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import flexcache
from flexcache.errors import CaptureError
from tests.corpora import lengths, token_documents
from tests.models import tiny

DOCUMENTS = token_documents(lengths(12, 20), vocabulary=60)
BLOCK = 1


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


@contextmanager
def captures(model: Any) -> Iterator[list[np.ndarray]]:
    """Yield what a hook on the output of a block appends: one array for each call of the block."""
    seen: list[np.ndarray] = []

    def append(module: Any, arguments: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output)[0].numpy())

    handle = model.model.layers[BLOCK].register_forward_hook(append)
    try:
        yield seen
    finally:
        handle.remove()


def prefill(model: Any, tokens: np.ndarray, chunk: int, cached: int = 0) -> list[np.ndarray]:
    """Return the captures of a prompt that is computed in chunks, each after the cache of those before.

    The captures of the first *cached* tokens are left out, as if their cache were there from another prompt.
    """
    cache = DynamicCache(config=model.config)
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    with torch.no_grad(), captures(model) as seen:
        if cached:
            model(ids[:, :cached], past_key_values=cache)
            seen.clear()
        for start in range(cached, ids.shape[1], chunk):
            model(ids[:, start : start + chunk], past_key_values=cache)
        return list(seen)


def recorder(path: Path, model: Any, rows: Any = "all") -> flexcache.Recorder:
    sizes = {"resid_post": (model.config.num_hidden_layers, model.config.hidden_size)}
    options: dict[str, Any] = {"layers": [BLOCK], "dtype": "float32", "batch_tokens": 32, "rows": rows}
    return flexcache.record(path, DOCUMENTS, sites=sizes, model="tiny", **options)


def fill(recorder: flexcache.Recorder, states: Any) -> flexcache.Store:
    with recorder:
        for batch in recorder.batches():
            recorder.put("resid_post", batch.kept(states(batch)), rows=batch.rows, layer=BLOCK)
    return flexcache.open(recorder.store.path)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_joined_captures_of_chunks_are_those_of_a_whole_forward(model: Any, chunk: int, tmp_path: Path) -> None:
    whole = flexcache.capture(
        model, None, DOCUMENTS, tmp_path / "whole.zarr", sites=["resid_post"], layers=[BLOCK], dtype="float32",
        batch_tokens=32,
    )  # fmt: skip

    def states(batch: Any) -> list[np.ndarray]:
        return [np.concatenate(prefill(model, tokens, chunk)) for tokens in batch.tokens]

    store = fill(recorder(tmp_path / "chunks.zarr", model), states)
    np.testing.assert_allclose(store.read("resid_post", BLOCK), whole.read("resid_post", BLOCK), atol=1e-4)


@pytest.mark.parametrize("rows", ["all", "mean"])
def test_states_may_be_torch_tensors_in_bfloat16(model: Any, rows: str, tmp_path: Path) -> None:
    def states(batch: Any) -> list[torch.Tensor]:
        captured = [np.concatenate(prefill(model, tokens, 100)) for tokens in batch.tokens]
        return [torch.from_numpy(array).bfloat16().requires_grad_() for array in captured]

    store = fill(recorder(tmp_path / "torch.zarr", model, rows), states)
    rounded = fill(
        recorder(tmp_path / "numpy.zarr", model, rows),
        lambda batch: [tensor.detach().float().numpy() for tensor in states(batch)],
    )
    assert np.array_equal(store.read("resid_post", BLOCK), rounded.read("resid_post", BLOCK))


@pytest.mark.parametrize("rows", ["all", "last"])
def test_a_capture_for_each_chunk_is_refused(model: Any, rows: str, tmp_path: Path) -> None:
    def states(batch: Any) -> list[np.ndarray]:
        return [capture for tokens in batch.tokens for capture in prefill(model, tokens, 3)]

    with pytest.raises(CaptureError, match="one array for each sequence") as caught:
        fill(recorder(tmp_path / "run.zarr", model, rows), states)
    assert "chunks" in str(caught.value)
    assert flexcache.open(tmp_path / "run.zarr").committed_rows.size == 0


@pytest.mark.parametrize("rows", ["all", "last", "first"])
@pytest.mark.parametrize("which", [0, -1])
def test_one_chunk_in_place_of_the_prompt_is_refused(model: Any, rows: Any, which: int, tmp_path: Path) -> None:
    def states(batch: Any) -> list[np.ndarray]:  # a dict of captures by prompt, overwritten by each chunk
        return [prefill(model, tokens, 3)[which] for tokens in batch.tokens]

    with pytest.raises(CaptureError, match="one state for each token"):
        fill(recorder(tmp_path / "run.zarr", model, rows), states)


@pytest.mark.parametrize("rows", ["all", "last", "first", "mean"])
def test_fewer_states_than_tokens_are_refused(model: Any, rows: Any, tmp_path: Path) -> None:
    def states(batch: Any) -> list[np.ndarray]:
        reused = [min(4, len(tokens) - 1) for tokens in batch.tokens]
        pairs = zip(batch.tokens, reused, strict=True)
        return [np.concatenate(prefill(model, tokens, 100, cached)) for tokens, cached in pairs]

    with pytest.raises(CaptureError, match="one state for each token") as caught:
        fill(recorder(tmp_path / "run.zarr", model, rows), states)
    assert "prefix caching" in str(caught.value)


def test_more_states_than_tokens_are_refused_in_a_list_and_are_padding_in_an_array(model: Any, tmp_path: Path) -> None:
    def states(batch: Any) -> list[np.ndarray]:  # with the state of a token that the engine has put in front
        extended = [np.concatenate([[1], tokens]) for tokens in batch.tokens]
        return [np.concatenate(prefill(model, tokens, 100)) for tokens in extended]

    with pytest.raises(CaptureError, match="one state for each token"):
        fill(recorder(tmp_path / "run.zarr", model), states)

    def padded(batch: Any, extra: int) -> np.ndarray:
        out = np.full((batch.shape[0], batch.shape[1] + extra, model.config.hidden_size), np.nan, np.float32)
        for line, tokens in enumerate(batch.tokens):
            out[line, : len(tokens)] = np.concatenate(prefill(model, tokens, 100))
        return out

    stores = [fill(recorder(tmp_path / f"{extra}.zarr", model), lambda b, n=extra: padded(b, n)) for extra in (0, 2)]
    assert np.array_equal(*[store.read("resid_post", BLOCK) for store in stores])
    with pytest.raises(CaptureError, match="one state for each token"):
        fill(recorder(tmp_path / "short.zarr", model), lambda batch: padded(batch, 0)[:, 1:])


def test_rows_of_one_chunk_are_refused_by_put_with_the_reason(model: Any, tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="wrong shape") as caught, recorder(tmp_path / "run.zarr", model) as run:
        for batch in run.batches():
            run.put("resid_post", prefill(model, batch.tokens[0], 1)[0], rows=batch.rows, layer=BLOCK)
    assert "prefix caching" in str(caught.value)


def test_padded_activations_of_one_chunk_are_refused_with_the_reason(model: Any, tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="wrong shape") as caught, recorder(tmp_path / "run.zarr", model) as run:
        for batch in run.batches():
            chunks = [prefill(model, tokens, 1)[0] for tokens in batch.tokens]
            run.record("resid_post", BLOCK, np.stack(chunks))
    assert "computed in chunks" in str(caught.value)
