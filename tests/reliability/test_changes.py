"""A change between two runs of a capture raises an error with the difference, or the bytes stay the same."""

from __future__ import annotations

import os
import shutil
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

import flexcache
from flexcache.errors import MismatchError
from tests.corpora import lengths, token_documents
from tests.models import VOCABULARY, tiny
from tests.recording.test_recorder import shard_hashes

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
DOCUMENTS = token_documents(lengths(60, longest=30), vocabulary=VOCABULARY - 7)
QUIET: dict[str, Any] = {"progress": False, "batch_tokens": 128, "layers": [1, 3]}
SAME = "the same bytes"

Change = Callable[[nn.Module], Any]


def plain() -> nn.Module:
    return tiny("llama")


def adapted() -> nn.Module:
    torch.manual_seed(1)
    options = {"r": 4, "task_type": "CAUSAL_LM", "init_lora_weights": False}
    model = peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=["q_proj", "v_proj"], **options))
    model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"], **options))
    return model.eval()


def quantized(change: Change = lambda model: None) -> nn.Module:
    model = tiny("llama")
    change(model)
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


@dataclass
class Row:
    """One change before the second run; *says* is the expected error text, or SAME if nothing may change."""

    what: str
    says: str
    change: Change = lambda model: None
    make: Callable[[], nn.Module] = plain
    options: dict[str, Any] = field(default_factory=dict)
    documents: Any = None
    again: Callable[[], nn.Module] | None = None

    def __repr__(self) -> str:
        return self.what


def weight(name: str, edit: Callable[[torch.Tensor], Any]) -> Change:
    def change(model: nn.Module) -> None:
        edit(model.get_parameter(name).data)

    return change


def scaled(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "scaling") and isinstance(module.scaling, dict):
            module.scaling["default"] *= 2


def class_patched(model: nn.Module) -> None:
    mlp = type(model.model.layers[1].mlp)
    original = mlp.forward
    mlp.forward = lambda self, x: original(self, x) * 1.01
    mlp.patched = original


def steer(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    return output + 0.1


def steer_late(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    return torch.cat([output[:, :26], output[:, 26:] + 0.1], dim=1)


def watch(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
    output.mean()


def shift(module: nn.Module, args: tuple) -> tuple:
    return (args[0] * 1.001, *args[1:])


def another_order(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [documents[1], documents[0], *documents[2:]]


def attribute(path: str, name: str, value: Any) -> Change:
    return lambda model: setattr(model.get_submodule(path), name, value)


NAN = float("nan")
ROWS = [
    # the values of the model
    Row(
        "one value of a weight",
        "weights: 1 of 39",
        weight("model.layers.3.mlp.up_proj.weight", lambda w: w[5, 7].mul_(3)),
    ),
    Row(
        "a head zeroed in `o_proj`",
        "o_proj.weight",
        weight("model.layers.0.self_attn.o_proj.weight", lambda w: w[:, 16:32].zero_()),
    ),
    Row(
        "the embedding of a token that occurs nowhere",
        "embed_tokens.weight",
        weight("model.embed_tokens.weight", lambda w: w[VOCABULARY - 1].add_(1)),
    ),
    Row(
        "a weight of the head, which no capture runs",
        "lm_head.weight",
        weight("lm_head.weight", lambda w: w[3, 3].add_(1)),
    ),
    Row("the dtype of the weights", "weights: ", lambda model: model.half()),
    Row(
        "rotary frequencies, a buffer that no checkpoint holds",
        "buffers: model.rotary_emb.inv_freq",
        lambda model: model.model.rotary_emb.inv_freq.mul_(1.01),
    ),
    Row("weights quantized", "modules: ", make=plain, again=quantized),
    Row(
        "a value of packed quantized weights",
        "_packed_params",
        make=quantized,
        again=partial(quantized, weight("model.layers.1.mlp.up_proj.weight", lambda w: w[0, 0].mul_(9))),
    ),
    # adapters
    Row(
        "another adapter active",
        "adapter other: inactive, .* active",
        lambda model: model.set_adapter("other"),
        adapted,
    ),
    Row(
        "the adapter off",
        "adapter default: active, .* inactive",
        lambda model: model.base_model.disable_adapter_layers(),
        adapted,
    ),
    Row("the scale of the adapter", "adapter default: active, scale 2, .* scale 4", scaled, adapted),
    Row(
        "the adapter merged into the weights",
        "adapter default: active, .* merged",
        lambda model: model.merge_adapter(["default"]),
        adapted,
    ),
    Row(
        "an adapter added to the model",
        "class: LlamaForCausalLM before, PeftModelForCausalLM now",
        make=plain,
        again=adapted,
    ),
    Row(
        "one value of the adapter",
        "lora_A.default.weight",
        weight("base_model.model.model.layers.2.self_attn.q_proj.lora_A.default.weight", lambda w: w[0, 0].add_(1)),
        adapted,
    ),
    # what it computes with its values
    Row(
        "a hook that changes an output",
        "hooks: none before, model.layers.1: .*steer now",
        lambda model: model.model.layers[1].register_forward_hook(steer) and None,
    ),
    Row(
        "a hook that changes an input",
        "hooks: none before, model.norm: .*shift now",
        lambda model: model.model.norm.register_forward_pre_hook(shift) and None,
    ),
    Row(
        "a hook that changes later tokens alone",
        "resid_post of layer",
        lambda model: model.model.layers[1].register_forward_hook(steer_late) and None,
    ),
    Row(
        "`forward` of a module replaced",
        "hooks: none before, model.layers.2.mlp: .*<lambda> now",
        lambda model: attribute("model.layers.2.mlp", "forward", lambda x: x)(model),
    ),
    Row("`forward` of a class replaced", "outputs on a fixed input.* model.layers.0 is the first", class_patched),
    Row(
        "an activation function",
        "modules: 0 × torch.GELU",
        attribute("model.layers.3.mlp", "act_fn", nn.GELU(approximate="tanh")),
    ),
    Row(
        "a setting of a module",
        "LlamaAttention.scaling: 0.25 in 4 before, 0.2 in 1, 0.25 in 3 now",
        attribute("model.layers.0.self_attn", "scaling", 0.2),
    ),
    Row(
        "the configuration, with equal weights",
        "config.sliding_window",
        lambda model: setattr(model.config, "sliding_window", 4),
    ),
    Row(
        "a module replaced by one that computes the same",
        SAME,
        lambda model: setattr(model.model.layers[1].mlp, "act_fn", nn.SiLU()),
    ),
    Row("a hook that only reads", SAME, lambda model: model.model.layers[1].register_forward_hook(watch) and None),
    Row("training mode, and gradients off", SAME, lambda model: model.train().requires_grad_(False) and None),
    Row(
        "the model compiled, or wrapped in DataParallel",
        SAME,
        lambda model: nn.DataParallel(torch.compile(model, backend="aot_eager")),
    ),
    Row("the model saved and loaded again", SAME, lambda model: model, again=None),
    # conditions
    Row(
        "the attention kernel",
        "attention: sdpa before, eager now",
        lambda model: model.set_attn_implementation("eager"),
    ),
    Row("the number of threads", "threads: 1 before, 2 now", lambda model: torch.set_num_threads(2)),
    Row(
        "the number of threads, and `allow_mixed`",
        SAME,
        lambda model: torch.set_num_threads(2),
        options={"allow_mixed": True},
    ),
    Row("the working directory", SAME, lambda model: os.chdir("/")),
    # documents
    Row("the text of a document", "documents", documents=[{**DOCUMENTS[0], "tokens": [9, 9]}, *DOCUMENTS[1:]]),
    Row("a label of a document", "documents", documents=[{**DOCUMENTS[0], "label": "other"}, *DOCUMENTS[1:]]),
    Row("the order of documents", "documents", documents=another_order(DOCUMENTS)),
    Row(
        "one document more",
        "documents",
        documents=[*DOCUMENTS, {"id": "new", "tokens": [5], "label": "odd", "score": 1.0}],
    ),
    Row("a list of documents given as a generator", "documents.count", documents=lambda: (dict(d) for d in DOCUMENTS)),
    # options
    Row("sites", "arrays.mlp_out", options={"sites": ["mlp_out"]}),
    Row("layers", "spec.sites.resid_post", options={"layers": [1]}),
    Row("rows", "spec.rows: all in the store, last now", options={"rows": "last"}),
    Row("the dtype of the store", "spec.dtype", options={"dtype": "bfloat16"}),
    Row("the maximum length", "spec.max_length", options={"max_length": 12}),
    Row("the seed", "spec.seed", options={"seed": 5}),
    Row("compression", "spec.compression", options={"compression": "zstd"}),
    Row("larger batches", "spec.batch_tokens: 128 in the store, 256 now", options={"batch_tokens": 256}),
    Row("a smaller write buffer", SAME, options={"buffer_bytes": 64 << 20}),
]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[], nn.Module]], Path]:
    """A store of each kind of model without its last unit."""
    made: dict[Any, Path] = {}

    def make(model: Callable[[], nn.Module]) -> Path:
        if model not in made:
            torch.set_num_threads(1)
            made[model] = tmp_path_factory.mktemp("begun") / "run.zarr"
            flexcache.capture(model(), None, DOCUMENTS, made[model], **QUIET)
        return made[model]

    return make


@pytest.fixture(autouse=True)
def _undone() -> Iterator[None]:
    folder = Path.cwd()
    torch.set_num_threads(1)
    yield
    os.chdir(folder)
    torch.set_num_threads(1)
    mlp = transformers.models.llama.modeling_llama.LlamaMLP
    if hasattr(mlp, "patched"):
        mlp.forward = mlp.patched
        del mlp.patched


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", ROWS, ids=repr)
def test_a_change_between_two_runs_raises_an_error_or_changes_no_byte(
    row: Row, begun: Callable[[Callable[[], nn.Module]], Path], tmp_path: Path
) -> None:
    whole, path = begun(row.make), tmp_path / "run.zarr"
    shutil.copytree(whole, path)
    last = max((path / "ledger" / "0").glob("*.json"), key=lambda file: int(file.stem))
    last.unlink()
    left = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    model = (row.again or row.make)()
    if row.what == "the model saved and loaded again":
        model.save_pretrained(tmp_path / "model")
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    changed = row.change(model)
    model = changed if isinstance(changed, nn.Module) else model
    documents = DOCUMENTS if row.documents is None else row.documents
    documents = documents() if isinstance(documents, types.FunctionType) else documents
    if row.says == SAME:
        flexcache.capture(model, None, documents, path, **{**QUIET, **row.options})
        assert last.exists()
        assert shard_hashes(path) == shard_hashes(whole)
        return
    with pytest.raises(MismatchError, match=row.says):
        flexcache.capture(model, None, documents, path, **{**QUIET, **row.options})
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == left


def test_the_documentation_has_a_line_for_each_change() -> None:
    section = PAGE.read_text("utf-8").partition("## What may change between two runs")[2].partition("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    held = {row.what: row.says == SAME for row in ROWS}
    assert {what: result.startswith("continues") for what, result in lines[1:]} == held


def test_a_changed_model_can_be_allowed_and_the_ledger_records_it(tmp_path: Path) -> None:
    path, model = tmp_path / "run.zarr", plain()
    store = flexcache.capture(model, None, DOCUMENTS, path, **QUIET)
    last = store.n_units - 1
    (path / "ledger" / "0" / f"{last}.json").unlink()
    model.model.layers[1].register_forward_hook(steer)
    flexcache.capture(model, None, DOCUMENTS, path, **QUIET, allow_changed_model=True)
    marks = [store.ledger.read_record(unit).fingerprint.get("model") for unit in (0, last)]
    assert marks[0] is None
    assert marks[1] is not None
    with pytest.raises(MismatchError, match="with another model than its own"):
        (path / "ledger" / "0" / "0.json").unlink()
        flexcache.capture(plain(), None, DOCUMENTS, path, **QUIET)
