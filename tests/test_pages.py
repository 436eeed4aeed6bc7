"""The pages of the documentation run as they are printed, beside a small store in the place of the one of the demo."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
import typer
from rich.console import Console

from pipelines.cli import app
from pipelines.config import read_config
from pipelines.demo import assets
from pipelines.demo import reviews as demo
from tests.models import tiny

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(flexcache [a-z-]+ [^`]+)`")
COMMAND: Any = typer.main.get_command(app)
ELSEWHERE = ("tcp://", "--open")
"""In commands that need another machine, or a person."""
WORDS = ("quiet", "generous", "film", "hours", "back", "plot", "songs", "slow", "Two", "A", "good", "bad", "went", "to")
ENDS = ("bad", "good")
NAMES = ("Anna", "Boris", "Carla", "David", "Elena", "Oslo", "Lima", "Cairo", "Delhi", "I", "not", "get", "will", ".")


def commands(text: str) -> Iterator[list[str]]:
    """Return the arguments of every command line in blocks of a page, and in its running text."""
    lines = [line for language, block in BLOCK.findall(text) if not language for line in block.splitlines()]
    for line in [line for line in lines if line.startswith("flexcache ")] + INLINE.findall(BLOCK.sub("", text)):
        yield shlex.split(line, comments=True)[1:]


def pages() -> list[str]:
    return ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md") if path.name != "cli.md")]


@pytest.mark.parametrize("page", pages())
def test_every_command_on_a_page_is_one(page: str, tmp_path: Path) -> None:
    base = tmp_path / "config.yaml"
    base.write_text("model: a-model\ndocuments: texts.parquet\nstore: run.zarr\n", encoding="utf-8")
    for name, *arguments in commands((ROOT / page).read_text(encoding="utf-8")):
        command = COMMAND.commands[name]
        with command.make_context(name, list(arguments)) as context:  # refuses what it does not know
            changes = context.params.get("changes")
        if changes and name != "replay":
            read_config(base, changes)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a demo of a random model of 30 blocks."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("demo")
    words = {word: number for number, word in enumerate(("<pad>", "<unk>", *WORDS, *NAMES))}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token="<pad>",
        model_input_names=["input_ids", "attention_mask"],
    )
    sizes = {"hidden_size": 576, "intermediate_size": 16, "num_hidden_layers": 30, "num_attention_heads": 4}
    tiny("llama", vocab_size=len(words), head_dim=4, **sizes).bfloat16().save_pretrained(folder / "fetched")
    tokenizer.save_pretrained(folder / "fetched")
    for name, count in (("films", 60), ("tweets", 40), ("many", 320)):
        texts(count, folder / f"{name}.parquet")
    return folder


def texts(count: int, path: Path) -> None:
    """Write texts of one to six words; whether they end in good or in bad is their label."""
    rows = [
        {
            "id": f"{path.stem}-{number}",
            "text": " ".join([*(WORDS[(number * 5 + k) % 10] for k in range(number // 2 % 6)), ENDS[number % 2]]),
            "score": float(number % 2 * 4 - 2),
            "label": ("negative", "positive")[number % 2],
            "group": f"{path.stem}-{number}",
        }
        for number in range(count)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.fixture
def after_demo(request: pytest.FixtureRequest, shown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which a demo has run, over the texts of the given name, and with fast bfloat16 or without."""
    films, fast = request.param
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "has_native_bfloat16", lambda: fast)
    monkeypatch.setattr(assets, "smollm2", lambda: shown / "fetched")
    monkeypatch.setattr(assets, "vader_sample", lambda n, split=films: shown / f"{split}.parquet")
    monkeypatch.setattr(demo.probe, "run", lambda *_, **__: None)
    demo.run(60, Path("demo"), Console(quiet=True))
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(assets, "vader_sample", lambda n, split="films": shown / f"{split}.parquet")
    texts(20, tmp_path / "more.parquet")
    return tmp_path


def run(page: str, **names: Any) -> dict[str, Any]:
    """Run a page, its code and its commands, in the order in which they are printed; return the names it leaves."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = BLOCK.findall(text)
    for block in (block for language, block in found if language == "yaml"):
        Path("replay.yaml").write_text(block, encoding="utf-8")
    for number, (language, block) in enumerate(found):
        if language == "python":
            exec(compile(block, f"{page}, block {number}", "exec"), names)
        for line in block.splitlines() if not language else ():
            if line.startswith("flexcache ") and not any(word in line for word in ELSEWHERE):
                COMMAND.main(shlex.split(line, comments=True)[1:], prog_name="flexcache", standalone_mode=False)
    return names


@pytest.mark.slow
@pytest.mark.parametrize("after_demo", [("films", True)], indirect=True)
@pytest.mark.usefixtures("after_demo")
def test_the_page_on_statistics_runs() -> None:
    run("docs/statistics.md")
    assert Path("stats").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("after_demo", [("films", True)], indirect=True)
@pytest.mark.usefixtures("after_demo")
def test_the_page_on_probes_runs() -> None:
    names = run("docs/probes.md")
    assert names["direction"].layer == 20
    assert names["sweep"].best.score > 0.9, "the label is the last word"
    assert Path("probes/resid_post-label-logistic/transfer.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("after_demo", [("films", True)], indirect=True)
@pytest.mark.usefixtures("after_demo")
def test_the_page_on_replay_runs() -> None:
    names = run("docs/replay.md")
    assert float(names["found"].results["identity_error"].max()) == 0.0
    assert names["exact"].attrs["rank_correlation"] > 0
    assert Path("replayed/report.html").exists()


def test_the_page_on_conversations_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.sequences.short_templates import THINKING, byte_tokenizer

    monkeypatch.chdir(tmp_path)
    tokenizer = byte_tokenizer(THINKING)
    names = run("docs/conversations.md", model=tiny("llama", vocab_size=320), tokenizer=tokenizer)
    ids = names["thoughts"].coordinates["token_id"].values[names["thoughts"].rows(document=0)]
    assert tokenizer.decode(ids).startswith("Twice ")
    assert set(names["by_part"].results.attrs["classes"]) == {"content", "reasoning", "template"}


@pytest.mark.parametrize("after_demo", [("many", True)], indirect=True)
def test_the_page_on_the_training_stream_runs(after_demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []

    def trainer(*given: Any, **_: Any) -> Any:
        """A trainer of others, which takes one batch."""
        data = next(one for one in given if hasattr(one, "__next__"))
        return SimpleNamespace(fit=lambda: drawn.append(next(data)))

    stand_in(monkeypatch, "sae_lens.training.sae_trainer", SAETrainer=trainer)
    stand_in(monkeypatch, "dictionary_learning.training", trainSAE=lambda *given, **more: trainer(*given).fit())
    coder = lambda features, settings: lambda batch: drawn.append(batch) or SimpleNamespace(fvu=0.5)  # noqa: E731
    stand_in(monkeypatch, "sparsify", SparseCoder=coder)
    names = run("docs/training.md", config=None, settings=None, sae=None)
    assert [tuple(batch.shape) for batch in drawn] == [(1024, 576)] * 3
    assert sorted(names["shuffled"].token_label("source_row").to_pylist()) == list(range(names["store"].n_rows))


def test_the_page_on_virtual_layers_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tokens = [[3 + n % 2, 5, 9, 7 + n][: 2 + n % 3] for n in range(24)]
    documents = [{"id": str(n), "tokens": ids, "language": ("en", "de")[n % 2]} for n, ids in enumerate(tokens)]
    names = run("docs/virtual.md", model=tiny("llama"), tokenizer=None, documents=documents)
    assert names["one"].shape == (2, 112)
    assert names["scores"].results.sizes["layer"] == 4
    assert names["opened"].layers("z") == ()
    assert Path("exported/mlp_post.layer_3.npy").is_file()
    assert Path("stats").is_dir()


def test_the_page_on_sites_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    documents = [{"id": str(n), "tokens": [3 + n % 2, 5, 9, 7 + n], "language": ("en", "de")[n % 2]} for n in range(6)]
    names = run("docs/sites.md", model=tiny("mixtral"), tokenizer=None, documents=documents)
    out, index = names["out"], names["index"]
    sums = [np.linalg.norm(out[index == expert], axis=-1).sum() for expert in range(4)]
    assert np.allclose(names["written"], sums, rtol=1e-5)
    english = np.concatenate([index[names["store"].rows(str(n))].ravel() for n in (0, 2, 4)])
    assert np.allclose(names["load"].loc["en"], np.bincount(english, minlength=4) / len(english))


def stand_in(monkeypatch: pytest.MonkeyPatch, path: str, **attributes: Any) -> None:
    """Put a module under a name that is imported, whether or not it is installed."""
    parts = path.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(parts[end - 1]))
    for name, value in attributes.items():
        setattr(sys.modules[path], name, value)


@pytest.mark.slow
@pytest.mark.parametrize("after_demo", [("films", False)], indirect=True)
@pytest.mark.usefixtures("after_demo")
def test_the_page_on_growing_runs() -> None:
    import flexcache

    run("docs/growing.md")
    store = flexcache.open("demo/smollm2.zarr")
    assert store.complete
    assert set(store.sites) == {"resid_post", "mlp_out", "mlp_post", "attn_out"}
    assert len(store.documents) == 60 + 20 + 2


@pytest.mark.slow
@pytest.mark.parametrize("after_demo", [("many", True)], indirect=True)
def test_the_page_on_autoencoders_runs(after_demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import runpy

    lines = re.findall(r"^python (examples/.*)$", (ROOT / "docs/sae.md").read_text(encoding="utf-8"), re.MULTILINE)
    for line in lines:
        script, *arguments = shlex.split(line, comments=True)
        monkeypatch.setattr(sys, "argv", [script, *arguments, "--steps", "3", "--batch", "512"])
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert Path("sae/report.json").exists()
