from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import flexcache
from analysis.induction import plot, scores
from flexcache.errors import AnalysisError, ConfigError, MismatchError, SiteError
from flexcache.store.read.store import Store

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import induction as pipeline
from induction_model import AttentionOnly, AttentionOnlyConfig, repeated, train

HALF, SEQUENCES, HEADS, LAYERS = 7, 9, 4, 2


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> AttentionOnly:
    """An untrained model with large queries and keys, so that heads attend to few and different tokens."""
    torch.manual_seed(3)
    made = AttentionOnly(AttentionOnlyConfig()).eval()
    with torch.no_grad():
        for layer in made.layers:
            layer.self_attn.q_proj.weight *= 4
            layer.self_attn.k_proj.weight *= 4
    return made


def capture(model: AttentionOnly, documents: list[dict[str, Any]], path: Path, **options: Any) -> Store:
    options = {"batch_tokens": 50, "progress": False} | options
    return flexcache.capture(model, None, documents, path, transforms=pipeline.TRANSFORMS, **options)


@pytest.fixture(scope="module")
def store(model: AttentionOnly, tmp_path_factory: pytest.TempPathFactory) -> Store:
    documents = pipeline.documents(model.config.vocab_size, sequences=SEQUENCES, half=HALF)
    return capture(model, documents, tmp_path_factory.mktemp("induction") / "run.zarr")


def by_hand(model: AttentionOnly, tokens: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute patterns (layer, head, query, key), losses (token,) and scores of one document in a plain loop."""
    with torch.no_grad():
        output = model(torch.tensor([tokens]))
    patterns = np.stack([pattern[0].numpy() for pattern in output.attentions])
    logits = output.logits[0].double().numpy()
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    losses = np.array([-np.log(shares[i, tokens[i + 1]]) for i in range(len(tokens) - 1)] + [0.0])
    period = len(tokens) // 2
    found = np.zeros((2, LAYERS, len(tokens), HEADS))
    for i in range(len(tokens)):
        if i >= period:
            found[0, :, i] = patterns[:, :, i, i - period + 1]
        if i:
            found[1, :, i] = patterns[:, :, i, i - 1]
    return patterns, losses, found


def test_scores_from_the_store_equal_those_of_the_patterns(model: AttentionOnly, store: Store) -> None:
    documents = pipeline.documents(model.config.vocab_size, sequences=SEQUENCES, half=HALF)
    found = [by_hand(model, document["tokens"])[2] for document in documents]
    expected = np.stack(found)[:, :, :, HALF:].mean(axis=(0, 3))  # (score, layer, head)
    assert expected.std() > 0.01
    heads = scores.head_scores(store)
    assert dict(heads.sizes) == {"layer": LAYERS, "head": HEADS}
    for number, name in enumerate(("induction", "previous_token")):
        assert np.allclose(heads[name].transpose("layer", "head"), expected[number], atol=1e-6)


def test_losses_by_position_equal_those_of_the_logits(model: AttentionOnly, store: Store) -> None:
    documents = pipeline.documents(model.config.vocab_size, sequences=SEQUENCES, half=HALF)
    expected = np.stack([by_hand(model, document["tokens"])[1] for document in documents]).mean(0)
    loss = scores.loss_by_position(store)
    assert loss["position"].values.tolist() == list(range(1, 2 * HALF))
    assert np.allclose(loss, expected[:-1], atol=1e-5)
    parts = scores.mean_losses(loss)
    assert np.isclose(parts["first half"], expected[: HALF - 1].mean(), atol=1e-5)
    assert np.isclose(parts["seam"], expected[HALF - 1], atol=1e-5)
    assert np.isclose(parts["second half"], expected[HALF:-1].mean(), atol=1e-5)


def test_rows_are_right_for_documents_of_different_lengths(model: AttentionOnly, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    documents = [
        {"id": f"{length}", "tokens": repeated(1, length, 64, generator)[0].tolist()} for length in (1, 2, 5, 8, 11, 20)
    ]
    store = capture(model, documents, tmp_path / "run.zarr", batch_tokens=4096)
    assert len(set(store.tokens.column("batch").to_pylist())) == 1  # so that there is padding
    for document in documents:
        patterns, losses, found = by_hand(model, document["tokens"])
        assert np.allclose(patterns.sum(-1), 1, atol=1e-5)
        assert np.allclose(np.triu(patterns, 1), 0)
        rows = store.rows(document["id"])
        for layer in range(LAYERS):
            assert np.allclose(store.read("induction", layer, rows), found[0, layer], atol=1e-6)
            assert np.allclose(store.read("previous_token", layer, rows), found[1, layer], atol=1e-6)
        assert np.allclose(store.read("loss", None, rows)[:, 0], losses, atol=1e-5)
    with pytest.raises(AnalysisError, match="do not repeat at a common position"):
        scores.head_scores(store)
    with pytest.raises(AnalysisError, match="2 to 40 tokens"):
        scores.loss_by_position(store)


def test_a_store_without_the_arrays_or_the_rows_is_refused(model: AttentionOnly, tmp_path: Path) -> None:
    documents = pipeline.documents(64, sequences=3, half=HALF)
    store = flexcache.capture(model, None, documents, tmp_path / "run.zarr", sites="resid_post", progress=False)
    with pytest.raises(SiteError, match="no site 'induction'"):
        scores.head_scores(store)
    with pytest.raises(SiteError, match="no site 'loss'"):
        scores.loss_by_position(store)
    last = capture(model, documents, tmp_path / "last.zarr", rows="last")
    with pytest.raises(AnalysisError, match="rows: last"):
        scores.head_scores(last)


def test_the_store_records_the_functions_that_made_it(store: Store) -> None:
    told = store.spec.transforms
    names = {name: told[name]["function"] for name in told}
    assert names == {
        "induction": "analysis.induction.transforms.induction",
        "previous_token": "analysis.induction.transforms.previous_token",
        "loss": "analysis.induction.transforms.next_token_loss",
    }
    assert all(told[name]["source_xxh3_128"] for name in told)


def test_the_model_is_causal_and_padding_changes_nothing(model: AttentionOnly) -> None:
    ids = repeated(3, 10, 64, torch.Generator().manual_seed(0))
    later = ids.clone()
    later[:, 12:] = (later[:, 12:] + 1) % 64
    mask = torch.ones_like(ids)
    mask[:, 15:] = 0
    with torch.no_grad():
        whole, changed = model(ids).logits, model(later).logits
        padded = model(ids * mask, mask, use_cache=False).logits
        hidden = torch.ones_like(ids)
        hidden[:, :4] = 0
        before, other = model(ids, hidden).logits, model(ids * hidden, hidden).logits
    assert torch.equal(whole[:, :12], changed[:, :12])
    assert not torch.allclose(whole[:, 12:], changed[:, 12:])
    assert torch.allclose(whole[:, :15], padded[:, :15], atol=1e-5)
    assert torch.equal(before[:, 4:], other[:, 4:])
    assert before.isfinite().all()
    assert not torch.allclose(before[:, 4:], whole[:, 4:])


def test_the_residual_stream_holds_no_positions() -> None:
    model = AttentionOnly(AttentionOnlyConfig(num_hidden_layers=1)).eval()
    same = torch.full((1, 12), 5)
    with torch.no_grad():
        logits = model(same).logits[0]
    assert torch.allclose(logits, logits[:1].expand_as(logits), atol=1e-5)


def test_a_hidden_size_that_heads_cannot_share_is_refused() -> None:
    with pytest.raises(ConfigError, match="an even multiple of 4"):
        AttentionOnlyConfig(hidden_size=62)


def test_training_is_repeatable_and_reports_its_progress() -> None:
    seen: list[tuple[int, float]] = []
    first, second, other = train(3, 12, progress=lambda *now: seen.append(now)), train(3, 12), train(4, 12)
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert [step for step, _ in seen] == list(range(1, 13))
    assert not first.training


def test_a_store_of_another_training_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(seed: int) -> None:
        pipeline.run(tmp_path, Console(quiet=True), seed, steps=3, progress=False)

    run(0)
    table = (tmp_path / "scores.csv").read_bytes()
    run(0)
    assert (tmp_path / "scores.csv").read_bytes() == table
    monkeypatch.setattr(pipeline, "train", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(MismatchError, match="another training"):
        run(1)


def test_the_plot_may_be_svg(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "induction.svg"
    plot.plot(scores.head_scores(store), scores.loss_by_position(store), np.log(64), path)
    assert "<svg" in path.read_text()


@pytest.mark.slow
def test_the_example_trains_a_model_whose_second_layer_copies(tmp_path: Path) -> None:
    console = Console(record=True, width=120)
    pipeline.run(tmp_path / "out", console, seed=0, progress=False)
    text = console.export_text()
    for part in ("1,500 steps", "induction", "previous token", "second half", "scores.csv"):
        assert part in text
    assert (tmp_path / "out" / "induction.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "out" / "scores.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == ["layer", "head", "induction", "previous_token"]
    assert [(line["layer"], line["head"]) for line in lines] == [(f"{i}", f"{j}") for i in range(2) for j in range(4)]
    best = {
        (name, layer): max(float(line[name]) for line in lines if line["layer"] == layer)
        for name in ("induction", "previous_token")
        for layer in "01"
    }
    assert best["induction", "1"] > 0.8 > 0.2 > best["induction", "0"]
    assert best["previous_token", "0"] > 0.6 > 0.2 > best["previous_token", "1"]
    store = flexcache.open(tmp_path / "out" / "induction.zarr")
    assert store.complete
    assert store.provenance.model["training"] == {"seed": 0, "steps": 1500}
    losses = scores.mean_losses(scores.loss_by_position(store))
    assert losses["second half"] < 0.2
    assert losses["first half"] > 4
