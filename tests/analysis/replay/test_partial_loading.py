from __future__ import annotations

from pathlib import Path

import pytest
import torch

import flexcache
from analysis import replay
from analysis.replay.engine.identity import Discrepancy, compare_logits
from flexcache.errors import ConfigError, MismatchError
from flexcache.model import ModelSource
from tests.corpora import token_documents
from tests.models import VOCABULARY, tiny

DOCUMENTS = token_documents([5, 7, 6, 3], vocabulary=VOCABULARY)


@pytest.fixture(params=["llama", "gpt2", "gemma3"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[flexcache.Store, ModelSource]:
    folder = tmp_path / "model"
    tiny(request.param).save_pretrained(folder)
    source = ModelSource(name=str(folder))
    store = flexcache.capture(
        source.load(), None, DOCUMENTS, tmp_path / "run.zarr", model_info={"files": source.weights()}, progress=False
    )
    return store, source


def test_a_partly_loaded_model_computes_the_same_logits(saved: tuple[flexcache.Store, ModelSource]) -> None:
    store, source = saved
    whole, rest = replay.Engine(store, source.load()), replay.Engine(store, replay.load_rest(source, after=2))
    held = sum(p.numel() for p in rest.model.parameters() if not p.is_meta)
    assert held < 0.6 * sum(p.numel() for p in whole.model.parameters())
    for batch in whole.batches():
        for layer in (2, 3):
            start = rest.start_at("resid_post", layer)
            mine, theirs = rest.run(batch, start).logits, whole.run(batch).logits
            assert compare_logits(mine, theirs, batch) == Discrepancy(0.0, 0.0)


def test_another_checkpoint_is_rejected(saved: tuple[flexcache.Store, ModelSource], tmp_path: Path) -> None:
    store, source = saved
    model = source.load()
    with torch.no_grad():
        next(iter(model.parameters())).add_(0.1)
    model.save_pretrained(tmp_path / "other")
    other = replay.load_rest(ModelSource(name=str(tmp_path / "other")), after=1)
    with pytest.raises(MismatchError, match="cannot be replayed"):
        replay.Engine(store, other)
    with pytest.raises(ConfigError, match="no such block"):
        replay.load_rest(source, after=4)


def test_a_checkpoint_whose_tensors_are_renamed_on_loading_raises_an_error(tmp_path: Path) -> None:
    tiny("gpt_neox").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="are named differently"):
        replay.load_rest(ModelSource(name=str(tmp_path)), after=1)
    with pytest.raises(ConfigError, match="cannot be loaded|has no safetensors"):
        replay.load_rest(ModelSource(name=str(tmp_path / "nowhere")), after=1)
