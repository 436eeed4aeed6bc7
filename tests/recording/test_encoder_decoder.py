"""Either side of an encoder-decoder model can be captured; rows are those that the whole model computes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from rich.console import Console

import flexcache
from flexcache.errors import ConfigError, DocumentsError, MismatchError
from flexcache.recording.forward.batch_reader import BatchReader
from pipelines import capture, extend, plan
from pipelines.config import CaptureConfig, read_config
from tests.corpora import token_documents
from tests.models import VOCABULARY, tiny

BART = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 112, "decoder_ffn_dim": 112}
MODELS = {
    "t5": hf.T5Config(
        vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=112, num_layers=4, num_heads=4, decoder_start_token_id=0
    ),
    "bart": hf.BartConfig(vocab_size=VOCABULARY, d_model=64, encoder_layers=4, decoder_layers=2, **BART),
    "pegasus": hf.PegasusConfig(vocab_size=VOCABULARY, d_model=64, encoder_layers=4, decoder_layers=2, **BART),
}
DOCUMENTS = token_documents([5, 9, 3, 12, 7, 8] * 5, vocabulary=VOCABULARY)


@pytest.mark.parametrize("family", MODELS)
def test_the_encoder_can_be_captured_alone(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = hf.AutoModelForSeq2SeqLM.from_config(MODELS[family]).eval()
    model.save_pretrained(tmp_path / "model")
    whole = hf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model").eval()
    source = flexcache.ModelSource(name=str(tmp_path / "model"), side="encoder", device="cpu")
    encoder = source.load()
    with pytest.raises(DocumentsError, match="side: encoder"):
        flexcache.capture(whole, None, DOCUMENTS, tmp_path / "run.zarr", progress=False)
    store = flexcache.capture(encoder, None, DOCUMENTS, tmp_path / "run.zarr", batch_tokens=64, progress=False)
    assert store.layers("resid_post") == (0, 1, 2, 3)
    assert len(list(source.skeleton().parameters())) == len(list(encoder.parameters()))
    blocks = whole.get_encoder().block if family == "t5" else whole.get_encoder().layers
    seen: list[torch.Tensor] = []
    blocks[2].register_forward_hook(
        lambda _, args, output: seen.append(output if isinstance(output, torch.Tensor) else output[0])
    )
    for unit in range(store.n_units):
        for batch in BatchReader(store.path).read_unit(unit):
            seen.clear()
            ids, mask = torch.from_numpy(batch.input_ids(0)), torch.from_numpy(batch.attention_mask())
            with torch.no_grad():
                whole(input_ids=ids, attention_mask=mask, decoder_input_ids=torch.zeros(len(ids), 1, dtype=torch.long))
            assert np.array_equal(batch.kept(seen[0].numpy()), store.read("resid_post", 2, batch.rows))


def test_a_configuration_says_which_side_and_captures_the_decoder(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    tiny("t5").save_pretrained(tmp_path / "model")
    rng, corpus = np.random.default_rng(0), tmp_path / "pairs.jsonl"
    pairs = [{"tokens": rng.integers(3, 99, 9).tolist(), "target_tokens": rng.integers(3, 99, 5).tolist()}] * 6
    corpus.write_text("".join(json.dumps({"id": str(n), **pair}) + "\n" for n, pair in enumerate(pairs)))
    content = {"documents": str(corpus), "store": str(tmp_path / "run.zarr"), "layers": [1]}
    (tmp_path / "config.yaml").write_text(json.dumps({**content, "model": {"name": str(tmp_path / "model")}}))

    def config(*changes: str) -> CaptureConfig:
        return read_config(tmp_path / "config.yaml", changes)

    quiet = Console(quiet=True)
    with pytest.raises(ConfigError, match="an encoder and a decoder"):
        plan.run(config(), quiet, progress=False)
    for wrong, why in (("model.parallel={tensor: 2}", "whole model"), ("generate={max_new_tokens: 3}", "no targets")):
        with pytest.raises(ConfigError, match=why):
            config("model.side=decoder", wrong)
    assert plan.run(config("model.side=decoder"), quiet, progress=False).rows == 30
    store = capture.run(config("model.side=decoder"), progress=False)
    assert store.n_rows == 30
    assert store.tokens["context"].to_pylist() == [pair["tokens"] for pair in pairs]
    with pytest.raises(MismatchError, match="decoder_inputs: shifted"):
        extend.run(config("model.side=decoder", "decoder_inputs=as_given"), progress=False)


def test_a_decoder_has_no_encoder(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is not an encoder-decoder"):
        flexcache.ModelSource(name=str(tmp_path), side="encoder").load()
