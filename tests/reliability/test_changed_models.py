"""All functions that use a model with a store, or two stores, raise an error for a model that computes differently."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import flexcache
from analysis import probes, replay
from flexcache.errors import AnalysisError, MismatchError, StoreError
from flexcache.store.manage.merge import merge
from tests.corpora import lengths, token_documents
from tests.models import VOCABULARY, tiny

DOCUMENTS = token_documents([*lengths(40, longest=20), 33, 34, 35], vocabulary=VOCABULARY)
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


def late(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    """Steer tokens that are not in the fixed input."""
    return torch.cat([output[:, :26], output[:, 26:] + 0.1], dim=1)


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
def test_a_disabled_adapter_raises_an_error_that_names_it(
    use: str, adapted: peft.PeftModel, store: flexcache.Store
) -> None:
    with adapted.disable_adapter(), pytest.raises(MismatchError, match="adapter default: active.*inactive"):
        USES[use](adapted, store)


@pytest.mark.parametrize("use", USES)
def test_a_steering_hook_raises_an_error_that_names_it(
    use: str, adapted: peft.PeftModel, store: flexcache.Store
) -> None:
    block = adapted.base_model.model.model.layers[1]
    handle = block.register_forward_hook(lambda module, args, output: output + 0.1)
    try:
        with pytest.raises(MismatchError, match=r"hooks: none before.*layers.1"):
            USES[use](adapted, store)
    finally:
        handle.remove()


def test_an_obstacle_to_a_replay_is_weights_or_behavior(adapted: peft.PeftModel, store: flexcache.Store) -> None:
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
    """The adapter is enabled in one store only, so probes are not transferred and stores not merged."""
    with adapted.disable_adapter():
        off = flexcache.capture(adapted, None, DOCUMENTS, tmp_path / "off.zarr", sites=["resid_pre"], **QUIET)
        same = flexcache.capture(adapted, None, DOCUMENTS, tmp_path / "same.zarr", **QUIET)
    with pytest.raises(MismatchError, match=r"(?s)cannot be merged.*adapter default"):
        merge([store.path, off.path], tmp_path / "both.zarr")
    asked: dict[str, Any] = {"site": "resid_post", "layers": [1], "rows": "last", "resamples": 10, "baselines": ()}
    found = probes.sweep(store, "label", cv=3, **asked)
    direction = found.to_direction(1)
    direction.check(store)
    with pytest.raises(AnalysisError, match=r"(?s)another model.*adapter default"):
        direction.check(same)
    with pytest.raises(AnalysisError, match="another model"):
        probes.transfer(found, same, resamples=10)
    compared = probes.transfer(found, same, resamples=10, other_model=True)
    own = probes.transfer(found, store, resamples=10)
    assert (compared["score"].values != own["score"].values).any(), "the scores are those of the other activations"
    direction.save(tmp_path / "direction.safetensors")
    with pytest.raises(AnalysisError, match="another model"):
        probes.load_direction(tmp_path / "direction.safetensors").check(same)


@pytest.mark.parametrize("use", [use for use in USES if use != "recompute"])
def test_a_hook_on_later_tokens_is_found_by_a_stored_batch(
    use: str, adapted: peft.PeftModel, store: flexcache.Store
) -> None:
    handle = adapted.base_model.model.model.layers[1].register_forward_hook(late)
    try:
        with pytest.raises(MismatchError, match="arrays and layers differ"):
            USES[use](adapted, store)
    finally:
        handle.remove()


def test_an_adapter_disabled_during_a_run_ends_it_before_the_unit_is_committed(
    adapted: peft.PeftModel, tmp_path: Path
) -> None:
    calls: list[int] = []

    def norms(values: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 12:
            adapted.base_model.disable_adapter_layers()
        return values.norm(dim=-1, keepdim=True)

    path = tmp_path / "run.zarr"
    try:
        with pytest.raises(MismatchError, match=r"(?s)adapter default: active.*inactive.*changed during the run"):
            flexcache.capture(
                adapted,
                None,
                DOCUMENTS,
                path,
                transforms=[flexcache.Transform("norms", "resid_post", norms, layers=[1])],
                **QUIET,
            )
    finally:
        adapted.base_model.enable_adapter_layers()
    assert not flexcache.open(path).complete


def test_units_of_another_model_are_part_of_the_recorded_model(tmp_path: Path) -> None:
    path, model = tmp_path / "run.zarr", tiny("llama")
    flexcache.capture(model, None, DOCUMENTS, path, **QUIET)
    asked: dict[str, Any] = {"site": "resid_post", "layers": [1], "rows": "last", "resamples": 10, "baselines": ()}
    direction = probes.sweep(flexcache.open(path), "label", cv=3, **asked).to_direction(1)
    model.model.layers[0].mlp.up_proj.weight.data.mul_(1.5)
    new = [{**document, "id": f"new-{document['id']}"} for document in DOCUMENTS]
    grown = flexcache.extend(model, None, path, new, allow_changed_model=True, **QUIET)
    assert grown.complete
    assert "other_models" in replay.obstacles(grown, tiny("llama"))["weights"]
    with pytest.raises(AnalysisError, match="other_models"):
        direction.check(grown)


def test_a_live_model_that_is_scored_must_be_that_of_the_direction(tmp_path: Path) -> None:
    model, texts = tiny("llama"), ["a"]
    store = flexcache.capture(model, None, DOCUMENTS, tmp_path / "run.zarr", **QUIET)
    asked: dict[str, Any] = {"site": "resid_post", "layers": [1], "rows": "last", "resamples": 10, "baselines": ()}
    direction = probes.sweep(store, "label", cv=3, **asked).to_direction(1)

    def tokenizer(text: str, return_tensors: str) -> Any:
        from transformers import BatchEncoding

        return BatchEncoding({"input_ids": torch.tensor([[5, 6, 7]])})

    assert direction.score_model(model, tokenizer, texts)[0].shape == (3,)
    model.model.layers[0].mlp.up_proj.weight.data.mul_(1.5)
    with pytest.raises(AnalysisError, match="up_proj|weights"):
        direction.score_model(model, tokenizer, texts)
    assert direction.score_model(model, tokenizer, texts, allow_changed_model=True)[0].shape == (3,)


def test_a_changed_rest_of_a_checkpoint_raises_an_error(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "model")
    source = flexcache.ModelSource(name=str(tmp_path / "model"))
    info = {"files": source.weights()}
    store = flexcache.capture(source.load(), None, DOCUMENTS, tmp_path / "run.zarr", model_info=info, **QUIET)
    rest = replay.load_rest(source, after=1)
    assert replay.obstacles(store, rest) == {}
    handle = rest.model.layers[3].register_forward_hook(late)
    assert "hooks" in replay.obstacles(store, rest)["behavior"]
    handle.remove()
    rest.model.layers[3].mlp.up_proj.weight.data.mul_(3)
    assert "changed after they were loaded" in replay.obstacles(store, rest)["weights"]


def test_a_steered_model_with_experts_raises_an_error_although_its_forwards_differ_in_bits(tmp_path: Path) -> None:
    path, model = tmp_path / "run.zarr", tiny("mixtral")
    flexcache.capture(model, None, DOCUMENTS, path, **QUIET)
    flexcache.capture(tiny("mixtral"), None, DOCUMENTS, path, **QUIET)
    model.model.layers[1].register_forward_hook(lambda module, args, output: output * 1.0004)
    with pytest.raises(MismatchError, match=r"(?s)hooks: none before.*under the same conditions"):
        flexcache.capture(model, None, DOCUMENTS, path, **QUIET)


MALFORMED: dict[str, Any] = {
    "identity": "x",
    "identity.behavior": "x",
    "identity.behavior.sketches": "!",
    "identity.behavior.names": None,
    "identity.behavior.bits": 5,
    "identity.computed": {"model.rotary_emb.inv_freq": 5},
    "identity.structure": {"settings": "x", "modules": [1]},
}


@pytest.mark.parametrize("key", MALFORMED)
def test_a_malformed_record_of_a_model_is_one_clear_error_or_none(key: str, tmp_path: Path) -> None:
    path, model = tmp_path / "run.zarr", tiny("llama")
    store = flexcache.capture(model, None, DOCUMENTS, path, **QUIET)
    content = json.loads((path / "zarr.json").read_text())
    held = content["attributes"]["flexcache"]["provenance"]["model"]
    *parents, last = key.split(".")
    for part in parents:
        held = held[part]
    held[last] = MALFORMED[key]
    (path / "zarr.json").write_text(json.dumps(content))
    assert flexcache.open(path).read("resid_post", layer=1).shape == store.read("resid_post", layer=1).shape
    model.model.layers[1].register_forward_hook(lambda module, args, output: output + 0.1)
    for use in (
        lambda: flexcache.capture(model, None, DOCUMENTS, path, **QUIET),
        lambda: USES["replay"](model, flexcache.open(path)),
    ):
        with pytest.raises(StoreError):
            use()


def test_settings_that_change_no_activation_do_not_matter(tmp_path: Path) -> None:
    path, model = tmp_path / "run.zarr", tiny("llama")
    model.config.note, model.config.odd = float("nan"), {1: object(), "b": {3, 2}}
    flexcache.capture(model, None, DOCUMENTS, path, **QUIET)
    model.config.pad_token_id, model.config.eos_token_id, model.config.use_cache = 7, [2, 3], False
    model.config.odd = {1: object(), "b": {2, 3}}
    assert flexcache.capture(model, None, DOCUMENTS, path, **QUIET).complete


def test_a_module_that_counts_its_calls_is_the_same_model(tmp_path: Path) -> None:
    path, model = tmp_path / "run.zarr", tiny("llama")
    model.register_buffer("seen", torch.zeros(1))
    model.calls = torch.zeros(1)

    def count(module: torch.nn.Module, args: tuple) -> None:
        model.seen += 1
        model.calls = model.calls + 1

    model.register_forward_pre_hook(count)
    flexcache.capture(model, None, DOCUMENTS, path, **QUIET)
    assert flexcache.capture(model, None, DOCUMENTS, path, **QUIET).complete
