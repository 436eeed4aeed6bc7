"""Models whose weights transformers quantizes, or keeps on disk; what is not installed is skipped."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import flexcache
from analysis import replay
from flexcache import ModelSource
from flexcache.errors import ConfigError, MismatchError
from pipelines.cli import main
from tests.corpora import token_documents
from tests.models import VOCABULARY, tiny

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "nf4": (
        "bitsandbytes",
        {"method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    ),
    "double": (
        "bitsandbytes",
        {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
        },
    ),
    "int8": ("bitsandbytes", {"method": "bitsandbytes", "load_in_8bit": True}),
    "torchao": ("torchao", {"method": "torchao", "quant_type": "Int8WeightOnlyConfig"}),
    "torchao rows": (
        "torchao",
        {"method": "torchao", "quant_type": {"Int8DynamicActivationInt8WeightConfig": {"reduce_range": True}}},
    ),
    "quanto": ("optimum.quanto", {"method": "quanto", "weights": "int4"}),
}
LENGTHS = [9, 5, 12, 7]
SITES = {"resid_post": "all", "mlp_out": "all", "mlp_post": "all", "resid_mid": "all"}

pytestmark = pytest.mark.filterwarnings(
    "ignore:MatMul8bitLt", "ignore:.*expandable_segments", "ignore::DeprecationWarning", "ignore::FutureWarning"
)


def settings(name: str) -> dict[str, Any]:
    package, asked = METHODS[name]
    if find_spec(package.partition(".")[0]) is None:
        pytest.skip(f"{package} is not installed")
    pytest.importorskip(package)
    return asked


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float")
    tiny("llama", intermediate_size=128).save_pretrained(path)
    return path


def documents() -> list[dict[str, Any]]:
    return token_documents(LENGTHS, vocabulary=VOCABULARY)


def capture(model: Any, path: Path, **options: Any) -> flexcache.Store:
    """Capture with one document in each batch."""
    options = {"sites": SITES, "batch_tokens": max(LENGTHS), "progress": False, **options}
    return flexcache.capture(model, None, documents(), path, **options)


def hooked(model: Any, tokens: list[int]) -> dict[tuple[str, int], np.ndarray]:
    """The outputs of blocks and of their MLPs, and the inputs of the last linear modules, by hooks of PyTorch alone."""
    found: dict[tuple[str, int], np.ndarray] = {}
    handles = []

    def keep(name: str, layer: int, value: Any) -> None:
        found[name, layer] = (value[0] if isinstance(value, tuple) else value)[0].float().numpy()

    for layer, block in enumerate(model.model.layers):
        for name, module in (("resid_post", block), ("mlp_out", block.mlp)):
            handles.append(module.register_forward_hook(lambda _m, _i, out, n=name, at=layer: keep(n, at, out)))
        last = block.mlp.down_proj
        handles.append(last.register_forward_pre_hook(lambda _m, inputs, at=layer: keep("mlp_post", at, inputs[0])))
    with torch.no_grad():
        model(torch.tensor([tokens]), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", METHODS)
def test_a_quantized_model_is_captured_as_plain_hooks_read_it_and_resumed(
    name: str, folder: Path, tmp_path: Path
) -> None:
    source = ModelSource(name=str(folder), quantization=settings(name))
    model: Any = source.load()
    store = capture(model, tmp_path / "run.zarr")
    starts = store.documents["row_start"].to_pylist()
    for row, (start, tokens) in enumerate(zip(starts, store.tokens["tokens"].to_pylist())):
        rows = slice(start, start + store.documents["n_rows"][row].as_py())
        for (site, layer), values in hooked(model, tokens).items():
            assert np.array_equal(store.read(site, layer, rows), values), (site, layer)
    exact: Any = AutoModelForCausalLM.from_pretrained(folder)
    expected = hooked(exact, tokens)["resid_post", 3]
    found = store.read("resid_post", 3, rows)
    assert 0 < np.linalg.norm(found - expected) / np.linalg.norm(expected) < 0.5
    (tmp_path / "run.zarr" / "ledger" / "0" / "0.json").unlink()
    again = capture(source, tmp_path / "run.zarr")
    assert np.array_equal(again.read("resid_post", 3, rows), found)
    with pytest.raises(MismatchError, match="quantization: .*before, None now"):
        capture(exact.eval(), tmp_path / "run.zarr")
    shutil.rmtree(tmp_path / "run.zarr")
    capture(exact, tmp_path / "run.zarr")
    with pytest.raises(MismatchError, match="quantization: None before"):
        capture(source, tmp_path / "run.zarr")


def test_the_site_of_a_quantized_linear_module_is_its_product_with_the_dequantized_weight(
    folder: Path, tmp_path: Path
) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    model: Any = ModelSource(name=str(folder), quantization=settings("nf4")).load()
    store = capture(model, tmp_path / "run.zarr")
    for layer in range(4):
        weight = model.model.layers[layer].mlp.down_proj.weight
        exact = functional.dequantize_4bit(weight.data, weight.quant_state).float().numpy()
        expected = store.read("mlp_post", layer) @ exact.T
        assert np.allclose(store.read("mlp_out", layer), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["nf4", "torchao"])
def test_a_changed_value_of_packed_weights_is_named(name: str, folder: Path, tmp_path: Path) -> None:
    source = ModelSource(name=str(folder), quantization=settings(name))
    capture(source, tmp_path / "run.zarr")
    model: Any = source.load()
    weight = model.model.layers[2].mlp.up_proj.weight
    packed = weight.data if name == "nf4" else weight.qdata
    packed.view(-1)[5] ^= 3
    with pytest.raises(MismatchError, match=r"model\.layers\.2\.mlp\.up_proj"):
        capture(model, tmp_path / "run.zarr")


@pytest.mark.parametrize("name", ["nf4", "int8", "torchao", "quanto"])
def test_a_replay_of_a_quantized_model_equals_its_forward_with_a_hook(name: str, folder: Path, tmp_path: Path) -> None:
    source = ModelSource(name=str(folder), quantization=settings(name))
    model: Any = source.load()
    store = capture(model, tmp_path / "run.zarr", sites=["resid_post"])
    asked: dict[str, Any] = {"metrics": ["logit_diff"], "answers": (3, 4), "progress": False}
    found = replay.sweep(store, model, replay.grid(layers=[2], positions="last"), replay.Scale(0.5), **asked)
    assert (found.results["identity_error"] == 0).all()
    value = found.results["value"].sel(arm="edit", layer=2).squeeze()

    def halve_last(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, -1] *= 0.5
        return output

    handle = model.model.layers[2].register_forward_hook(halve_last)
    for name, tokens in zip(store.documents["id"].to_pylist(), store.tokens["tokens"].to_pylist()):
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, -1]
        assert float(value.sel(document=name)) == pytest.approx(float(logits[3] - logits[4]), abs=1e-5)
    handle.remove()
    with pytest.raises(MismatchError, match="quantization"):
        replay.sweep(
            store,
            AutoModelForCausalLM.from_pretrained(folder),
            replay.grid("resid_post"),
            replay.Zero(),
            progress=False,
        )


def test_a_saved_quantized_checkpoint_is_loaded_by_its_folder(folder: Path, tmp_path: Path) -> None:
    model: Any = ModelSource(name=str(folder), quantization=settings("nf4")).load()
    store = capture(model, tmp_path / "run.zarr")
    ModelSource(name=str(folder), quantization=settings("nf4")).load().save_pretrained(tmp_path / "four")
    again = capture(str(tmp_path / "four"), tmp_path / "again.zarr")
    assert np.array_equal(again.read("resid_post", 3), store.read("resid_post", 3))


def test_4_bit_weights_that_a_forward_has_packed_again_are_refused(folder: Path, tmp_path: Path) -> None:
    asked = settings("nf4")
    functional = pytest.importorskip("bitsandbytes.functional")
    if not functional.has_avx512bf16():
        pytest.skip("bitsandbytes packs weights on CPUs with bfloat16 instructions alone")
    asked = {name: value for name, value in asked.items() if name != "method"}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**asked)).eval()
    with torch.no_grad():
        model(torch.tensor([[3, 4, 5]]))
    with pytest.raises(ConfigError, match="packed again by an earlier forward"):
        capture(model, tmp_path / "run.zarr")


def test_quantization_and_placement_come_from_yaml(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings("int8")
    monkeypatch.chdir(tmp_path)
    rows = "\n".join(f"{document}".replace("'", '"') for document in documents())
    Path("tokens.jsonl").write_text(rows, encoding="utf-8")
    Path("run.yaml").write_text(
        f"model: {{name: {folder}, quantization: {{method: bitsandbytes, load_in_8bit: true}}, device_map: auto}}\n"
        f"documents: tokens.jsonl\nstore: run.zarr\nsites: resid_post\nbatch_tokens: {max(LENGTHS)}\n",
        encoding="utf-8",
    )
    for command in ("plan", "capture", "capture"):
        with pytest.raises(SystemExit) as ended:
            main([command, "run.yaml", "-q"])
        assert not ended.value.code
    expected = capture(ModelSource(name=str(folder), quantization=settings("int8")), tmp_path / "python.zarr")
    found = flexcache.open("run.zarr")
    assert np.array_equal(found.read("resid_post", 3), expected.read("resid_post", 3))
    with pytest.raises(SystemExit) as ended:
        main(["capture", "run.yaml", "-q", "--set", "model.quantization=null"])
    assert ended.value.code == 1


def test_weights_on_disk_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    places: dict[str, int | str] = {f"model.layers.{layer}": "disk" if layer in (1, 2) else "cpu" for layer in range(4)}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    source = ModelSource(name=str(folder), device_map=places, offload_folder=str(tmp_path / "weights"))
    model = source.load()
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu", "meta"}
    store = capture(model, tmp_path / "disk.zarr")
    plain = capture(ModelSource(name=str(folder), device_map="auto"), tmp_path / "plain.zarr")
    for site in SITES:
        assert np.array_equal(store.read(site, 3), plain.read(site, 3))
    capture(str(folder), tmp_path / "disk.zarr")  # the same model
    all_of_it = ModelSource(name=str(folder), device_map="auto", max_memory={"cpu": 1000}, offload_folder=str(tmp_path))
    assert {parameter.device.type for parameter in all_of_it.load().parameters()} == {"meta"}
    capture(all_of_it, tmp_path / "all.zarr")
    for site in SITES:
        assert np.array_equal(flexcache.open(tmp_path / "all.zarr").read(site, 3), plain.read(site, 3))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"quantization": {"load_in_8bit": True}}, "names no method"),
        ({"quantization": {"method": 8}}, "not by a name"),
        ({"quantization": {"method": "quanto", "quant_method": "quanto"}}, "twice"),
        ({"quantization": {"method": "quanto"}, "parallel": {"tensor": 2}}, "several processes share"),
        ({"device_map": "auto", "parallel": {"fsdp": 2}}, "several processes share"),
        ({"device_map": "auto", "device": "cpu"}, "takes device or device_map"),
        ({"offload_folder": "there"}, "offload_folder is for device_map"),
        ({"max_memory": {"cpu": "1GiB"}}, "max_memory is for device_map"),
        ({"quantization": {"method": "quanto"}, "adapter": "runs/a", "merge": True}, "cannot be merged into quantized"),
    ],
)
def test_options_that_contradict_each_other_are_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelSource(name="a-model", **asked)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"method": "bitsandbits"}, "did you mean bitsandbytes"),
        ({"method": "quanto", "weight": "int8"}, "quanto has no setting 'weight'"),
        ({"method": "quanto", "weights": "int3"}, "int3"),
        ({"method": "hqq"}, "pip install hqq"),
        ({"method": "fp8"}, "cannot be quantized by fp8"),
    ],
)
def test_quantization_that_cannot_be_had_is_refused_with_a_remedy(
    asked: dict[str, Any], message: str, folder: Path
) -> None:
    if asked["method"] == "hqq" and find_spec("hqq"):
        pytest.skip("hqq is installed")
    if asked["method"] == "fp8" and torch.cuda.is_available():
        pytest.skip("a GPU can quantize to FP8")
    with pytest.raises(ConfigError, match=message):
        ModelSource(name=str(folder), quantization=asked).load()


@pytest.mark.parametrize(
    "asked",
    [{"method": "fp8", "weight_block_size": [64, 64]}, {"method": "bitsandbytes", "load_in_8bit": True}],
    ids=str,
)
def test_a_checkpoint_that_is_quantized_already_takes_no_other_settings(asked: dict[str, Any], tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="quantized already"):
        ModelSource(name=str(tmp_path), quantization=asked).load()
    source = ModelSource(name=str(tmp_path), quantization={"method": "fp8", "weight_block_size": [128, 128]})
    assert "quantization_config" in source.weight_options(source.config())


def test_a_type_that_torchao_lacks_is_refused(folder: Path) -> None:
    settings("torchao")
    with pytest.raises(ConfigError, match="did you mean Int8WeightOnlyConfig"):
        ModelSource(name=str(folder), quantization={"method": "torchao", "quant_type": "Int8WeightOnlyConfg"}).load()


def test_an_object_of_transformers_is_read_as_its_settings(folder: Path) -> None:
    settings("int8")
    source = ModelSource(name=str(folder), quantization=BitsAndBytesConfig(load_in_8bit=True))
    model: Any = source.load()
    assert isinstance(model.model.layers[0].mlp.down_proj, nn.Linear)
    assert type(model.model.layers[0].mlp.down_proj).__name__ == "Linear8bitLt"


@pytest.mark.parametrize("name", ["nf4", "int8", "torchao", "quanto"])
def test_gradients_pass_through_quantized_weights(name: str, folder: Path, tmp_path: Path) -> None:
    model: Any = ModelSource(name=str(folder), quantization=settings(name)).load()
    store = capture(model, tmp_path / "run.zarr", sites={"resid_post.grad": [1]})
    tokens = torch.tensor([store.tokens["tokens"][0].as_py()])
    kept: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[0]

    handle = model.model.layers[1].register_forward_hook(keep)
    logits = model(tokens).logits[0]
    handle.remove()
    nn.functional.cross_entropy(logits[:-1], tokens[0, 1:], reduction="sum").backward()
    start = store.documents["row_start"][0].as_py()
    assert kept[0].grad is not None
    found = store.read("resid_post.grad", 1, slice(start, start + tokens.shape[1]))
    assert np.array_equal(found, kept[0].grad[0].numpy())


@pytest.mark.parametrize("name", ["nf4", "int8", "torchao", "quanto"])
def test_flex_model_reads_a_quantized_model_as_plain_hooks_do(name: str, folder: Path) -> None:
    model: Any = ModelSource(name=str(folder), quantization=settings(name)).load()
    expected = hooked(model, [3, 4, 5])
    found: dict[str, Any] = {}
    flexible = flexcache.FlexModel(model, found)
    for layer in range(4):
        flexible.register_forward_hook(flexcache.HookFunction(f"model.layers.{layer}.mlp"))
    with torch.no_grad():
        flexible(torch.tensor([[3, 4, 5]]))
    for layer in range(4):
        assert np.array_equal(found[f"model.layers.{layer}.mlp"][0][0].numpy(), expected["mlp_out", layer])


@pytest.mark.parametrize("name", ["nf4", "int8", "torchao", "quanto"])
def test_an_adapter_is_loaded_into_a_quantized_model(name: str, folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    settings_of = peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    peft.get_peft_model(tiny("llama", intermediate_size=128), settings_of).save_pretrained(tmp_path / "adapter")
    asked = settings(name)
    source = ModelSource(name=str(folder), quantization=asked, adapter=str(tmp_path / "adapter"))  # type: ignore[arg-type]
    store = capture(source, tmp_path / "adapted.zarr")
    base = capture(ModelSource(name=str(folder), quantization=asked), tmp_path / "base.zarr")
    expected = peft.PeftModel.from_pretrained(
        ModelSource(name=str(folder), quantization=asked).load(), tmp_path / "adapter"
    ).eval()
    tokens = store.tokens["tokens"][0].as_py()
    start = store.documents["row_start"][0].as_py()
    found = store.read("resid_post", 3, slice(start, start + len(tokens)))
    assert np.array_equal(found, hooked(expected.base_model.model, tokens)["resid_post", 3])
    assert not np.array_equal(found, base.read("resid_post", 3, slice(start, start + len(tokens))))


@pytest.mark.parametrize("name", ["nf4", "int8", "torchao", "quanto"])
def test_variants_of_a_quantized_model_are_those_that_are_loaded_one_by_one(
    name: str, folder: Path, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    settings_of = peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    peft.get_peft_model(tiny("llama", intermediate_size=128), settings_of).save_pretrained(tmp_path / "adapter")
    place: dict[str, Any] = {"name": str(folder), "quantization": settings(name)}
    variants = ModelSource(**place, adapters={"base": None, "tuned": str(tmp_path / "adapter")}).load_variants()
    alone = {"base": ModelSource(**place), "tuned": ModelSource(**place, adapter=str(tmp_path / "adapter"))}
    for variant, source in alone.items():
        one, two = (
            capture(model, tmp_path / f"{variant}-{number}.zarr")
            for number, model in enumerate((variants[variant], source))
        )
        assert np.array_equal(one.read("resid_post", 3), two.read("resid_post", 3))


def test_an_fp8_checkpoint_of_compressed_tensors_is_captured(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    pytest.importorskip("loguru")
    place = tmp_path / "fp8"
    shutil.copytree(folder, place)
    exact = load_file(place / "model.safetensors")
    packed, rounded = {}, {}
    for name, weight in exact.items():
        packed[name] = rounded[name] = weight
        if "layers" in name and name.endswith("proj.weight"):
            scale = weight.abs().amax(1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
            packed[name] = (weight / scale).to(torch.float8_e4m3fn)
            packed[f"{name}_scale"] = scale
            rounded[name] = packed[name].float() * scale
    save_file(packed, place / "model.safetensors", {"format": "pt"})
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    content = json.loads((place / "config.json").read_text())
    content["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    (place / "config.json").write_text(json.dumps(content))
    store = capture(str(place), tmp_path / "run.zarr")
    expected = tiny("llama", intermediate_size=128)
    expected.load_state_dict(rounded, strict=False)
    again = capture(expected, tmp_path / "rounded.zarr")
    assert np.allclose(store.read("resid_post", 3), again.read("resid_post", 3), atol=1e-5)
    plain = capture(str(folder), tmp_path / "plain.zarr")
    assert not np.allclose(store.read("resid_post", 3), plain.read("resid_post", 3), atol=1e-3)
