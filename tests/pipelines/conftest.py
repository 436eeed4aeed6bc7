from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with a tiny random Llama and a word tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tests.models import VOCABULARY, tiny

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny("llama").save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, VOCABULARY)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled texts as JSON Lines; odd documents contain the word w5."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    lines = []
    for i in range(80):
        words = [f"w{4 + (i * 7 + k * 13) % 250}" for k in range(1 + i % 9)] + (["w5"] if i % 2 else ["w6"])
        lines.append(json.dumps({"id": f"t{i}", "text": " ".join(words), "label": ("no", "yes")[i % 2]}))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def config(tmp_path: Path, checkpoint: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration file in a folder of its own, which is also the working folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(
        f"model: {checkpoint}\ndocuments: {corpus}\nstore: run.zarr\nsites:\n  resid_post: all\n  mlp_post: [0, -1]\n"
        "batch_tokens: 64\nthreads: 1\n"
    )
    return path
