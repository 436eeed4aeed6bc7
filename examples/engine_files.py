"""Hidden states that vLLM has saved: imported, compared, and exported for NLA.   python examples/engine_files.py

Without vLLM, a tiny random model writes the files here as vLLM's extract_hidden_states does: one safetensors file for
each prompt, with hidden_states (tokens, layers, features) and token_ids. The layer id i is the input of block i. With
real files, leave out the first step: flexcache import FOLDER -o run.zarr --from speculators --layer-ids 2,18,33,36
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from models import tiny_llama
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import flexcache

TEXTS = [
    "water boils at one hundred degrees",
    "the film was too long and the plot was thin",
    "the capital of peru is lima",
]
LAYER_IDS = [1, 3, 4]


def words() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each word of the texts."""
    known = {word: number for number, word in enumerate(["<unk>", *sorted(set(" ".join(TEXTS).split()))])}
    backend = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def write_samples(folder: Path, model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write a file for each prompt. The output of the last block is before the last norm, as in vLLM."""
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        ids = torch.tensor(tokenizer(text).input_ids)
        seen: dict[str, list] = {}
        wrapped = flexcache.FlexModel(model, seen)
        blocks = [f"model.layers.{layer - 1}" for layer in LAYER_IDS]
        for block in blocks:
            wrapped.register_forward_hook(flexcache.HookFunction(block))
        with torch.no_grad():
            wrapped(ids[None])
        wrapped.restore()
        stacked = torch.stack([seen[block][0][0] for block in blocks], dim=1)
        save_file({"hidden_states": stacked, "token_ids": ids}, folder / f"hs_{number}.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, help="a new folder for the store and the tables; by default temporary")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        output = given.output or Path(temporary)
        model, tokenizer = tiny_llama(), words()
        write_samples(output / "hidden_states", model, tokenizer)

        store = flexcache.import_folder(
            output / "hidden_states",
            output / "run.zarr",
            "speculators",
            layer_ids=LAYER_IDS,
            depth=4,
            model="a tiny random Llama",
            engine={"name": "vllm", "version": "0.22.0", "settings": {"enable_prefix_caching": False}},
        )
        print(store)
        print("engine:", store.provenance.model["engine"])

        documents = [{"id": f"hs_{number}", "text": text} for number, text in enumerate(TEXTS)]
        own = flexcache.capture(
            model, tokenizer, documents, output / "own.zarr", sites=["resid_post"], dtype="float32", progress=False
        )
        for layer in store.layers("resid_post"):
            pairs = [(store.rows(line["id"]), own.rows(line["id"])) for line in documents]
            differences = [
                np.abs(store.read("resid_post", layer, theirs) - own.read("resid_post", layer, ours)).max()
                for theirs, ours in pairs
            ]
            print(f"resid_post of layer {layer}: largest difference from a capture {max(differences):.1e}")

        (table,) = flexcache.export(
            store.path, output / "nla", "nla", sites=["resid_post"], layers=[2], tokenizer=tokenizer, per_document=2
        )
        for line in pq.read_table(table).to_pylist():
            size = len(line["activation_vector"])
            print(f"{line['doc_id']}: {size} values of |{line['detokenized_text_truncated']}|")


if __name__ == "__main__":
    main()
