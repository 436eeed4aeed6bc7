"""Variants of one model, captured side by side: the bytes of separate captures, with the lower blocks run once."""

from __future__ import annotations

import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

import flexcache
from analysis import replay
from flexcache import ModelSource
from flexcache.errors import CaptureError, ConfigError, MismatchError
from flexcache.hooks.checks.shared_blocks import count_shared_blocks
from flexcache.recording.run.recorder import Recorder
from tests import processes
from tests.adapters import save_adapter
from tests.corpora import lengths, token_documents
from tests.models import VOCABULARY, tiny, token_ids
from tests.recording.test_recorder import shard_hashes

DOCUMENTS = token_documents(lengths(40, longest=20), vocabulary=VOCABULARY)
SITES: dict[str, Any] = {"sites": ["embed", "resid_pre", "resid_post", "q", "mlp_out", "final_norm"]}
QUIET: dict[str, Any] = {"progress": False, "batch_tokens": 64}
FEW: dict[str, Any] = {"sites": {"resid_post": [0, 3]}, **QUIET}
ADAPTERS: dict[str, Any] = {
    "base": None,
    "upper": "upper",
    "top": "top",
    "head": "head",
    "all": "all",
    "embedding": "embedding",
    "several": [{"path": "upper", "weight": 0.5}, "top"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("models")
    tiny("llama").save_pretrained(root / "base")
    save_adapter(root / "base", root / "upper", 1, layers_to_transform=[2, 3])
    save_adapter(root / "base", root / "top", 2, layers_to_transform=[3], r=8)
    save_adapter(root / "base", root / "head", 3, target_modules=["lm_head"])
    save_adapter(root / "base", root / "all", 4)
    save_adapter(root / "base", root / "embedding", 5, target_modules=["embed_tokens"], layers_to_transform=None)
    return root


@pytest.fixture(autouse=True)
def _here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.chdir(folder)


def tables(store: flexcache.Store) -> list[bytes]:
    return [(store.path / name).read_bytes() for name in ("documents.parquet", "sequences.parquet")]


@pytest.mark.parametrize("merge", [False, True])
def test_each_store_has_the_bytes_of_a_capture_of_that_variant_alone(merge: bool, tmp_path: Path) -> None:
    adapters = {name: ADAPTERS[name] for name in ("base", "upper", "several")} if merge else ADAPTERS
    source = ModelSource(name="base", adapters=adapters, merge=merge)
    stores = flexcache.capture_variants(source, None, DOCUMENTS, tmp_path / "runs", **SITES, **QUIET)
    assert list(stores) == list(adapters)
    for name, one in source.variants().items():
        alone = flexcache.capture(one, None, DOCUMENTS, tmp_path / f"{name}.zarr", **SITES, **QUIET)
        assert shard_hashes(stores[name].path) == shard_hashes(alone.path)
        assert tables(stores[name]) == tables(alone) == tables(stores["base"])
        assert stores[name].provenance.model == alone.provenance.model
        assert flexcache.verify(stores[name].path).sound
    if not merge:
        flexcache.extend("top", None, path=stores["top"].path, sites=["attn_out"], **QUIET)
    assert replay.identity_error(stores["upper"], source.variants()["upper"].load(), layer=1) == 0


def test_blocks_below_the_first_adapted_one_are_shared(folder: Path) -> None:
    models = ModelSource(name="base", adapters=ADAPTERS).load_variants()
    shared = {name: count_shared_blocks(models["base"], model) for name, model in models.items()}
    assert shared == {"base": 4, "upper": 2, "top": 3, "head": 4, "all": 0, "embedding": 0, "several": 2}
    own = {id(parameter): parameter.numel() for model in models.values() for parameter in model.parameters()}
    base = sum(parameter.numel() for parameter in models["base"].parameters())
    assert sum(own.values()) < 1.5 * base, "the weights of the base are in memory once"
    other = tiny("llama")
    assert count_shared_blocks(models["base"], other) == 4, "a model that was loaded apart has equal tensors"
    other.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    assert count_shared_blocks(models["base"], other) == 1
    handle = models["top"].base_model.model.model.layers[3].register_forward_hook(lambda m, a, o: o + 1)
    assert count_shared_blocks(models["base"], models["top"]) == 0
    handle.remove()


@pytest.mark.parametrize("written", [{"bias": "lora_only"}, {"init_lora_weights": "pissa"}], ids=str)
def test_an_adapter_that_changes_tensors_of_the_base_changes_no_other_variant(
    written: dict[str, Any], tmp_path: Path
) -> None:
    tiny("qwen2").save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "base", tmp_path / "plain", 1)
    file = save_adapter(tmp_path / "base", tmp_path / "written", 2, **written) / "adapter_model.safetensors"
    save_file({name: value + 0.1 for name, value in load_file(file).items()}, file, {"format": "pt"})
    names = {"base": None, "written": str(tmp_path / "written"), "plain": str(tmp_path / "plain")}
    source = ModelSource(name=str(tmp_path / "base"), adapters=names)
    ids = token_ids(2, 9)
    for name, model in source.load_variants().items():
        with torch.no_grad():
            assert torch.equal(model(ids).logits, source.variants()[name].load()(ids).logits), name


def operations(capture: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        capture()
    return counter.get_total_flops()


def test_the_shared_blocks_run_once_for_each_batch(tmp_path: Path) -> None:
    """Count operations: the second of two variants that share 3 of 4 blocks adds a quarter; fixed costs cancel."""
    models = ModelSource(name="base", adapters={"base": None, "top": "top"}).load_variants()
    given: dict[str, Any] = {"sites": {"resid_post": [3]}, "batch_tokens": 512, "progress": False}

    def cost(capture: Any, model: Any, name: str) -> int:
        corpora = [token_documents([60] * count, vocabulary=VOCABULARY) for count in (40, 160)]
        capture(model, None, corpora[0], tmp_path / f"{name}-first", **given)  # a later capture repeats no check
        small, large = (
            operations(partial(capture, model, None, corpus, tmp_path / f"{name}-{len(corpus)}", **given))
            for corpus in corpora
        )
        return large - small

    separate = {name: cost(flexcache.capture, model, name) for name, model in models.items()}
    together = cost(flexcache.capture_variants, models, "together")
    assert (together - separate["base"]) / separate["top"] == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("family", ["gpt2", "falcon", "gemma3", "phi3", "bloom", "mixtral", "gpt_neox"])
def test_models_of_other_families_run_from_the_middle(family: str, tmp_path: Path) -> None:
    """Variants that a user loads, such as one with changed weights, are captured as well."""
    changed = tiny(family)
    _, blocks = flexcache.hooks.find_blocks(changed)
    for parameter in blocks[2].parameters():
        parameter.data *= 1.1
    models = {"before": tiny(family), "after": changed}
    given: dict[str, Any] = {"sites": ["resid_post", "attn_out"], **QUIET}
    assert count_shared_blocks(*models.values()) == 2
    stores = flexcache.capture_variants(models, None, DOCUMENTS, tmp_path / "runs", **given)
    for name, model in models.items():
        alone = flexcache.capture(model, None, DOCUMENTS, tmp_path / f"{name}.zarr", **given)
        assert shard_hashes(stores[name].path) == shard_hashes(alone.path)


def windowed(window: int | None) -> Any:
    return tiny("mistral", sliding_window=window)


def test_models_whose_attention_reaches_a_different_distance_share_no_blocks(tmp_path: Path) -> None:
    models = {"whole": windowed(None), "near": windowed(8)}
    assert count_shared_blocks(*models.values()) == 0
    corpus = token_documents([20, 30], vocabulary=VOCABULARY)
    given: dict[str, Any] = {"sites": ["resid_post"], **QUIET}
    stores = flexcache.capture_variants(models, None, corpus, tmp_path / "runs", **given)
    alone = flexcache.capture(models["near"], None, corpus, tmp_path / "near.zarr", **given)
    assert shard_hashes(stores["near"].path) == shard_hashes(alone.path)
    changed = tiny("llama")
    changed.model.layers[2].input_layernorm.variance_epsilon = 1e-3
    assert count_shared_blocks(tiny("llama"), changed) == 2


def norms(values: torch.Tensor) -> torch.Tensor:
    return values.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize(
    "given",
    [
        {"sites": {"resid_post.grad": [1, 3]}},
        {"transforms": [flexcache.Transform("norms", "resid_post", norms)]},
        {"sites": {"resid_post": [0, 1]}, "rows": "last"},
        {"sites": {"mlp_post": "all"}, "dtype": "int8", "rows": {"every": 3}},
        {"sites": ["model.layers.*.mlp"], "packing": {"length": 32, "separator": None, "bos": None}},
    ],
    ids=["gradients", "transforms", "shared layers only", "int8", "module paths"],
)
def test_variants_take_all_options_of_a_capture(given: dict[str, Any], tmp_path: Path) -> None:
    source = ModelSource(adapters={"upper": "upper", "base": None, "top": "top"})
    stores = flexcache.capture_variants(source, None, DOCUMENTS, tmp_path / "runs", **given, **QUIET)
    for name, one in source.variants().items():
        alone = flexcache.capture(one, None, DOCUMENTS, tmp_path / f"{name}.zarr", **given, **QUIET)
        assert shard_hashes(stores[name].path) == shard_hashes(alone.path)


def test_stopped_variants_are_resumed_where_each_store_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ModelSource(name="base", adapters={"base": None, "upper": "upper", "top": "top"})
    documents = token_documents(lengths(100, longest=20), vocabulary=VOCABULARY)
    whole = flexcache.capture_variants(source, None, documents, tmp_path / "whole", **FEW)
    commit, count = Recorder.commit_unit, iter(range(100))

    def stop(self: Recorder, files: Any = None) -> bool:
        if next(count) == 5:
            raise KeyboardInterrupt
        return commit(self, files)

    with monkeypatch.context() as patched:
        patched.setattr(Recorder, "commit_unit", stop)
        with pytest.raises(KeyboardInterrupt):
            flexcache.capture_variants(source, None, documents, tmp_path / "runs", **FEW)
    left = {path.name: len(flexcache.open(path).committed_units) for path in (tmp_path / "runs").iterdir()}
    assert len(set(left.values())) == 2, f"stopped between the stores of a unit: {left}"
    stores = flexcache.capture_variants(source, None, documents, tmp_path / "runs", **FEW)
    for name, store in stores.items():
        assert shard_hashes(store.path) == shard_hashes(whole[name].path)
    sorted((stores["base"].path / "ledger").glob("**/*.json"))[1].unlink()
    commits: list[str] = []

    def counted(self: Recorder, files: Any = None) -> bool:
        commits.append(self.store.path.name)
        return commit(self, files)

    monkeypatch.setattr(Recorder, "commit_unit", counted)
    flexcache.capture_variants(source, None, documents, tmp_path / "runs", **FEW)
    assert commits == ["base.zarr"]
    assert shard_hashes(stores["base"].path) == shard_hashes(whole["base"].path)


def capture_three(path: Path) -> None:
    source = ModelSource(name="base", adapters={"base": None, "upper": "upper", "top": "top"})
    documents = token_documents(lengths(100, longest=20), vocabulary=VOCABULARY)
    flexcache.capture_variants(source, None, documents, path, **FEW)


def test_variants_that_are_killed_are_completed_by_others(tmp_path: Path, folder: Path) -> None:
    process = processes.start(capture_three, tmp_path / "runs", folder=folder)
    while process.is_alive() and not list(tmp_path.glob("runs/top.zarr/ledger/*/*.json")):
        time.sleep(0.001)
    process.kill()
    process.join()
    two = [processes.start(capture_three, tmp_path / "runs", folder=folder) for _ in range(2)]
    for one in two:
        one.join()
    assert [one.exitcode for one in two] == [0, 0]
    source = ModelSource(name="base", adapters={"base": None, "upper": "upper", "top": "top"})
    documents = token_documents(lengths(100, longest=20), vocabulary=VOCABULARY)
    for name, one in source.variants().items():
        alone = flexcache.capture(one, None, documents, tmp_path / f"{name}.zarr", **FEW)
        assert shard_hashes(tmp_path / "runs" / f"{name}.zarr") == shard_hashes(alone.path)


def test_another_adapter_under_the_name_of_a_variant_is_refused(tmp_path: Path) -> None:
    source = ModelSource(name="base", adapters={"base": None, "upper": "upper"})
    flexcache.capture_variants(source, None, DOCUMENTS, tmp_path / "runs", **FEW)
    other = ModelSource(name="base", adapters={"base": None, "upper": "top"})
    with pytest.raises(MismatchError, match=r"(?s)runs/upper.zarr.*adapters: upper \(.*before, top \("):
        flexcache.capture_variants(other, None, DOCUMENTS, tmp_path / "runs", **FEW)


def test_a_model_that_cannot_run_from_the_middle_shares_no_blocks(tmp_path: Path, capsys: Any) -> None:
    """The forward of the last block reads what the first block left behind."""
    models = {"before": tiny("llama"), "after": tiny("llama")}
    models["after"].model.layers[3].mlp.up_proj.weight.data *= 2
    for model in models.values():
        keep_first(model)
    given: dict[str, Any] = {"sites": ["resid_post"], "batch_tokens": 64}
    stores = flexcache.capture_variants(models, None, DOCUMENTS, tmp_path / "runs", progress=True, **given)
    assert "after shares no blocks" in capsys.readouterr().err
    for name, model in models.items():
        alone = flexcache.capture(model, None, DOCUMENTS, tmp_path / f"{name}.zarr", progress=False, **given)
        assert shard_hashes(stores[name].path) == shard_hashes(alone.path)


class Remembering(torch.nn.Module):
    """An MLP that adds what the MLP of the first block computed in this forward."""

    def __init__(self, inner: torch.nn.Module, memory: dict[str, torch.Tensor], first: bool) -> None:
        super().__init__()
        self.inner, self._memory, self._first = inner, memory, first

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output = self.inner(hidden)
        if self._first:
            self._memory["first"] = output
        held = self._memory["first"]
        return output + held if held.shape == output.shape else output


def keep_first(model: Any) -> None:
    memory: dict[str, torch.Tensor] = {}
    for number in (0, 3):
        layer = model.model.layers[number]
        layer.mlp = Remembering(layer.mlp, memory, number == 0)


class InPlace(torch.nn.Module):
    """A norm that changes its input in place."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.inner(hidden.mul_(1.5))


def test_a_block_that_changes_its_input_in_place_changes_no_other_variant(tmp_path: Path, capsys: Any) -> None:
    models: dict[str, Any] = {name: tiny("llama") for name in ("one", "two", "three")}
    for factor, model in enumerate(models.values(), start=1):
        model.model.layers[3].input_layernorm = InPlace(model.model.layers[3].input_layernorm)
        model.model.layers[3].mlp.up_proj.weight.data *= factor
    given: dict[str, Any] = {"sites": ["model.layers.3.mlp"], **QUIET}
    stores = flexcache.capture_variants(models, None, DOCUMENTS, tmp_path / "runs", **given | {"progress": True})
    said = capsys.readouterr().err
    assert all(f"{name} shares 3 of 4 blocks with one" in said for name in ("two", "three"))
    for name, model in models.items():
        alone = flexcache.capture(model, None, DOCUMENTS, tmp_path / f"{name}.zarr", **given)
        assert shard_hashes(stores[name].path) == shard_hashes(alone.path)


def test_variants_whose_rows_differ_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = {"one": tiny("llama"), "other": tiny("llama", max_position_embeddings=8)}
    with pytest.raises(CaptureError, match="other batches or rows"):
        flexcache.capture_variants(models, None, DOCUMENTS, tmp_path / "runs", **FEW)
    with pytest.raises(ConfigError, match="each would generate its own"):
        given: dict[str, Any] = {"generate": {"max_new_tokens": 4}, **QUIET}
        flexcache.capture_variants(models, None, DOCUMENTS, tmp_path / "runs", **given)
    with pytest.raises(ConfigError, match="names of letters"):
        flexcache.capture_variants({}, None, DOCUMENTS, tmp_path / "runs", **QUIET)
    with pytest.raises(ConfigError, match="capture_variants takes all"):
        flexcache.capture(ModelSource(adapters={"upper": "upper"}), None, DOCUMENTS, tmp_path / "run.zarr", **QUIET)


def test_a_base_that_holds_the_adapter_is_no_variant_of_its_own(tmp_path: Path) -> None:
    base = tiny("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"]))  # also changes base
    models = {"base": base, "adapter": adapted}
    with pytest.raises(ConfigError, match="variants base and adapter are one model"):
        flexcache.capture_variants(models, None, DOCUMENTS, tmp_path / "runs", **FEW)


def test_a_generator_of_documents_is_read_for_every_variant(tmp_path: Path) -> None:
    source = ModelSource(name="base", adapters={"base": None, "upper": "upper"})
    documents = (document for document in DOCUMENTS)
    stores = flexcache.capture_variants(source, None, documents, tmp_path / "runs", **FEW)
    assert [store.n_rows for store in stores.values()] == [sum(len(one["tokens"]) for one in DOCUMENTS)] * 2


def test_prefix_tuning_shares_no_blocks() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = peft.get_peft_model(tiny("llama"), peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    assert count_shared_blocks(tiny("llama"), tuned) == 0
