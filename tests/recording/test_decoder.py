"""Encoder-decoder models: targets are captured with their contexts, resumed, extended and replayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import flexcache
from analysis import replay
from flexcache.errors import AnalysisError, ConfigError, DocumentsError, MismatchError
from flexcache.hooks.locate.vocabulary import pad_token_id
from flexcache.options import DecoderInputs
from flexcache.recording.forward.batch import Batch, split
from flexcache.recording.forward.batch_reader import BatchReader
from flexcache.recording.forward.decoder_inputs import infer_decoder_inputs
from flexcache.recording.recompute import recompute
from tests.models import DEPTH, VOCABULARY, tiny
from tests.recording.test_recorder import shard_hashes


def documents(count: int = 40, seed: int = 0) -> list[dict[str, Any]]:
    """Return pairs of which every third has a long context."""
    rng = np.random.default_rng(seed)

    def drawn(most: int) -> list[int]:
        return rng.integers(4, VOCABULARY, int(rng.integers(1, most))).tolist()

    return [
        {"id": f"d{n}", "tokens": drawn(20) + drawn(60) * (n % 3 == 0), "target_tokens": drawn(14), "label": n % 2}
        for n in range(count)
    ]


DOCUMENTS = documents()
SITES = ["resid_pre", "resid_post", "cross_attn_out", "z", "resid_post.grad"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def captured(path: Path, family: str = "bart", **options: Any) -> tuple[nn.Module, flexcache.Store]:
    model = tiny(family)
    settings: dict[str, Any] = {"sites": SITES, "batch_tokens": 128, **options}
    return model, flexcache.capture(model, None, settings.pop("documents", DOCUMENTS), path, progress=False, **settings)


def batches(store: flexcache.Store) -> list[Batch]:
    reader = BatchReader(store.path)
    return [batch for unit in range(store.n_units) for batch in reader.read_unit(unit)]


@pytest.mark.parametrize(("family", "start"), [("t5", 0), ("mbart", "last")])
def test_rows_are_what_the_whole_model_computes_of_targets_shifted_as_labels(
    family: str, start: Any, tmp_path: Path
) -> None:
    model, store = captured(tmp_path / "run.zarr", family, sites=["resid_post"])
    assert store.spec.decoder == DecoderInputs(inputs="shifted", start=start)
    seen: list[torch.Tensor] = []
    blocks = model.decoder.block if family == "t5" else model.model.decoder.layers
    blocks[2].register_forward_hook(
        lambda _, args, output: seen.append(output if isinstance(output, torch.Tensor) else output[0])
    )
    straddling, run = 0, batches(store)
    for batch in run:
        texts = [DOCUMENTS[int(store.documents["source_index"][int(line)].as_py())] for line in batch.documents]
        assert batch.context is not None
        assert [line.tolist() for line in batch.context] == [text["tokens"] for text in texts]
        for tokens, text in zip(batch.tokens, texts, strict=True):
            own = model.prepare_decoder_input_ids_from_labels(torch.tensor([text["target_tokens"]]))
            assert tokens.tolist() == own[0].tolist()
        assert batch.extent[0] == 1 or batch.extent[0] * batch.extent[1] <= 128
        straddling += len(texts) == 1 and len(batch.rows) < len(batch.tokens[0])
        seen.clear()
        with torch.no_grad():
            model(**{name: torch.from_numpy(v) for name, v in batch.inputs(pad_token_id(model, None)).items()})
        assert np.array_equal(batch.kept(seen[0].numpy()), store.read("resid_post", 2, batch.rows))
        assert (
            store.coordinates["token_id"].values[batch.rows].tolist()
            == np.concatenate(
                [line[low:high] for line, (low, high) in zip(batch.tokens, batch.keep, strict=True)]
            ).tolist()
        )
    assert straddling >= 2


def test_a_smaller_budget_bounds_both_sides_and_keeps_rows_and_contexts(tmp_path: Path) -> None:
    _, store = captured(tmp_path / "run.zarr", sites=["resid_post"], layers=[0])
    batch = max(batches(store), key=lambda one: one.extent[0])
    halves = split(batch, batch.extent[0] * batch.extent[1] // 2)
    assert len(halves) > 1
    assert [row for half in halves for row in half.rows] == list(batch.rows)
    assert [line.tolist() for half in halves for line in half.context or ()] == [
        c.tolist() for c in batch.context or ()
    ]
    largest = BatchReader(store.path).read_largest()
    assert largest.extent[0] * largest.extent[1] == store.plan["largest_batch"][2]


def test_padding_of_the_encoder_changes_no_row(tmp_path: Path) -> None:
    together = captured(tmp_path / "together.zarr", sites=["resid_post"])[1]
    alone = captured(tmp_path / "alone.zarr", sites=["resid_post"], batch_tokens=1)[1]
    rows = {
        name: np.concatenate([store.read("resid_post", 3, store.rows(document=line)) for line in order(store)])
        for name, store in (("together", together), ("alone", alone))
    }
    np.testing.assert_allclose(rows["together"], rows["alone"], atol=1e-5)


def order(store: flexcache.Store) -> np.ndarray:
    return np.argsort(store.documents["source_index"].to_numpy())


def test_a_resumed_capture_has_the_same_bytes_as_an_uninterrupted_one(tmp_path: Path) -> None:
    sites = ["resid_post", "cross_attn_out", "resid_post.grad"]
    model, whole = captured(tmp_path / "whole.zarr", sites=sites, layers=[2])
    path = tmp_path / "broken.zarr"
    captured(path, sites=sites, layers=[2])
    for record in sorted((path / "ledger" / "0").glob("*.json"))[1:]:
        record.unlink()
    captured(path, sites=sites, layers=[2])
    assert shard_hashes(path) == shard_hashes(whole.path)
    assert all(found.equal for found in recompute(model, path, units=whole.n_units))
    with pytest.raises(MismatchError, match="decoder"):
        captured(whole.path, sites=sites, layers=[2], decoder_inputs="as_given")


@pytest.mark.slow
def test_documents_and_sites_are_added_to_a_store_of_a_decoder(tmp_path: Path) -> None:
    model, begun = captured(tmp_path / "begun.zarr", documents=DOCUMENTS[:25])
    added = flexcache.extend(model, None, begun.path, DOCUMENTS[25:], progress=False)
    assert added.tokens["context"].null_count == 0
    assert added.n_rows == sum(len(text["target_tokens"]) for text in DOCUMENTS)
    assert all(found.equal for found in recompute(model, added.path, units=added.n_units))
    more = flexcache.extend(model, None, begun.path, sites=["mlp_out"], layers=[1], progress=False)
    assert more.layers("mlp_out") == (1,)
    for other in ({"tokens": [5, 5]}, {"target_tokens": [5, 5]}):
        with pytest.raises(DocumentsError, match="other contents"):
            flexcache.extend(model, None, begun.path, [{**DOCUMENTS[0], **other}], progress=False)


def test_targets_can_be_given_as_decoder_inputs(tmp_path: Path) -> None:
    _, store = captured(tmp_path / "run.zarr", sites=["resid_post"], layers=[0], decoder_inputs="as_given", rows="last")
    lines = order(store)
    ends = [store.coordinates["token_id"].values[store.rows(document=line)].tolist() for line in lines]
    assert ends == [text["target_tokens"][-1:] for text in DOCUMENTS]
    with pytest.raises(ConfigError, match="encoder and a decoder"):
        infer_decoder_inputs(tiny("llama"), "as_given")


def test_a_replay_of_the_decoder_is_exact_if_its_blocks_pass_on_only_the_residual_stream(tmp_path: Path) -> None:
    options: dict[str, Any] = {"sites": ["resid_post"], "documents": DOCUMENTS[:8]}
    model, store = captured(tmp_path / "bart.zarr", **options)
    for layer in range(DEPTH):
        assert replay.identity_error(store, model, "resid_post", layer) == 0
    effects = replay.sweep(store, model, replay.grid("cross_attn_out", layers=2), replay.Zero(), ["kl"], progress=False)
    assert float(abs(effects.results["value"]).max()) > 0
    model, store = captured(tmp_path / "t5.zarr", "t5", **options)
    with pytest.raises(AnalysisError, match="not the model's own forward"):
        replay.sweep(store, model, replay.grid(layers=1), replay.Zero(), ["kl"], progress=False)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"target_tokens": None}, "document 'd3' has no target_tokens"),
        ({"target_tokens": []}, "document 'd3' has no tokens, or no tokens in its target"),
        ({"tokens": []}, "document 'd3' has no tokens, or no tokens in its target"),
        ({"tokens": [VOCABULARY]}, "document 'd3' has a token id that the model does not know"),
        ({"target_tokens": [VOCABULARY]}, "document 'd3' has a token id that the model does not know"),
        ({"target_tokens": [1 << 40]}, "does not hold targets"),
    ],
)
def test_a_document_that_cannot_be_read_is_named(change: dict[str, Any], why: str, tmp_path: Path) -> None:
    texts = [{**text, **(change if text["id"] == "d3" else {})} for text in DOCUMENTS[:6]]
    with pytest.raises(DocumentsError, match=why):
        captured(tmp_path / "run.zarr", documents=texts, sites=["resid_post"])
    assert not (tmp_path / "run.zarr").exists()


def test_documents_without_a_target_and_options_that_exclude_one_are_refused(tmp_path: Path) -> None:
    bare = [{"id": "a", "tokens": [5, 6]}]
    with pytest.raises(DocumentsError, match="no target") as error:
        captured(tmp_path / "run.zarr", documents=bare, sites=["resid_post"])
    assert "document 'a'" in str(error.value)
    assert "side: encoder" in str(error.value)
    both = [{"id": "a", "tokens": [5, 6], "target": "x", "target_tokens": [7]}]
    with pytest.raises(DocumentsError, match="both target and target_tokens"):
        captured(tmp_path / "run.zarr", documents=both, sites=["resid_post"])
    for options in ({"windows": {"length": 8}}, {"packing": {"length": 8}}):
        with pytest.raises(ConfigError, match="is one sequence"):
            captured(tmp_path / "run.zarr", sites=["resid_post"], **options)


def test_a_label_named_target_stays_a_label_without_a_decoder(tmp_path: Path) -> None:
    texts = [{"id": "a", "tokens": [5, 6, 7], "target": "x", "context": ["u", "v", "w"]}]
    options: dict[str, Any] = {"token_labels": ["context"], "layers": [0], "progress": False}
    store = flexcache.capture(tiny("llama"), None, texts, tmp_path / "run.zarr", **options)
    assert store.spec.decoder is None
    assert store.token_label("context").to_pylist() == ["u", "v", "w"]
    assert batches(store)[0].context is None
    assert store.documents["target"].to_pylist() == ["x"]
