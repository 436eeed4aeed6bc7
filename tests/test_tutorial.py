"""The code of the tutorial and of the README runs as it is printed, on a small model in place of the one it names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.models import tiny

ROOT = Path(__file__).parents[1]
WORDS = ("quiet", "generous", "film", "hours", "back", "plot", "songs", "slow")


def blocks(page: str) -> list[str]:
    """Return the Python blocks of a page, in order."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture
def named_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A random model of 16 blocks and a tokenizer of words, whatever name is asked for; an empty current folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate(("<pad>", "<unk>", "good", "bad", *WORDS))}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")
    model = tiny("llama", num_hidden_layers=16)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name, **options: model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: tokenizer)


def reviews() -> list[dict[str, Any]]:
    """More documents than a page has room for."""
    return [
        {
            "id": f"review-{number}",
            "text": f"{WORDS[number % 8]} {WORDS[number // 8]} {('bad', 'good')[number % 2]}",
            "label": ("negative", "positive")[number % 2],
        }
        for number in range(60)
    ]


@pytest.mark.usefixtures("named_model")
def test_the_tutorial_runs() -> None:
    import flexcache

    capture, read, probe = blocks("docs/tutorial.md")
    names: dict[str, Any] = {}
    exec(compile(capture, "capture", "exec"), names)
    assert names["store"].complete
    assert names["store"].sites == ("resid_post", "mlp_out")
    exec(compile(read, "read", "exec"), names)
    assert names["rows"].stop == names["store"].n_rows
    names["store"] = flexcache.capture(
        names["model"], names["tokenizer"], reviews(), "reviews.zarr", layers=[0, 15], progress=False
    )
    exec(compile(probe, "probe", "exec"), names)
    assert Path("layers.png").stat().st_size > 1000


@pytest.mark.usefixtures("named_model")
def test_the_first_example_of_the_readme_runs() -> None:
    names: dict[str, Any] = {}
    exec(compile(blocks("README.md")[0], "readme", "exec"), names)
    store = names["store"]
    assert store.complete
    assert store.rows(document="a", position=-1).shape == (1,)
