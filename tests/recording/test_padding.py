"""Models that ignore the attention mask: every document is stored as if it were alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn

import flexcache
from flexcache.errors import CaptureError, ConfigError, PlanError
from flexcache.recording.forward.batch_reader import BatchReader
from flexcache.recording.forward.objective import NextTokenLoss
from tests.corpora import lengths, token_documents
from tests.models import TWO_SIDED, VOCABULARY, tiny

DOCUMENTS = token_documents([3, 9, 17, 9, 40, 1, 17, 41, 9, 3, 26, 40], vocabulary=VOCABULARY)
MORE = [{**document, "id": f"new-{document['id']}"} for document in DOCUMENTS]
QUIET: dict[str, Any] = {"progress": False, "batch_tokens": 96}
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}


class Bidirectional(hf.LlamaForCausalLM):
    """Return a decoder that was made into an encoder and drops its mask."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **more: Any) -> Any:
        count = input_ids.shape[1]
        whole = torch.zeros(len(input_ids), 1, count, count, dtype=self.dtype)
        return super().forward(input_ids=input_ids, attention_mask=whole, **more)


class Mixer(nn.Module):
    """A convolution over the sequence that reads both neighbours of a token, or the two before it."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.convolution, self.beside = nn.Conv1d(32, 32, 3), (2, 0) if causal else (1, 1)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        mixed: torch.Tensor = self.convolution(nn.functional.pad(states.transpose(1, 2), self.beside))
        return states + mixed.transpose(1, 2)


class Convolutions(nn.Module):
    """A language model of convolutions, whose forward takes a mask and does not use it."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.config = hf.PretrainedConfig(vocab_size=VOCABULARY)
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.layers = nn.ModuleList(Mixer(causal) for _ in range(2))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        states = self.embed(input_ids)
        for layer in self.layers:
            states = layer(states)
        return hf.modeling_outputs.CausalLMOutput(logits=states @ self.embed.weight.T)


def made(kind: Any, config: Any, dtype: torch.dtype = torch.float32, **sizes: Any) -> nn.Module:
    torch.manual_seed(0)
    model = kind(config(**{**SIZES, "num_attention_heads": 4, "initializer_range": 0.2, **sizes}))
    return model.to(dtype).eval()  # type: ignore[no-any-return]


def convolutions(causal: bool) -> nn.Module:
    torch.manual_seed(0)
    return Convolutions(causal).eval()


def quantised() -> nn.Module:
    """A model whose int8 activations have one scale a batch."""
    model = tiny("llama", initializer_range=0.2)
    model.model.layers[1].mlp.register_forward_hook(
        lambda _, args, output: (output * 127 / output.abs().max()).round() * output.abs().max() / 127
    )
    return model


LEAKING: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "fnet": (lambda: made(hf.FNetModel, hf.FNetConfig), "encoder.layer.1"),
    "convbert": (lambda: made(hf.ConvBertModel, hf.ConvBertConfig), "encoder.layer.1"),
    "convbert_bfloat16": (lambda: made(hf.ConvBertModel, hf.ConvBertConfig, torch.bfloat16), "encoder.layer.1"),
    "yoso": (lambda: made(hf.YosoModel, hf.YosoConfig), "encoder.layer.1"),
    "bidirectional": (lambda: made(Bidirectional, hf.LlamaConfig), "model.layers.1"),
    "convolutions": (lambda: convolutions(False), "layers.1"),
}


def alone(model: nn.Module, module: str, tokens: Sequence[int]) -> np.ndarray:
    """Return the activations that a plain hook sees for a document alone."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(module).register_forward_hook(
        lambda _, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        model(input_ids=torch.tensor([list(tokens)]))
    handle.remove()
    return seen[0].float().reshape(len(tokens), -1).numpy()


def check_alone(store: flexcache.Store, model: nn.Module, site: str, documents: Any = DOCUMENTS) -> None:
    """Compare every row with the document alone; bfloat16 on a CPU rounds a token in the same way in every batch."""
    for document in documents:
        found = store.read(site, None, store.rows(document=document["id"]))
        expected = alone(model, site, document["tokens"])
        assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max(), document["id"]


def shapes(store: flexcache.Store, batch_tokens: int | None = None) -> list[set[tuple[int, ...]]]:
    """Return the sets of lengths in each batch, for either side."""
    reader = BatchReader(store.path)
    batches = [batch for unit in range(store.n_units) for batch in reader.read_unit(unit, batch_tokens)]
    sides = [[batch.tokens] if batch.context is None else [batch.tokens, batch.context] for batch in batches]
    return [set(zip(*([len(line) for line in side] for side in both), strict=True)) for both in sides]


def batching(store: flexcache.Store) -> str | None:
    return store.provenance.batching


@pytest.mark.parametrize("family", LEAKING)
def test_rows_are_those_of_documents_alone(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, site = LEAKING[family]
    model = make()
    store = flexcache.capture(model, None, DOCUMENTS, tmp_path / "run.zarr", sites=site, batch_tokens=96)
    check_alone(store, model, site)
    assert batching(store) == "equal_lengths"
    assert all(len(one) == 1 for one in shapes(store))
    assert len(shapes(store)) < len(DOCUMENTS), "documents of one length share a batch"
    said = " ".join(capsys.readouterr().err.split())
    assert f"{site} changes by" in said
    assert "batches hold sequences of one length only" in said
    assert store.provenance.others["batching"]["because"].startswith(f"{site} changes by")
    store = flexcache.extend(model, None, store.path, MORE, progress=False)
    check_alone(store, model, site, [*DOCUMENTS, *MORE])
    assert all(len(one) == 1 for one in shapes(store))
    assert all(item.equal for item in flexcache.recompute(model, store.path, units=100))


@pytest.mark.parametrize("make", [lambda: tiny("llama"), lambda: tiny("bert"), lambda: convolutions(True)])
def test_a_model_that_ignores_padding_has_padded_batches(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = make()
    site = "layers.1" if isinstance(model, Convolutions) else "resid_post"
    store = flexcache.capture(model, None, DOCUMENTS, tmp_path / "run.zarr", sites=site, **QUIET)
    assert batching(store) == "padded"
    assert any(len(one) > 1 for one in shapes(store))
    sites = {site: (4, 64)} if site == "resid_post" else {site: 32}
    other = tmp_path / "other.zarr"
    flexcache.record(other, DOCUMENTS, sites=sites, model="any", dtype="float32", batch_tokens=96)
    for name in ("sequences.parquet", "documents.parquet"):
        assert (store.path / name).read_bytes() == (other / name).read_bytes()


def test_sequences_that_share_a_scale_are_run_alone(tmp_path: Path) -> None:
    model, site = quantised(), "model.layers.3"
    store = flexcache.capture(model, None, DOCUMENTS, tmp_path / "run.zarr", sites=site, **QUIET)
    assert batching(store) == "single"
    assert len(shapes(store)) == len(DOCUMENTS)
    check_alone(store, model, site)


def test_gradients_are_those_of_documents_alone(tmp_path: Path) -> None:
    model, sites = convolutions(False), ["layers.0.grad", "objective"]
    store = flexcache.capture(model, None, DOCUMENTS, tmp_path / "run.zarr", sites=sites[0], **QUIET)
    single = flexcache.capture(
        model, None, DOCUMENTS, tmp_path / "1.zarr", sites=sites[0], progress=False, batch_tokens=1
    )
    assert batching(store) == "equal_lengths"
    for document in DOCUMENTS:
        for site in sites:
            found, expected = (s.read(site, None, s.rows(document=document["id"])) for s in (store, single))
            assert np.allclose(found, expected, atol=1e-5)


def test_an_objective_that_is_a_mean_over_the_batch_gets_batches_of_one_document(tmp_path: Path) -> None:
    model = tiny("llama")

    def mean(output: Any, batch: Any) -> torch.Tensor:
        return NextTokenLoss()(output, batch).mean()

    stores = [
        flexcache.capture(
            model, None, DOCUMENTS, tmp_path / f"{most}.zarr", sites="resid_post.grad", layers=[1], objective=mean,
            progress=False, batch_tokens=most,
        )
        for most in (96, 1)
    ]  # fmt: skip
    assert batching(stores[0]) == "single"
    for document in DOCUMENTS:
        found, expected = (s.read("resid_post.grad", 1, s.rows(document=document["id"])) for s in stores)
        assert np.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"windows": {"length": 8, "stride": 6}}, {"packing": {"length": 16, "separator": 2, "bos": 1}}]
)
def test_rows_of_windows_and_packings_are_those_of_sequences_alone(options: dict[str, Any], tmp_path: Path) -> None:
    model, site = convolutions(False), "layers.1"
    store = flexcache.capture(model, None, DOCUMENTS, tmp_path / "run.zarr", sites=site, **options, **QUIET)
    assert all(len(one) == 1 for one in shapes(store))
    lines = store.tokens.select(["tokens", "row_start", "n_rows", "keep_start"]).to_pylist()
    for line in lines:
        rows = np.arange(line["row_start"], line["row_start"] + line["n_rows"])
        ids = store.coordinates["token_id"].values[rows]
        if ids.tolist() == line["tokens"][line["keep_start"] : line["keep_start"] + line["n_rows"]]:
            expected = alone(model, site, line["tokens"])[line["keep_start"] :][: line["n_rows"]]
            assert np.abs(store.read(site, None, rows) - expected).max() < 1e-5


def test_an_encoder_that_drops_its_mask_gets_contexts_of_equal_length(tmp_path: Path) -> None:
    model = tiny("bart")
    model.get_encoder().register_forward_pre_hook(
        lambda _, args, given: (args, {**given, "attention_mask": None}), with_kwargs=True
    )
    documents = [
        {"id": f"{n}", "tokens": document["tokens"], "target_tokens": DOCUMENTS[-1 - n % 5]["tokens"][: 4 + n % 3]}
        for n, document in enumerate([*DOCUMENTS, *DOCUMENTS])
    ]
    assert "bart" in TWO_SIDED
    store = flexcache.capture(model, None, documents, tmp_path / "run.zarr", **QUIET)
    assert batching(store) == "equal_lengths"
    assert all(len(one) == 1 for one in shapes(store))
    single = flexcache.capture(model, None, documents, tmp_path / "1.zarr", progress=False, batch_tokens=1)
    for document in documents:
        found, expected = (s.read("resid_post", 3, s.rows(document=document["id"])) for s in (store, single))
        assert np.allclose(found, expected, atol=2e-5)


def test_a_resumed_capture_keeps_the_batches(tmp_path: Path) -> None:
    model, site = convolutions(False), "layers.1"
    documents = token_documents(lengths(120), vocabulary=VOCABULARY)
    whole = flexcache.capture(model, None, documents, tmp_path / "whole.zarr", sites=site, **QUIET)
    assert whole.n_units > 2
    left = [40]

    def stop(*_: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        flexcache.capture(model, None, documents, tmp_path / "run.zarr", sites=site, **QUIET)
    handle.remove()
    assert 0 < len(flexcache.open(tmp_path / "run.zarr").committed_units) < whole.n_units
    options = {**QUIET, "batch_tokens": 48}
    store = flexcache.capture(model, None, documents, tmp_path / "run.zarr", sites=site, **options)
    assert (store.path / "sequences.parquet").read_bytes() == (whole.path / "sequences.parquet").read_bytes()
    assert all(len(one) == 1 for one in shapes(store, 48))
    assert np.allclose(store.read(site), whole.read(site), atol=1e-5)
    check_alone(store, model, site, documents)


def forget(store: flexcache.Store) -> None:
    """Turn a store into one of an earlier version, which did not test padded batches."""
    text = (store.path / "zarr.json").read_text(encoding="utf-8")
    assert '"batching"' in text
    (store.path / "zarr.json").write_text(text.replace('"batching"', '"before"'), encoding="utf-8")


def test_a_model_that_leaks_cannot_complete_a_store_of_padded_batches(tmp_path: Path) -> None:
    model = convolutions(False)
    store = flexcache.capture(model, None, DOCUMENTS, tmp_path / "run.zarr", sites="embed", **QUIET)
    assert batching(store) == "padded"
    with pytest.raises(PlanError, match="mixes sequences[\\s\\S]*layers.1 changes"):
        flexcache.extend(model, None, store.path, sites="layers.1", progress=False)
    store = flexcache.extend(model, None, store.path, MORE, progress=False)
    check_alone(store, model, "embed", [*DOCUMENTS, *MORE])


def test_a_store_of_an_earlier_version_is_completed_unless_its_batches_leak(tmp_path: Path) -> None:
    model = convolutions(False)
    documents = token_documents(lengths(120), vocabulary=VOCABULARY)
    for site in ("embed", "layers.1"):
        path = tmp_path / f"{site}.zarr"
        store = flexcache.capture(convolutions(False), None, documents, path, sites=site, **QUIET)
        record = path / "ledger" / "0" / "1.json"
        record.unlink()
        forget(store)
    assert flexcache.capture(model, None, documents, tmp_path / "embed.zarr", sites="embed", **QUIET).complete
    with pytest.raises(PlanError, match="mixes sequences"):
        flexcache.capture(model, None, documents, tmp_path / "layers.1.zarr", sites="layers.1", **QUIET)


class Pairs(Convolutions):
    """A model that cannot run on a single token, as those that pool pairs."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        if input_ids.shape[1] < 2:
            raise RuntimeError("nothing to pool")
        return super().forward(input_ids)


def test_a_document_that_the_model_cannot_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="a forward fails[\\s\\S]*1 × 1 tokens[\\s\\S]*nothing to pool"):
        flexcache.capture(Pairs(False).eval(), None, DOCUMENTS, tmp_path / "run.zarr", sites="layers.1", **QUIET)


class Padless(Convolutions):
    """A model that fails on padding."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        assert attention_mask is None or bool(attention_mask.all()), "no padding, please"
        return super().forward(input_ids)


class Maskless(Convolutions):
    def forward(self, input_ids: torch.Tensor) -> Any:  # type: ignore[override]
        return super().forward(input_ids)


def test_a_model_whose_forward_fails_on_padding_runs_equal_lengths(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Padless(causal=False).eval()
    store = flexcache.capture(model, None, DOCUMENTS, tmp_path / "run.zarr", sites="layers.1", **QUIET)
    check_alone(store, model, "layers.1")
    assert "no padding, please" in store.provenance.others["batching"]["because"]


def test_a_forward_that_takes_no_mask_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="attention_mask"):
        flexcache.capture(Maskless(causal=True).eval(), None, DOCUMENTS, tmp_path / "run.zarr", sites="embed", **QUIET)
    assert not (tmp_path / "run.zarr").exists()
