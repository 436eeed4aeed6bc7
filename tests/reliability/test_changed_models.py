"""Whatever uses a model with a store, or two stores together, refuses a model that computes something else."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import flexcache
from analysis import probes, replay
from flexcache.errors import AnalysisError, MismatchError
from flexcache.store.merging import merge
from tests.corpora import lengths, token_documents
from tests.models import VOCABULARY, tiny

DOCUMENTS = token_documents(lengths(40, longest=20), vocabulary=VOCABULARY)
QUIET: dict[str, Any] = {"progress": False, "batch_tokens": 128}


@pytest.fixture(scope="module")
def adapted() -> peft.PeftModel:
    torch.set_num_threads(1)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names of transformers that peft still uses
        return peft.get_peft_model(tiny("llama"), config).eval()


@pytest.fixture(scope="module")
def store(adapted: peft.PeftModel, tmp_path_factory: pytest.TempPathFactory) -> flexcache.Store:
    return flexcache.capture(adapted, None, DOCUMENTS, tmp_path_factory.mktemp("on") / "run.zarr", **QUIET)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


USES: dict[str, Callable[[torch.nn.Module, flexcache.Store], Any]] = {
    "extend by documents": lambda model, store: flexcache.extend(
        model, None, store.path, documents=[{"id": "new", "tokens": [5, 6], "label": "odd", "score": 1.0}], **QUIET
    ),
    "extend by a site": lambda model, store: flexcache.extend(model, None, store.path, sites=["mlp_out"], **QUIET),
    "recompute": lambda model, store: flexcache.recompute(model, store.path, units=1),
    "replay": lambda model, store: replay.identity_error(store, model, layer=1),
    "a sweep of edits": lambda model, store: replay.sweep(
        store, model, replay.grid(layers=1), replay.Zero(), metrics=["kl"], progress=False
    ),
}


@pytest.mark.parametrize("use", USES)
def test_an_adapter_that_is_off_is_refused_by_name(use: str, adapted: peft.PeftModel, store: flexcache.Store) -> None:
    with adapted.disable_adapter(), pytest.raises(MismatchError, match="adapter default: active.*inactive"):
        USES[use](adapted, store)


@pytest.mark.parametrize("use", USES)
def test_a_steering_hook_is_refused_by_name(use: str, adapted: peft.PeftModel, store: flexcache.Store) -> None:
    block = adapted.base_model.model.model.layers[1]
    handle = block.register_forward_hook(lambda module, args, output: output + 0.1)
    try:
        with pytest.raises(MismatchError, match=r"hooks: none before.*layers.1"):
            USES[use](adapted, store)
    finally:
        handle.remove()


def test_what_stands_in_the_way_of_a_replay_is_weights_or_behavior(
    adapted: peft.PeftModel, store: flexcache.Store
) -> None:
    assert replay.obstacles(store, adapted) == {}
    assert replay.identity_error(store, adapted, layer=1) == 0
    with adapted.disable_adapter():
        assert set(replay.obstacles(store, adapted)) == {"behavior"}
        assert replay.identity_error(store, adapted, layer=1, accept=["behavior"]) >= 0
    other = tiny("llama")
    assert set(replay.obstacles(store, other)) == {"weights"}


def test_stores_of_two_models_with_equal_weights_are_told_apart(
    adapted: peft.PeftModel, store: flexcache.Store, tmp_path: Path
) -> None:
    """The adapter is on in one and off in the other: probes are not transferred, and stores not merged."""
    with adapted.disable_adapter():
        off = flexcache.capture(adapted, None, DOCUMENTS, tmp_path / "off.zarr", sites=["resid_pre"], **QUIET)
        same = flexcache.capture(adapted, None, DOCUMENTS, tmp_path / "same.zarr", **QUIET)
    with pytest.raises(MismatchError, match=r"(?s)do not belong together.*adapter default"):
        merge([store.path, off.path], tmp_path / "both.zarr")
    asked: dict[str, Any] = {"site": "resid_post", "layers": [1], "rows": "last", "resamples": 10, "baselines": ()}
    found = probes.sweep(store, "label", cv=3, **asked)
    direction = found.to_direction(1)
    direction.check(store)
    with pytest.raises(AnalysisError, match=r"(?s)another model.*adapter default"):
        direction.check(same)
    with pytest.raises(AnalysisError, match="another model"):
        probes.transfer(found, same, resamples=10)
    direction.save(tmp_path / "direction.safetensors")
    with pytest.raises(AnalysisError, match="another model"):
        probes.load_direction(tmp_path / "direction.safetensors").check(same)
