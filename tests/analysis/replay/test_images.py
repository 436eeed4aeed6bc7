"""Replay of image models: the store's pixels and processor, and a stored residual stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

import flexcache
from analysis import replay
from flexcache.errors import AnalysisError, MismatchError
from tests.recording.test_images import by_hand
from tests.vision import DEPTH, image_documents, processor, tiny_vision

DOCUMENTS = image_documents(10)
QUIET: dict[str, Any] = {"progress": False, "batch_tokens": 48}
OTHERS = [
    "deit",
    "beit",
    "dinov2_registers",
    "dinov3",
    "siglip_vision",
    "ijepa",
    "yolos",
    "data2vec_vision",
]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    "family", ["vit", "clip_vision", *(pytest.param(family, marks=pytest.mark.slow) for family in OTHERS)]
)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_a_replay_from_any_layer_gives_the_same_bits(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_vision(family, dtype)
    store = flexcache.capture(model, processor(), DOCUMENTS, tmp_path / "run.zarr", **QUIET)
    assert [replay.identity_error(store, model, layer=layer) for layer in range(DEPTH)] == [0.0] * DEPTH


def test_class_scores_and_a_function_as_processor_replay_exactly(tmp_path: Path) -> None:
    settings = tiny_vision("vit").config
    settings.num_labels = 5
    torch.manual_seed(0)
    model = hf.ViTForImageClassification._from_config(settings).eval()
    store = flexcache.capture(model, by_hand, DOCUMENTS, tmp_path / "run.zarr", **QUIET)
    with pytest.raises(MismatchError, match="cannot be rebuilt"):
        replay.identity_error(store, model)
    assert replay.identity_error(store, model, layer=1, processor=by_hand) == 0.0


def test_an_edit_of_one_patch_changes_the_output(tmp_path: Path) -> None:
    model = tiny_vision("vit")
    store = flexcache.capture(model, processor(), DOCUMENTS, tmp_path / "run.zarr", **QUIET)
    engine = replay.Engine(store, model)
    (batch, *_) = engine.batches()
    start, patch = engine.start_at("resid_post", 0), store.patches.position(1, 1)
    place = (np.array([0]), np.array([patch]))
    edited = engine.run(batch, start, [replay.PlacedEdit(engine.point("resid_post", 0), replay.Zero(), place)]).logits
    plain = engine.run(batch).logits
    changed = (edited != plain).flatten(1).any(1).tolist()
    assert changed == [True, *[False] * (len(changed) - 1)]


def test_sweeps_and_attribution_by_next_tokens_raise_an_error(tmp_path: Path) -> None:
    model = tiny_vision("vit")
    store = flexcache.capture(model, processor(), DOCUMENTS, tmp_path / "run.zarr", **QUIET)
    with pytest.raises(AnalysisError, match="the documents are images"):
        replay.sweep(store, model, replay.Zero())
