"""Hidden states of vLLM's offline API in a store.   python examples/vllm_capture.py MODEL STORE [--texts FILE]

vLLM saves the states of a prompt with its method extract_hidden_states and a connector that writes one file for each
request (https://docs.vllm.ai/en/latest/features/speculative_decoding/extract_hidden_states/). Its layer id i is the
input of block i, so the output of block l, which is resid_post of layer l here, has the id l + 1; the id after the last
block is its output before the last norm. With prefix caching, or a token that the engine adds, there would be another
number of states than of tokens: `Batch.kept` refuses them, and the store keeps only whole units.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
import vllm
from vllm.config.kv_transfer import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1 import example_hidden_states_connector as connector

import flexcache

TEXTS = ["The capital of France is Paris.", "A film that is too long.", "Water boils at 100 degrees."]


def engine(model: str, layers: list[int], folder: str) -> vllm.LLM:
    """Return vLLM set up to write the outputs of these blocks into a folder."""
    drafts = {"hf_config": {"eagle_aux_hidden_state_layer_ids": [layer + 1 for layer in layers]}}
    return vllm.LLM(
        model=model,
        enable_prefix_caching=False,
        enable_chunked_prefill=False,
        speculative_config={
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": drafts,
        },
        kv_transfer_config=KVTransferConfig(
            kv_connector="ExampleHiddenStatesConnector",
            kv_role="kv_producer",
            kv_connector_extra_config={"shared_storage_path": folder},
        ),
    )


def states_of(output: Any) -> torch.Tensor:
    """Return the states of a prompt, shape (tokens, layers, features), and remove the file."""
    path = output.kv_transfer_params["hidden_states_path"]
    states = connector.load_hidden_states(path)["hidden_states"]
    connector.cleanup_hidden_states(path)
    return states


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("store")
    parser.add_argument("--texts", type=Path, help="a file with one text in each line")
    given = parser.parse_args()
    texts = given.texts.read_text(encoding="utf-8").splitlines() if given.texts else TEXTS
    config = transformers.AutoConfig.from_pretrained(given.model).get_text_config()
    depth = config.num_hidden_layers
    layers = sorted({depth // 3, 2 * depth // 3, depth - 1})
    with tempfile.TemporaryDirectory() as folder:
        model = engine(given.model, layers, folder)
        prompt = vllm.SamplingParams(max_tokens=1, temperature=0.0)
        recorder = flexcache.record(
            given.store,
            [{"text": text} for text in texts],
            tokenizer=transformers.AutoTokenizer.from_pretrained(given.model),
            sites={"resid_post": (depth, config.hidden_size)},
            layers=layers,
            model={"name": given.model, "engine": {"name": "vllm", "version": vllm.__version__}},
            fingerprint={"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"},
        )
        with recorder:
            for batch in recorder.batches():
                prompts = [{"prompt_token_ids": tokens.tolist()} for tokens in batch.tokens]
                states = [states_of(output) for output in model.generate(prompts, prompt, use_tqdm=False)]
                for column, layer in enumerate(layers):
                    values = batch.kept([of_prompt[:, column] for of_prompt in states])
                    recorder.put("resid_post", values, rows=batch.rows, layer=layer)
    print(flexcache.open(given.store))


if __name__ == "__main__":
    main()
