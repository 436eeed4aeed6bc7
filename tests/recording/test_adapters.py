"""Captures of models with PEFT adapters: how they are named, loaded, combined, recorded and told apart."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

import flexcache
from analysis import lens, replay
from flexcache import ModelSource
from flexcache.errors import AnalysisError, ConfigError, MismatchError
from tests.adapters import load_with_peft, save_adapter
from tests.corpora import lengths, token_documents
from tests.models import VOCABULARY, tiny
from tests.recording.test_recorder import shard_hashes

DOCUMENTS = token_documents(lengths(12, longest=14), vocabulary=VOCABULARY)
QUIET: dict[str, Any] = {"progress": False, "batch_tokens": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("models")
    tiny("llama").save_pretrained(root / "base")
    save_adapter(root / "base", root / "a", 1)
    save_adapter(root / "base", root / "b", 2, r=8, target_modules=["q_proj", "down_proj"], use_rslora=True)
    return root


@pytest.fixture(autouse=True)
def _here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.chdir(folder)


def delta(folder: Path, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a LoRA adapter adds to each weight, from its file."""
    from safetensors.torch import load_file

    said = json.loads((folder / "adapter_config.json").read_text())
    scale = said["lora_alpha"] / (said["r"] ** 0.5 if said["use_rslora"] else said["r"])
    held = load_file(folder / "adapter_model.safetensors")
    return {
        name.removeprefix("base_model.model.").replace("lora_A.", ""): scale * held[name.replace("_A.", "_B.")] @ value
        for name, value in held.items()
        if "lora_A" in name
    }


def plain(changes: dict[str, float]) -> torch.nn.Module:
    """The base model, with the changes of adapters added to its weights by hand."""
    model = transformers.AutoModelForCausalLM.from_pretrained("base")
    for adapter, weight in changes.items():
        for name, value in delta(Path(adapter), model).items():
            model.get_parameter(name).data += weight * value
    return model.eval()


def residuals(model: torch.nn.Module, tokens: list[int]) -> list[np.ndarray]:
    """The output of each block for one document, by plain hooks."""
    found: list[np.ndarray] = []
    handles = [
        block.register_forward_hook(lambda _, args, output: found.append(output[0].detach().numpy()))
        for block in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([tokens]))
    for handle in handles:
        handle.remove()
    return found


def check_against(store: flexcache.Store, model: torch.nn.Module) -> None:
    for document in store.documents.to_pylist():
        rows = np.arange(document["row_start"], document["row_start"] + document["n_rows"])
        tokens = store.coordinates["token_id"].values[rows].tolist()
        for layer, expected in enumerate(residuals(model, tokens)):
            np.testing.assert_allclose(store.read("resid_post", layer=layer, rows=rows), expected, atol=2e-5)


SOURCES: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "a folder with an adapter as the model": ({"name": "a"}, {"a": 1}),
    "an adapter alone, which names its base": ({"adapter": "a"}, {"a": 1}),
    "an adapter with its base": ({"name": "base", "adapter": {"path": "a"}}, {"a": 1}),
    "a weight": ({"adapter": {"path": "b", "weight": -0.5}}, {"b": -0.5}),
    "several": ({"adapter": ["a", "b"]}, {"a": 1, "b": 1}),
    "several with weights": (
        {"adapter": [{"path": "a", "weight": 0.7}, {"path": "b", "weight": 0.3}]},
        {"a": 0.7, "b": 0.3},
    ),
    "merged": ({"name": "a", "merge": True}, {"a": 1}),
    "several with weights, merged": ({"adapter": ["a", {"path": "b", "weight": 2}], "merge": True}, {"a": 1, "b": 2}),
}


@pytest.mark.parametrize("what", SOURCES)
def test_a_store_holds_the_activations_of_the_base_with_its_adapters(what: str, tmp_path: Path) -> None:
    given, changes = SOURCES[what]
    source = ModelSource(**given)
    store = flexcache.capture(source, None, DOCUMENTS, tmp_path / "run.zarr", **QUIET)
    check_against(store, plain(changes))
    recorded = store.provenance.model["adapters"]
    assert {one["name"]: one["weight"] for one in recorded} == changes
    assert all(one["merged"] == source.merge and one["files"] for one in recorded)
    assert all(f"{name} (" in str(store) for name in changes)
    shapes = [
        {name: value.shape for name, value in model.state_dict().items()}
        for model in (source.load(), source.skeleton())
    ]
    assert shapes[0] == shapes[1]
    found = flexcache.recompute(source, store.path, units=1)
    assert all(one.equal for one in found)


def test_an_adapter_of_a_source_is_that_of_peft(tmp_path: Path) -> None:
    """The same bytes and the same identity, so that either resumes the store of the other."""
    ours = flexcache.capture(ModelSource(name="a"), None, DOCUMENTS, tmp_path / "ours.zarr", **QUIET)
    model = load_with_peft(Path("base"), Path("a"))
    theirs = flexcache.capture(model, None, DOCUMENTS, tmp_path / "theirs.zarr", **QUIET)
    assert shard_hashes(ours.path) == shard_hashes(theirs.path)
    flexcache.capture(model, None, DOCUMENTS, ours.path, **QUIET)
    flexcache.capture("a", None, DOCUMENTS, theirs.path, **QUIET)
    assert replay.identity_error(ours, model, layer=1) == 0
    extended = flexcache.extend("a", None, path=ours.path, sites=["mlp_out"], **QUIET)
    assert "mlp_out" in extended.arrays


@pytest.mark.parametrize(
    ("other", "found"),
    [
        ({"name": "b"}, r"adapters: a \(\w+\), weight 1.0 before, b \(\w+\), weight 1.0 now"),
        ({"name": "base"}, r"adapters: a \(\w+\), weight 1.0 before, none now"),
        ({"name": "a", "merge": True}, "weight 1.0, merged now"),
        ({"adapter": {"path": "a", "weight": 0.5}}, "weight 0.5 now"),
        ({"adapter": ["a", "b"]}, r"now"),
    ],
)
@pytest.mark.parametrize("use", ["resume", "recompute", "replay"])
def test_another_adapter_is_refused_by_its_name(use: str, other: Any, found: str, tmp_path: Path, folder: Path) -> None:
    path = folder / "of-a.zarr"
    store = flexcache.capture("a", None, DOCUMENTS, path, **QUIET)
    model = ModelSource(**other).load()
    with pytest.raises(MismatchError, match=rf"(?s){found}"):
        if use == "resume":
            flexcache.capture(model, None, DOCUMENTS, path, **QUIET)
        elif use == "recompute":
            flexcache.recompute(model, path)
        else:
            replay.identity_error(store, model, layer=1)


def test_a_module_path_is_the_same_with_and_without_an_adapter(tmp_path: Path) -> None:
    sites = ["model.layers.*.mlp", "**.o_proj", "model.norm"]
    with_adapter = flexcache.capture("a", None, DOCUMENTS, tmp_path / "a.zarr", sites=sites, **QUIET)
    base = flexcache.capture("base", None, DOCUMENTS, tmp_path / "base.zarr", sites=sites, **QUIET)
    assert list(with_adapter.arrays) == list(base.arrays)
    full = ["base_model.model.model.layers.1.mlp"]
    whole = flexcache.capture("a", None, DOCUMENTS, tmp_path / "full.zarr", sites=full, **QUIET)
    rows = range(whole.n_rows)
    found = with_adapter.read("model.layers.1.mlp", rows=rows)
    np.testing.assert_array_equal(whole.read(full[0], rows=rows), found)


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "falcon", "phi3", "bloom", "gpt_neox", "mixtral"])
def test_sites_are_found_inside_a_peft_model(family: str, tmp_path: Path) -> None:
    """With an adapter that adds nothing, every site holds what it holds without the adapter."""
    model, adapted = tiny(family), tiny(family)
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")  # B is zero
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(adapted, config).eval()
    sites = ["embed", "resid_post", "attn_out", "mlp_out", "q", "v", "z", "final_norm"]
    stores = [
        flexcache.capture(one, None, DOCUMENTS, tmp_path / f"{number}.zarr", sites=sites, **QUIET)
        for number, one in enumerate((model, adapted))
    ]
    assert shard_hashes(stores[0].path) == shard_hashes(stores[1].path)


@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(task_type="CAUSAL_LM", init_ia3_weights=False),
        peft.LoraConfig(r=4, use_dora=True, task_type="CAUSAL_LM", init_lora_weights=False),
        peft.VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_weights=False),
        peft.LoraConfig(r=4, modules_to_save=["norm"], task_type="CAUSAL_LM", init_lora_weights=False),
        peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ],
    ids=["IA3", "DoRA", "VeRA", "modules to save", "prefix tuning"],
)
def test_other_kinds_of_adapters_are_loaded_and_captured(config: Any, tmp_path: Path) -> None:
    save_adapter(Path("base"), tmp_path / "other", 3, config=config)
    source = ModelSource(name=str(tmp_path / "other"))
    source.skeleton()
    store = flexcache.capture(source, None, DOCUMENTS, tmp_path / "run.zarr", **QUIET)
    theirs = load_with_peft(Path("base"), tmp_path / "other")
    for document in store.documents.to_pylist()[:3]:
        rows = np.arange(document["row_start"], document["row_start"] + document["n_rows"])
        tokens = store.coordinates["token_id"].values[rows].tolist()
        with torch.no_grad():
            expected = theirs(input_ids=torch.tensor([tokens]), output_hidden_states=True).hidden_states[2]
        np.testing.assert_allclose(store.read("resid_post", layer=1, rows=rows), expected[0].numpy(), atol=2e-5)


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        peft.PromptEncoderConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ],
    ids=["prompt tuning", "p-tuning"],
)
def test_an_adapter_that_adds_tokens_is_refused_with_the_reason(config: Any, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny("llama"), config).eval()
    with pytest.raises(ConfigError, match=r"(?s)tokens of its own in front.*3 virtual tokens"):
        flexcache.capture(model, None, DOCUMENTS, tmp_path / "run.zarr", **QUIET)
    with model.disable_adapter():
        off = flexcache.capture(model, None, DOCUMENTS, tmp_path / "off.zarr", **QUIET)
    base = flexcache.capture(tiny("llama"), None, DOCUMENTS, tmp_path / "base.zarr", **QUIET)
    assert shard_hashes(off.path) == shard_hashes(base.path)


def test_the_base_of_an_adapter_is_found_from_its_folder(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    shutil.copytree(folder / "a", tmp_path / "adapter")
    shutil.copytree(folder / "base", tmp_path / "base")
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(said | {"base_model_name_or_path": "../base"}))
    monkeypatch.chdir(tmp_path.parent)
    source = ModelSource(name=str(tmp_path / "adapter"))
    assert Path(source.resolved().name) == tmp_path / "base"
    assert source.weights() == ModelSource(name=str(tmp_path / "base")).weights()
    config.write_text(json.dumps(said | {"base_model_name_or_path": None}))
    with pytest.raises(ConfigError, match="does not name its base model"):
        source.load()
    named = ModelSource(name=str(tmp_path / "base"), adapter=str(tmp_path / "adapter"))
    assert type(named.load()).__name__ == "PeftModelForCausalLM"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "a", "adapter": "b"}, "is a PEFT adapter itself"),
        ({"name": "base", "adapter": "nowhere"}, "adapter nowhere cannot be loaded"),
        ({"adapter": "nowhere"}, "adapter nowhere cannot be loaded"),
        ({"name": "a", "loader": "AutoModel"}, "adapter a cannot be loaded into a LlamaModel"),
        ({"name": "shallow", "adapter": "a"}, r"(?s)tensors of adapter a.*layers.2.*the model lacks"),
        ({"name": "gpt2", "adapter": "a"}, "adapter a cannot be loaded into a GPT2LMHeadModel"),
    ],
)
def test_adapters_that_do_not_fit_are_clear_errors(given: dict[str, Any], message: str) -> None:
    if given.get("name") == "gpt2":
        tiny("gpt2").save_pretrained("gpt2")
    if given.get("name") == "shallow":
        tiny("llama", num_hidden_layers=2).save_pretrained("shallow")
    with pytest.raises(ConfigError, match=message):
        ModelSource(**given).load()


def test_mistakes_about_adapters_are_found_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match="has no name"):
        ModelSource()
    with pytest.raises(ConfigError, match="several processes share"):
        ModelSource(adapter="a", parallel={"tensor": 2})
    with pytest.raises(ConfigError, match="did you mean weight"):
        ModelSource(adapter={"path": "a", "wieght": 1})


def test_the_weight_of_another_kind_than_lora_is_refused(tmp_path: Path) -> None:
    config = peft.IA3Config(task_type="CAUSAL_LM")
    save_adapter(Path("base"), tmp_path / "ia3", 3, config=config)
    with pytest.raises(ConfigError, match="applies to LoRA only"):
        ModelSource(adapter={"path": str(tmp_path / "ia3"), "weight": 0.5}).load()


@pytest.mark.parametrize(
    "trained", [{"modules_to_save": ["norm"]}, {"trainable_token_indices": [1, 2]}, {"bias": "lora_only"}], ids=str
)
def test_the_weight_of_an_adapter_that_also_replaces_values_is_refused(trained: dict[str, Any], tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "base", tmp_path / "a", 1, **trained)
    with pytest.raises(ConfigError, match=next(iter(trained))):
        ModelSource(adapter={"path": str(tmp_path / "a"), "weight": 0.5}).load()
    ModelSource(adapter=str(tmp_path / "a")).load()


def test_the_head_of_an_adapter_is_that_of_the_merged_model(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM", init_lora_weights=False)
    save_adapter(Path("base"), tmp_path / "head", 4, config=config)
    source = ModelSource(name=str(tmp_path / "head"))
    expected = delta(tmp_path / "head", source.load())["lm_head.weight"]
    base = transformers.AutoModelForCausalLM.from_pretrained("base").lm_head.weight.detach()
    head = lens.Head.load(tmp_path / "head")
    torch.testing.assert_close(head.weight, base + expected)
    with pytest.raises(AnalysisError, match="the unembedding of the model has an adapter"):
        lens.Head.of(source.load())
    store = flexcache.capture(source, None, DOCUMENTS, tmp_path / "run.zarr", **QUIET)
    with pytest.raises(AnalysisError, match="may change its final norm or unembedding"):
        lens.compute(store, rows=20)


def test_an_adapter_without_peft_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ConfigError, match="pip install peft"):
        ModelSource(name="a").load()


def test_the_rest_of_a_model_with_an_adapter_is_not_loaded_in_part() -> None:
    with pytest.raises(ConfigError, match="loaded whole"):
        replay.load_rest(ModelSource(name="a"), after=1)
