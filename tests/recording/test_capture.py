from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch

import flexcache
from flexcache.errors import CaptureError, ConfigError, DocumentsError, MismatchError, RangeError, SiteError
from flexcache.hooks import find_blocks
from flexcache.recording.forward.batch_reader import BatchReader
from tests.corpora import lengths, token_documents
from tests.models import DEPTH, NEURONS, VOCABULARY, tiny
from tests.recording.test_recorder import shard_hashes

DOCUMENTS = token_documents(lengths(60, longest=30), vocabulary=VOCABULARY)
QUIET = {"progress": False, "batch_tokens": 128}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def hooked_rows(model: torch.nn.Module, store: flexcache.Store, module: torch.nn.Module, side: str) -> np.ndarray:
    """Return the rows that a plain PyTorch hook sees on the batches of the store."""
    seen: list[torch.Tensor] = []

    def after(_: object, args: tuple, output: object) -> None:
        value = args[0] if side == "input" else output
        seen.append((value if isinstance(value, torch.Tensor) else value[0]).detach().clone())

    reader = BatchReader(store.path)
    rows = []
    handle = module.register_forward_hook(after)
    try:
        for unit in range(store.n_units):
            for batch in reader.read_unit(unit):
                seen.clear()
                with torch.no_grad():
                    model(
                        input_ids=torch.from_numpy(batch.input_ids(0)),
                        attention_mask=torch.from_numpy(batch.attention_mask()),
                    )
                rows.append(torch.cat([seen[0][i, a:b] for i, (a, b) in enumerate(batch.keep)]))
    finally:
        handle.remove()
    return torch.cat(rows).float().numpy()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen3", "gemma3", "falcon", "bert"])
def test_a_store_equals_plain_hooks_bit_for_bit(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    store = flexcache.capture(model, None, DOCUMENTS, tmp_path / "run.zarr", sites=["resid_post", "mlp_post"], **QUIET)
    blocks = find_blocks(model)[1]
    assert store.complete
    assert store.layers("resid_post") == tuple(range(DEPTH))
    for layer in (0, DEPTH - 1):
        expected = hooked_rows(model, store, blocks[layer], "output")
        assert np.array_equal(store.read("resid_post", layer), expected)
    assert store.arrays["mlp_post"].feature_dim == "neuron"
    assert store.arrays["mlp_post"].features in (NEURONS, 4 * 64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_dtype_is_stored_as_computed_or_rounded_as_torch_rounds(dtype: str, tmp_path: Path) -> None:
    model = tiny("llama", dtype=getattr(torch, dtype))
    down = model.model.layers[2].mlp.down_proj
    sites = {"model.layers.2.mlp.down_proj:input": "all", "mlp_post": [2]}
    same = flexcache.capture(model, None, DOCUMENTS, tmp_path / "same.zarr", sites=sites, **QUIET)
    expected = hooked_rows(model, same, down, "input")
    assert same.arrays["mlp_post"].dtype == dtype
    for name, layer in (("mlp_post", 2), ("model.layers.2.mlp.down_proj.input", None)):
        assert np.array_equal(same.read(name, layer), expected)
    half = flexcache.capture(model, None, DOCUMENTS, tmp_path / "half.zarr", sites=sites, dtype="float16", **QUIET)
    assert np.array_equal(half.read("mlp_post", 2), torch.from_numpy(expected).half().float().numpy())


@pytest.mark.parametrize("rows", ["last", "first", "mean"])
def test_one_row_per_document_equals_that_row_of_a_full_capture(rows: str, tmp_path: Path) -> None:
    model = tiny("llama")
    store = flexcache.capture(model, None, DOCUMENTS, tmp_path / "run.zarr", layers=[1], rows=rows, **QUIET)
    tokens = {item["id"]: item["tokens"] for item in DOCUMENTS}
    for line, name in enumerate(store.documents.column("id").to_pylist()):
        with torch.no_grad():
            states = model(torch.tensor([tokens[name]]), output_hidden_states=True).hidden_states[2][0]
        expected = {"last": states[-1], "first": states[0], "mean": states.mean(0)}[rows]
        assert np.allclose(store.read("resid_post", 1, [line])[0], expected.numpy(), atol=2e-5)


def test_layers_may_differ_by_site_and_count_from_the_end(tmp_path: Path) -> None:
    sites = {"resid_pre": [0], "attn_out": "1:3", "mlp_out": -1}
    store = flexcache.capture(tiny("llama"), None, DOCUMENTS, tmp_path / "run.zarr", sites=sites, **QUIET)
    assert {site: store.layers(site) for site in store} == {"resid_pre": (0,), "attn_out": (1, 2), "mlp_out": (3,)}
    assert store["attn_out"].layer.values.tolist() == [1, 2]
    dataset = store.dataset()
    assert dataset.layer.values.tolist() == [0, 1, 2, 3]
    assert np.isnan(dataset["attn_out"].sel(layer=3).values).all()


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = tiny("llama").train()
    model.model.layers[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    states = {name: value.clone() for name, value in model.state_dict().items()}
    flexcache.capture(model, None, DOCUMENTS, tmp_path / "run.zarr", layers=[1], **QUIET)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(torch.equal(value, states[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_later_blocks_and_the_lm_head_never_run(tmp_path: Path) -> None:
    model = tiny("llama")
    ran: list[str] = []
    for name in ("model.layers.2", "lm_head"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    store = flexcache.capture(model, None, DOCUMENTS, tmp_path / "run.zarr", layers=[1], **QUIET)
    assert ran.count("model.layers.2") == ran.count("lm_head") == 3 + store.n_units  # small ones
    assert len(set(store.tokens.column("batch").to_pylist())) > 2
    assert store.provenance.others["user_hooks"] == ["model.layers.2", "lm_head"]


def test_a_second_run_does_nothing_and_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    flexcache.capture(tiny("llama"), None, DOCUMENTS, path, **QUIET)
    before = {p: p.stat().st_mtime_ns for p in path.rglob("*")}
    flexcache.capture(tiny("llama"), None, DOCUMENTS, path, **QUIET)
    assert {p: p.stat().st_mtime_ns for p in path.rglob("*")} == before
    other = tiny("llama")
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.add_(1e-3)
    with pytest.raises(MismatchError, match="weights: 1 of 39 tensors differ"):
        flexcache.capture(other, None, DOCUMENTS, path, **QUIET)
    with pytest.raises(MismatchError, match="spec.rows: all in the store, last now"):
        flexcache.capture(tiny("llama"), None, DOCUMENTS, path, rows="last", **QUIET)


def test_other_threads_are_refused_unless_mixing_is_allowed(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    store = flexcache.capture(tiny("llama"), None, DOCUMENTS, path, **QUIET)
    (path / "ledger" / "0" / f"{store.n_units - 1}.json").unlink()
    torch.set_num_threads(2)
    try:
        with pytest.raises(MismatchError, match="threads: 1 before, 2 now"):
            flexcache.capture(tiny("llama"), None, DOCUMENTS, path, **QUIET)
        assert flexcache.capture(tiny("llama"), None, DOCUMENTS, path, allow_mixed=True, **QUIET).complete
    finally:
        torch.set_num_threads(1)


def test_overflow_names_site_layer_document_and_value(tmp_path: Path) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(1e8)
    with pytest.raises(RangeError, match="resid_post of layer 2 has a value that overflows float16") as caught:
        flexcache.capture(model, None, DOCUMENTS, tmp_path / "run.zarr", dtype="float16", **QUIET)
    assert "document 'doc-" in str(caught.value)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[5, 5] = float("nan")
    with pytest.raises(RangeError, match="resid_post of layer 1 has a value that is not finite"):
        flexcache.capture(model, None, DOCUMENTS, tmp_path / "nan.zarr", **QUIET)


def test_mistakes_fail_before_anything_is_written(tmp_path: Path) -> None:
    model, path = tiny("llama"), tmp_path / "run.zarr"
    with pytest.raises(SiteError, match="did you mean resid_post"):
        flexcache.capture(model, None, DOCUMENTS, path, sites="resid_pots", **QUIET)
    with pytest.raises(SiteError, match=r"model\.layers\.9\.mlp"):
        flexcache.capture(model, None, DOCUMENTS, path, sites="model.layers.9.mlp", **QUIET)
    with pytest.raises(SiteError, match="no layer 4"):
        flexcache.capture(model, None, DOCUMENTS, path, layers=[4], **QUIET)
    with pytest.raises(ConfigError, match="given twice"):
        flexcache.capture(model, None, DOCUMENTS, path, sites=["resid_post", "resid_post"], **QUIET)
    with pytest.raises(DocumentsError, match="token id that the model does not know"):
        flexcache.capture(model, None, [{"id": "a", "tokens": [VOCABULARY]}], path, **QUIET)
    with pytest.raises(DocumentsError, match="no documents"):
        flexcache.capture(model, None, [], path, **QUIET)
    assert list(tmp_path.iterdir()) == []


def test_documents_longer_than_the_model_are_truncated_and_counted(tmp_path: Path) -> None:
    model = tiny("gpt2")
    documents = [{"id": "long", "tokens": [5] * 300}, {"id": "short", "tokens": [5] * 3}]
    store = flexcache.capture(model, None, documents, tmp_path / "run.zarr", **QUIET)
    assert store.plan["truncated_documents"] == 1
    assert store.plan["longest_document"] == 128
    assert store.provenance.model["class"] == "GPT2LMHeadModel"


def test_weights_offloaded_by_accelerate_give_the_same_bytes(tmp_path: Path) -> None:
    whole = flexcache.capture(tiny("llama"), None, DOCUMENTS, tmp_path / "whole.zarr", **QUIET)
    model = accelerate.cpu_offload(tiny("llama"), execution_device=torch.device("cpu"))
    assert next(model.parameters()).device.type == "meta"
    store = flexcache.capture(model, None, DOCUMENTS, tmp_path / "run.zarr", **QUIET)
    assert shard_hashes(store.path) == shard_hashes(whole.path)
    assert store.ledger.read_record(0).fingerprint == whole.ledger.read_record(0).fingerprint


def limit_memory(model: torch.nn.Module, tokens: int, after: int = 0) -> list[torch.Size]:
    """Let the model run out of memory in forward passes of more tokens than these, after *after* forward passes."""
    seen: list[torch.Size] = []

    def before(_: object, args: tuple, kwargs: dict) -> None:
        seen.append(kwargs["input_ids"].shape)
        if len(seen) > after and kwargs["input_ids"].numel() > tokens:
            raise torch.OutOfMemoryError(f"no room for {kwargs['input_ids'].numel()} tokens")

    model.register_forward_pre_hook(before, with_kwargs=True)
    return seen


@pytest.mark.parametrize("after", [3, 18])
def test_out_of_memory_continues_with_smaller_batches_that_the_ledger_records(after: int, tmp_path: Path) -> None:
    """Memory runs out in the dry run of the largest batch, or in the middle of a unit."""
    model = tiny("llama")
    limit_memory(model, 70, after)
    store = flexcache.capture(model, None, DOCUMENTS, tmp_path / "run.zarr", **QUIET)
    budgets = [store.ledger.read_record(unit).batch_tokens for unit in range(store.n_units)]
    assert budgets[-1] <= 70
    assert (budgets[0] == 128) == (after > 3)
    assert sorted(budgets, reverse=True) == budgets
    whole = flexcache.capture(tiny("llama"), None, DOCUMENTS, tmp_path / "whole.zarr", **QUIET)
    for layer in range(DEPTH):
        assert np.allclose(store.read("resid_post", layer), whole.read("resid_post", layer), atol=2e-5)
    assert flexcache.verify(store.path).sound


def test_a_sequence_that_does_not_fit_alone_is_named_in_the_error(tmp_path: Path) -> None:
    model = tiny("llama")
    limit_memory(model, 20, after=3)
    with pytest.raises(CaptureError, match="one sequence alone does not fit") as caught:
        flexcache.capture(model, None, DOCUMENTS, tmp_path / "run.zarr", **QUIET)
    assert "lower max_length" in str(caught.value)


def test_a_store_is_resumed_with_smaller_batches_but_not_with_larger_ones(tmp_path: Path) -> None:
    path, options = tmp_path / "run.zarr", {**QUIET, "batch_tokens": 64}
    store = flexcache.capture(tiny("llama"), None, DOCUMENTS, path, **QUIET)
    before = shard_hashes(path)
    last = store.n_units - 1
    (path / "ledger" / "0" / f"{last}.json").unlink()
    model = tiny("llama")
    seen = limit_memory(model, 10**9)
    flexcache.capture(model, None, DOCUMENTS, path, **options)
    assert max(shape.numel() for shape in seen) <= 64
    assert [store.ledger.read_record(unit).batch_tokens for unit in (0, last)] == [128, 64]
    changed = {name for name, digest in shard_hashes(path).items() if before[name] != digest}
    assert all(name.split("/")[-2] == str(last) for name in map(str, changed))
    with pytest.raises(MismatchError, match="spec.batch_tokens: 128 in the store, 256 now"):
        flexcache.capture(tiny("llama"), None, DOCUMENTS, path, **{**QUIET, "batch_tokens": 256})


CAPTURE = """
import sys, torch
torch.set_num_threads(1)
import flexcache
from tests.corpora import lengths, token_documents
from tests.models import tiny
documents = token_documents(lengths(250, longest=30), vocabulary=257)
flexcache.capture(tiny("llama"), None, documents, sys.argv[1], progress=False, batch_tokens=64)
"""


@pytest.mark.slow  # tests/reliability kills at every step
def test_resume_after_a_kill_writes_the_same_bytes_and_recomputes_no_committed_unit(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", CAPTURE]
    documents = token_documents(lengths(250, longest=30), vocabulary=VOCABULARY)
    whole = flexcache.capture(tiny("llama"), None, documents, tmp_path / "whole.zarr", progress=False, batch_tokens=64)
    path = tmp_path / "run.zarr"
    for kill_at in (1, whole.n_units // 2):
        process = subprocess.Popen([*command, str(path)], cwd=root)
        ledger = path / "ledger" / "0"
        while process.poll() is None and len(list(ledger.glob("*.json"))) < kill_at:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the capture ended before it was killed"
        committed = flexcache.open(path).committed_units.tolist()
        assert len(committed) >= kill_at
    done = {p: p.stat().st_mtime_ns for unit in committed for p in path.glob(f"resid_post/c/*/{unit}/0")}
    assert len(done) == DEPTH * len(committed)
    subprocess.run([*command, str(path)], check=True, cwd=root)
    assert {p: p.stat().st_mtime_ns for p in done} == done
    assert shard_hashes(path) == shard_hashes(whole.path)
    assert flexcache.verify(path).sound
    assert flexcache.open(path).complete
