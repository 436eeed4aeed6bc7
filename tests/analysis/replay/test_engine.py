from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import flexcache
from analysis import replay
from analysis.replay import Engine, PlacedEdit
from flexcache.errors import AnalysisError, MismatchError
from flexcache.hooks import find_blocks
from tests.corpora import build_store, token_documents
from tests.models import DEPTH, FAMILIES, VOCABULARY, tiny

REPLAYED = [
    family
    for family in FAMILIES
    if family != "albert"  # it has no one stack of blocks
    and family != "t5_encoder"  # its first block makes the position bias of all
]
FLOAT32_INSIDE = ("mamba", "mamba2")
"""Families whose residual stream is float32 in a bfloat16 model, and is rounded when it is stored."""
UNSTEADY = ("qwen3_moe", "olmoe", "jamba")
"""Families whose experts round the last bit depending on memory alignment, on some processors."""
QUICK = ("llama", "gpt2", "gpt_neox", "gemma3", "bert", "mixtral")
"""Families that are tested in bfloat16 by default; the others with ``-m slow``."""
Captured = Callable[..., Any]


KINDS = [
    *(pytest.param(family, torch.float32, id=f"{family}-float32") for family in REPLAYED),
    *(
        pytest.param(
            family,
            torch.bfloat16,
            id=f"{family}-bfloat16",
            marks=() if family in (*QUICK, *FLOAT32_INSIDE) else pytest.mark.slow,
        )
        for family in REPLAYED
    ),
]


@pytest.mark.parametrize(("family", "dtype"), KINDS)
def test_a_replay_that_changes_nothing_is_the_forward_bit_for_bit(
    family: str, dtype: torch.dtype, captured: Captured
) -> None:
    store, model = captured(family, dtype)
    rounded = family in FLOAT32_INSIDE and dtype == torch.bfloat16
    most = 0.1 if rounded else 1e-6 if family in UNSTEADY else 0.0
    for layer in range(DEPTH):
        assert replay.identity_error(store, model, "resid_post", layer) <= most


def test_a_model_whose_blocks_need_outputs_of_the_first_is_rejected(captured: Captured) -> None:
    store, model = captured("t5_encoder")
    assert replay.identity_error(store, model, "resid_post", 1) > 0
    with pytest.raises(AnalysisError, match="not the model's own forward"):
        replay.sweep(store, model, replay.grid(layers=1), replay.Zero(), ["kl"], progress=False)


def test_skipped_blocks_do_not_run(captured: Captured) -> None:
    store, model = captured()
    calls: list[str] = []
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda _, args, output, name=name: calls.append(name))
    engine = Engine(store, model)
    batch = next(engine.batches())
    calls.clear()  # of the small forward that shows that the model is the same
    engine.run(batch)
    whole = len([name for name in calls if ".layers." in name])
    calls.clear()
    engine.run(batch, engine.start_at("resid_post", 2))
    inside = [name for name in calls if ".layers." in name]
    assert {name.split(".")[2] for name in inside} == {"3"}
    assert len(inside) * DEPTH == whole
    assert not any("forward" in vars(block) for block in find_blocks(model)[1])


def test_the_model_is_restored_when_the_forward_fails(captured: Captured) -> None:
    store, model = captured()
    engine = Engine(store, model)
    batch = next(engine.batches())
    engine.run(batch)
    model.model.layers[3].register_forward_hook(lambda *_: (_ for _ in ()).throw(ValueError("own")))
    with pytest.raises(AnalysisError, match="fails when blocks are skipped") as error:
        engine.run(batch, engine.start_at("resid_post", 1))
    assert "own" in str(error.value.found)
    assert not any("forward" in vars(block) for block in model.model.layers)


def test_logits_at_chosen_positions_are_those_of_the_whole_forward(captured: Captured) -> None:
    store, model = captured()
    engine = Engine(store, model)
    for batch in engine.batches():
        last = np.array([[len(tokens) - 1] for tokens in batch.tokens])
        some, whole = engine.run(batch, read=last).logits, engine.run(batch).logits
        assert some.shape == (batch.shape[0], 1, VOCABULARY)
        torch.testing.assert_close(some[:, 0], whole[torch.arange(len(last)), torch.from_numpy(last[:, 0])])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_an_edit_changes_nothing_before_its_position(family: str, captured: Captured) -> None:
    store, model = captured(family)
    engine = Engine(store, model)
    batch = max(engine.batches(), key=lambda batch: batch.shape[1])
    start, place = engine.start_at("resid_post", 1), batch.shape[1] // 2
    lines = np.flatnonzero([len(tokens) > place for tokens in batch.tokens])
    edit = PlacedEdit(engine.point("resid_post", 1), replay.Zero(), (lines, np.full(len(lines), place)))
    change = (engine.run(batch, start, [edit]).logits - engine.run(batch).logits).abs().amax(-1)
    assert (change[:, :place] == 0).all()
    assert (change[lines, place] > 0).all()


def test_an_edit_equals_that_of_a_plain_hook_on_the_whole_model(captured: Captured) -> None:
    store, model = captured()
    engine = Engine(store, model)
    batch = next(engine.batches())
    lines = np.arange(batch.shape[0])
    for site, layer, module in (
        ("resid_post", 1, model.model.layers[1]),
        ("mlp_out", 2, model.model.layers[2].mlp),
        ("attn_out", 2, model.model.layers[2].self_attn.o_proj),
    ):
        placed = PlacedEdit(engine.point(site, layer), replay.Zero(), (lines, np.zeros_like(lines)))
        found = engine.run(batch, engine.start_at(site, layer), [placed]).logits

        def zero(_: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            output = output.clone()
            output[:, 0] = 0
            return output

        handle = module.register_forward_hook(zero)
        assert torch.equal(found, engine.run(batch).logits), site
        handle.remove()
    neurons = PlacedEdit(engine.point("mlp_post", 2), replay.SetNeurons((5,), 3.0), (lines, np.zeros_like(lines)))
    found = engine.run(batch, engine.start_at("mlp_post", 2), [neurons]).logits

    def three(_: Any, args: Any) -> Any:
        values = args[0].clone()
        values[:, 0, 5] = 3.0
        return (values,)

    model.model.layers[2].mlp.down_proj.register_forward_pre_hook(three)
    assert torch.equal(found, engine.run(batch).logits)


def test_the_residual_stream_of_a_donor_gives_its_logits(captured: Captured) -> None:
    documents = token_documents([9] * 6, vocabulary=VOCABULARY)
    store, model = captured(documents=documents, batch_tokens=64)
    engine = Engine(store, model)
    (batch,) = engine.batches()
    ids = [store.documents["id"][int(line)].as_py() for line in batch.documents]
    donor = dict(zip(ids, ids[1:] + ids[:1]))
    tokens = np.divmod(np.arange(batch.shape[0] * 9), 9)
    base = engine.run(batch).logits
    for layer in range(DEPTH):
        placed = PlacedEdit(engine.point("resid_post", layer), replay.Patch(donor), tokens)
        found = engine.run(batch, engine.start_at("resid_post", layer), [placed]).logits
        assert torch.equal(found, base.roll(-1, 0))
    assert not torch.equal(base, base.roll(-1, 0))


def test_batches_are_those_of_the_capture_also_across_units(captured: Captured) -> None:
    documents = token_documents([11, 5, 17, 3] * 16, vocabulary=VOCABULARY)
    store, model = captured(documents=documents)
    assert store.n_units > 1
    seen = np.concatenate([batch.documents for batch in Engine(store, model).batches()])
    assert sorted(seen) == list(range(len(documents)))
    assert replay.identity_error(store, model, layer=1) == 0.0


def test_a_store_of_other_weights_is_rejected_unless_accepted_by_name(captured: Captured) -> None:
    store, model = captured()
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(MismatchError, match="cannot be replayed") as error:
        Engine(store, model)
    assert "weights: " in str(error.value)
    assert "Accepted" in Engine(store, model, accept=["weights"]).notes[0]
    assert replay.identity_error(store, model, accept=["weights"]) == 0.0


def test_int8_rows_are_replayed_if_accepted_and_the_error_is_measured(captured: Captured) -> None:
    store, model = captured(dtype="int8")
    with pytest.raises(MismatchError, match=r"accept=\['int8'\]"):
        Engine(store, model)
    error = replay.identity_error(store, model, layer=1, accept=["int8"])
    assert 0 < error < 0.1
    found = replay.sweep(store, model, replay.grid("resid_post", [1]), replay.Zero(), accept=["int8"], progress=False)
    assert any("stored as int8" in note for note in found.results.attrs["notes"])
    assert 0 < float(found.results["identity_error_relative"].max()) < 0.05
    with torch.no_grad():
        exact = model(torch.tensor([store.tokens["tokens"][0].as_py()])).logits
    engine = Engine(store, model, accept=["int8"])
    batch = next(engine.batches([int(store.tokens["document"][0].as_py())]))
    given = engine.run(batch, engine.start_at("resid_post", 1)).logits
    assert 0 < float((given[0, : exact.shape[1]] - exact[0]).abs().max()) <= error


def test_another_attention_implementation_is_named_as_incompatible(captured: Captured) -> None:
    store, _ = captured()
    other = tiny("llama", attn_implementation="eager")
    assert set(replay.find_incompatibilities(store, other)) == {"attention"}
    with pytest.raises(AnalysisError, match="cannot be accepted"):
        Engine(store, other, accept=["rows"])


def test_a_store_names_the_reasons_why_it_cannot_be_replayed(captured: Captured, tmp_path: Any) -> None:
    store, model = captured()
    assert store.replayable
    assert str(store.replayable) == "the store can be replayed"
    last, _ = captured(rows="last")
    assert set(last.replayable.reasons) == {"rows"}
    with pytest.raises(MismatchError, match="every token"):
        Engine(last, model)
    neurons, _ = captured(sites="mlp_post")
    assert set(neurons.replayable.reasons) == {"site"}
    assert set(build_store(tmp_path / "foreign.zarr").replayable.reasons) == {"weights"}


def test_an_error_names_the_layer_that_is_not_stored(captured: Captured) -> None:
    store, model = captured(layers=[0, 3])
    with pytest.raises(AnalysisError, match="not stored") as error:
        replay.identity_error(store, model, layer=2)
    assert "resid_post [0, 3]" in str(error.value)
    assert Engine(store, model).start_at("mlp_out", 3, stored=False).skipped == 1


def test_a_narrower_storage_dtype_is_close_but_not_exact(captured: Captured) -> None:
    store, model = captured(dtype="bfloat16")
    assert "bfloat16" in store.arrays["resid_post"].dtype
    assert 0 < replay.identity_error(store, model, layer=1) < 0.1
    engine = Engine(store, model)
    assert "exact only to the rounding" in engine.notes_on(engine.start_at("resid_post", 1))[0]


def test_a_replay_can_start_from_resid_pre(captured: Captured) -> None:
    store, model = captured(sites="resid_pre")
    assert replay.identity_error(store, model, "resid_pre", 2) == 0.0
    assert Engine(store, model).start_at("resid_post", 1).site == "resid_pre"


def test_the_identity_check_rejects_a_model_with_other_state_between_blocks(tmp_path: Any) -> None:
    """The blocks count how many of them ran, outside the residual stream."""
    from analysis.replay.engine.identity import check_discrepancy, measure_discrepancy

    def leaky() -> torch.nn.Module:
        model = tiny("llama")
        count = [0]
        for block in model.model.layers:
            block.self_attn.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
        model.model.norm.register_forward_hook(lambda _, args, output: output * (1 + count[0] % 4))
        return model

    documents = token_documents([5, 6], vocabulary=VOCABULARY)
    store = flexcache.capture(leaky(), None, documents, tmp_path / "run.zarr", progress=False)
    engine = Engine(store, leaky())
    batch, start = next(engine.batches()), engine.start_at("resid_post", 1)
    found = measure_discrepancy(engine, batch, start, engine.run(batch).logits)
    with pytest.raises(AnalysisError, match="not the model's own forward") as error:
        check_discrepancy(engine, start, found, ())
    assert f"{found.largest:.3g}" in str(error.value)


def test_an_edit_of_queries_in_a_fused_projection_equals_that_of_a_plain_hook(captured: Captured) -> None:
    store, model = captured("gpt2")
    engine = Engine(store, model)
    batch = max(engine.batches(), key=lambda batch: batch.shape[1])
    lines, last = np.arange(batch.shape[0]), np.array([len(tokens) - 1 for tokens in batch.tokens])
    placed = PlacedEdit(engine.point("q", 2), replay.Zero(), (lines, last))
    found = engine.run(batch, engine.start_at("q", 2), [placed]).logits

    def zero(_: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[lines, last, :64] = 0  # queries come first in GPT-2
        return output

    plain = engine.run(batch).logits
    handle = model.transformer.h[2].attn.c_attn.register_forward_hook(zero)
    real = torch.from_numpy(batch.attention_mask()).bool()  # a replay has zeros at padding
    assert torch.equal(found[real], engine.run(batch).logits[real])
    assert not torch.equal(found[real], plain[real])
    handle.remove()


@pytest.mark.parametrize("site", ["resid_mid", "router_logits", "expert_out", "mlp_post"])
def test_a_site_that_a_parallel_path_bypasses_cannot_be_edited(site: str, captured: Captured) -> None:
    store, model = captured("mixtral")
    engine = Engine(store, model)
    batch = next(engine.batches())
    placed = PlacedEdit(engine.point(site, 1), replay.Zero(), (np.array([0]), np.array([0])))
    with pytest.raises(AnalysisError, match=f"{site} can be read but not edited"):
        engine.run(batch, engine.start_at("resid_post", 0), [placed])
