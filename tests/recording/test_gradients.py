from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flexcache
from flexcache import NextTokenLoss
from flexcache.errors import CaptureError, ConfigError, MismatchError, SiteError
from flexcache.hooks import find_blocks
from flexcache.recording.forward.batch import Batch
from flexcache.recording.forward.batch_reader import BatchReader
from flexcache.recording.forward.objective import describe_objective, recorded_objective
from tests.corpora import lengths, token_documents
from tests.models import DEPTH, VOCABULARY, tiny

DOCUMENTS = token_documents(lengths(24, longest=30), vocabulary=VOCABULARY)
QUIET: dict[str, Any] = {"progress": False, "batch_tokens": 128}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def keep(kept: dict[int, torch.Tensor], number: int, side: str, _: Any, args: Any, output: Any) -> None:
    value = args[0] if side == "input" else output
    kept[number] = value if isinstance(value, torch.Tensor) else value[0]
    kept[number].retain_grad()


def plain_gradients(
    model: torch.nn.Module, store: flexcache.Store, modules: list[tuple[torch.nn.Module, str]], loss_of: Any
) -> list[np.ndarray]:
    """Return what `retain_grad` keeps in a plain forward and backward pass over the batches of a store."""
    found: list[list[torch.Tensor]] = [[] for _ in modules]
    for unit in range(store.n_units):
        for batch in BatchReader(store.path).read_unit(unit):
            kept: dict[int, torch.Tensor] = {}
            handles = []
            for number, (module, side) in enumerate(modules):
                handles.append(module.register_forward_hook(partial(keep, kept, number, side)))
            logits = model(
                input_ids=torch.from_numpy(batch.input_ids(0)),
                attention_mask=torch.from_numpy(batch.attention_mask()),
                use_cache=False,
            ).logits
            loss_of(logits, batch).backward()
            for number in kept:
                grad = kept[number].grad
                assert grad is not None
                found[number].append(torch.cat([grad[i, a:b] for i, (a, b) in enumerate(batch.keep)]))
            for handle in handles:
                handle.remove()
            model.zero_grad()
    return [torch.cat(rows).float().numpy() for rows in found]


def next_token_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    total = torch.zeros(())
    for line, tokens in enumerate(batch.tokens):
        labels = torch.from_numpy(tokens[1:].copy()).long()
        total = total + torch.nn.functional.cross_entropy(logits[line, : len(labels)].float(), labels, reduction="sum")
    return total


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma3", "falcon"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_those_of_plain_autograd_bit_for_bit(family: str, dtype: str, tmp_path: Path) -> None:
    model = tiny(family, dtype=getattr(torch, dtype))
    sites = ["resid_post", "resid_post.grad", "resid_pre.grad", "mlp_post.grad"]
    store = flexcache.capture(model, None, DOCUMENTS, tmp_path / "run.zarr", sites=sites, **QUIET)
    blocks = find_blocks(model)[1]
    names = {"llama": "mlp.down_proj", "gpt2": "mlp.c_proj", "gpt_neox": "mlp.dense_4h_to_h", "gemma3": "mlp.down_proj"}
    down = blocks[1].get_submodule(names.get(family, "mlp.dense_4h_to_h"))
    first, last, neurons = plain_gradients(
        model, store, [(blocks[0], "output"), (blocks[DEPTH - 1], "output"), (down, "input")], next_token_loss
    )
    assert np.array_equal(store.read("resid_post.grad", 0), first)
    assert np.array_equal(store.read("resid_post.grad", DEPTH - 1), last)
    assert np.array_equal(store.read("mlp_post.grad", 1), neurons)
    assert np.array_equal(store.read("resid_pre.grad", 1), store.read("resid_post.grad", 0))
    assert np.abs(first).max() > 0
    assert store.arrays["resid_post.grad"].dtype == dtype
    plain = flexcache.capture(model, None, DOCUMENTS, tmp_path / "plain.zarr", **QUIET)
    assert np.array_equal(store.read("resid_post", 2), plain.read("resid_post", 2))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_values_of_an_objective_are_stored_on_their_rows(tmp_path: Path) -> None:
    model = tiny("llama")
    store = flexcache.capture(model, None, DOCUMENTS, tmp_path / "run.zarr", sites="resid_post.grad", **QUIET)
    assert store.arrays["objective"].features == 1
    for line, document in enumerate(DOCUMENTS[:10]):
        rows = store.rows(document["id"])
        ids = torch.tensor([document["tokens"]])
        with torch.no_grad():
            logits = model(ids).logits[0]
        expected = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none").numpy()
        found = store.read("objective", None, rows)[:, 0]
        assert np.allclose(found[:-1], expected, atol=1e-4), line
        assert found[-1] == 0
    grad = store["resid_post.grad"]
    assert grad.dims == ("layer", "token", "hidden")
    assert {"resid_post.grad", "objective"} <= set(store.dataset().data_vars)


def test_a_logit_difference_and_a_custom_function_are_objectives(tmp_path: Path) -> None:
    model = tiny("llama")
    last = find_blocks(model)[1][DEPTH - 1]
    options: dict[str, Any] = {"sites": "resid_post.grad", "layers": [0, -1], **QUIET}
    difference = flexcache.LogitDifference(7, 9)
    store = flexcache.capture(model, None, DOCUMENTS, tmp_path / "a.zarr", objective=difference, **options)

    def at_the_end(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        ends = [logits[i, len(tokens) - 1] for i, tokens in enumerate(batch.tokens)]
        return torch.stack([end[7] - end[9] for end in ends]).sum()

    (expected,) = plain_gradients(model, store, [(last, "output")], at_the_end)
    assert np.array_equal(store.read("resid_post.grad", DEPTH - 1), expected)
    rows = store.rows(DOCUMENTS[3]["id"])
    assert len(set(store.read("objective", None, rows)[:, 0].tolist())) == 1
    own = flexcache.capture(
        model, None, DOCUMENTS, tmp_path / "b.zarr",
        objective=lambda output, batch: at_the_end(output.logits, batch), **options,
    )  # fmt: skip
    assert np.array_equal(own.read("resid_post.grad", DEPTH - 1), expected)
    assert "objective" not in own.arrays
    with pytest.raises(MismatchError, match=r"spec\.objective"):
        flexcache.capture(model, None, DOCUMENTS, tmp_path / "a.zarr", **options)
    with pytest.raises(MismatchError, match=r"spec\.objective"):
        changed = flexcache.LogitDifference(7, 10)
        flexcache.capture(model, None, DOCUMENTS, tmp_path / "a.zarr", objective=changed, **options)


def test_the_record_of_an_objective_rebuilds_it_and_may_lack_the_tokens(tmp_path: Path) -> None:
    model, objective = tiny("llama"), flexcache.LogitDifference(7, 9)
    options: dict[str, Any] = {"sites": "resid_post.grad", "layers": [1], "objective": objective, **QUIET}
    path, rest = tmp_path / "run.zarr", tmp_path / "rest.zarr"
    store = flexcache.capture(model, None, DOCUMENTS, path, **options)
    flexcache.capture(model, None, DOCUMENTS, rest, **{**options, "layers": [0]})
    assert recorded_objective(store.spec.objective) == objective
    assert recorded_objective(None) == recorded_objective(describe_objective(NextTokenLoss())) == NextTokenLoss()
    assert recorded_objective(describe_objective(lambda output, batch: output.logits.sum())) is None
    content = json.loads((path / "zarr.json").read_text())
    recorded = content["attributes"]["flexcache"]["spec"]["objective"]
    assert recorded.pop("tokens") == [7, 9]
    (path / "zarr.json").write_text(json.dumps(content))
    older = flexcache.open(path)
    assert recorded_objective(older.spec.objective) is None, "a store of an earlier version"
    assert flexcache.capture(model, None, DOCUMENTS, path, **options).spec == older.spec, "resumed"
    both = flexcache.merge([path, rest], tmp_path / "both.zarr")
    assert recorded_objective(both.spec.objective) == objective
    flexcache.extend(model, None, path, **{**options, "layers": [2]})
    with pytest.raises(MismatchError, match="the objective"):
        flexcache.extend(model, None, path, **{**options, "layers": [3], "objective": flexcache.LogitDifference(9, 7)})


def test_module_paths_have_gradients_too(tmp_path: Path) -> None:
    model = tiny("llama")
    sites = ["model.layers.1.mlp", "model.layers.1.mlp.grad", "model.layers.2.self_attn.o_proj:input.grad"]
    store = flexcache.capture(model, None, DOCUMENTS, tmp_path / "run.zarr", sites=sites, **QUIET)
    assert set(store.sites) == {
        "model.layers.1.mlp",
        "model.layers.1.mlp.grad",
        "model.layers.2.self_attn.o_proj.input.grad",
        "objective",
    }
    block = model.model.layers
    expected = plain_gradients(
        model, store, [(block[1].mlp, "output"), (block[2].self_attn.o_proj, "input")], next_token_loss
    )
    assert np.array_equal(store.read("model.layers.1.mlp.grad", None), expected[0])
    assert np.array_equal(store.read("model.layers.2.self_attn.o_proj.input.grad", None), expected[1])
    assert store["model.layers.1.mlp"].dims == store["model.layers.1.mlp.grad"].dims


def test_invalid_objectives_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    path, model = tmp_path / "run.zarr", tiny("llama")
    options: dict[str, Any] = {"sites": "resid_post.grad", **QUIET}
    with pytest.raises(ConfigError, match="no site whose gradient"):
        flexcache.capture(model, None, DOCUMENTS, path, objective=flexcache.NextTokenLoss(), **QUIET)
    with pytest.raises(CaptureError, match="no logits"):
        flexcache.capture(model.model, None, DOCUMENTS, path, **options)
    with pytest.raises(CaptureError, match="nothing that can be differentiated"):
        flexcache.capture(model, None, DOCUMENTS, path, objective=lambda output, batch: output.logits, **options)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SiteError, match="does not depend on an activation"):
        flexcache.capture(
            model, None, DOCUMENTS, path,
            objective=lambda output, batch: torch.zeros(batch.shape), **options,
        )  # fmt: skip
    with pytest.raises(SiteError, match="objective is not finite"):
        flexcache.capture(
            model, None, DOCUMENTS, tmp_path / "b.zarr",
            objective=lambda output, batch: output.logits.sum() / 0, **options,
        )  # fmt: skip
    assert all(p.requires_grad for p in model.parameters())
