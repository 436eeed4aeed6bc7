"""User errors in one table: each ends in one message with a remedy, and nothing that was written is lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import zarr

import flexcache
from tests.models import tiny
from tests.pipelines.test_cli import run
from tests.recording.test_recorder import shard_hashes

DOCS = Path(__file__).parents[2] / "docs" / "reliability.md"


@dataclass(frozen=True)
class Case:
    """A mistake and the message it ends in; *before* makes it, in the folder of the configuration."""

    what: str
    says: str
    status: int
    changes: tuple[str, ...] = ()
    before: Callable[[Path], None] = lambda folder: None
    command: tuple[str, ...] = ("capture", "config.yaml", "-q")
    store: bool = False
    """True if a store exists already; it must not change."""

    def __repr__(self) -> str:
        return self.what


def texts(*lines: object) -> Callable[[Path], None]:
    return lambda folder: (folder / "own.jsonl").write_text("\n".join(json.dumps(line) for line in lines)) and None


def weights(change: Callable[[torch.nn.Module], None]) -> Callable[[Path], None]:
    """Save a checkpoint of changed weights as ``changed``, with the tokenizer of the configured one."""

    def make(folder: Path) -> None:
        source = Path((folder / "config.yaml").read_text().splitlines()[0].removeprefix("model: "))
        shutil.copytree(source, folder / "changed")
        model = tiny("llama")
        with torch.no_grad():
            change(model)
        model.save_pretrained(folder / "changed")

    return make


def fill(value: float) -> Callable[[torch.nn.Module], None]:
    def change(model: torch.nn.Module) -> None:
        model.get_parameter("model.layers.1.mlp.down_proj.weight").mul_(value)

    return change


def adapter(folder: Path) -> None:
    (folder / "adapter").mkdir()
    said = {"peft_type": "LORA", "base_model_name_or_path": "gpt2"}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(said))


def another_zarr(folder: Path) -> None:
    zarr.create_array(folder / "run.zarr" / "x", shape=(3,), dtype="f4")
    zarr.open_group(folder / "run.zarr", mode="a")


OWN = ("documents=own.jsonl",)
CASES = [
    Case("an empty corpus", "there are no documents", 1, OWN, texts()),
    Case("an empty document", "has no tokens", 1, OWN, texts({"id": "a", "text": "w4"}, {"id": "b", "text": ""})),
    Case(
        "two documents with the same id",
        "documents: {unique_ids: false}",
        1,
        OWN,
        texts({"id": "a", "text": "w4"}, {"id": "a", "text": "w5"}),
    ),
    Case("a text that is a number", "text", 1, OWN, texts({"id": "a", "text": 3}, {"id": "b", "text": 4})),
    Case("no text and no tokens", "text", 1, OWN, texts({"id": "a", "label": "x"})),
    Case("a file of documents that does not exist", "nowhere.jsonl", 1, ("documents=nowhere.jsonl",)),
    Case("an unknown key", "did you mean batch_tokens", 2, ("batch_token=3",)),
    Case("a word instead of a number", "key 'batch_tokens'", 2, ("batch_tokens=many",)),
    Case("a negative number", "key 'batch_tokens'", 2, ("batch_tokens=-4",)),
    Case("an unknown dtype", "key 'dtype'", 2, ("dtype=float17",)),
    Case("a site that does not exist", "did you mean resid_post", 1, ("sites=resid_pots",)),
    Case("a module path that matches nothing", "model.layers.7.mlp", 1, ("sites=model.layers.7.mlp",)),
    Case("a layer that does not exist", "no layer 9", 1, ("sites=resid_post", "layers=[9]")),
    Case("a model that does not exist", "cannot be loaded", 2, ("model.name=/nowhere/at/all",)),
    Case("an adapter of PEFT as the model", "adapter of base model gpt2", 2, ("model=adapter",), adapter),
    Case("weights that are NaN", "nan", 1, ("model.name=changed",), weights(fill(float("nan")))),
    Case("values that float16 cannot hold", "float16", 1, ("model.name=changed", "dtype=float16"), weights(fill(1e7))),
    Case("a store path that is a file", "run.zarr", 1, (), lambda f: (f / "run.zarr").write_text("mine") and None),
    Case("a store path below a file", "not a folder", 1, ("store=config.yaml/run.zarr",)),
    Case("a store path that is another Zarr", "run.zarr", 1, (), another_zarr),
    Case("a folder that cannot be written", "/proc", 1, ("store=/proc/run.zarr",)),
    Case("other documents on the same store", "documents", 1, OWN, texts({"id": "a", "text": "w4 w5"}), store=True),
    Case("another model on the same store", "model", 1, ("model.name=changed",), weights(fill(2.0)), store=True),
    Case("another dtype on the same store", "dtype", 1, ("dtype=float16",), store=True),
    Case(
        "a label that does not exist",
        "did you mean label",
        1,
        command=("probe", "run.zarr", "--target", "lable"),
        store=True,
    ),
    Case(
        "an output folder that is a file",
        "cannot be written there",
        2,
        command=("probe", "run.zarr", "--target", "label", "-o", "config.yaml"),
        store=True,
    ),
    Case("a command on a path that is not a store", "is not a store", 1, command=("info", "nothing.zarr")),
]


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_a_mistake_is_one_message_with_a_remedy_and_loses_nothing(
    case: Case, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, kept = config.parent, {}
    if case.store:
        run(capsys, "capture", config, "-q")
        kept = shard_hashes(folder / "run.zarr")
    case.before(folder)
    mine = (folder / "run.zarr").read_text() if (folder / "run.zarr").is_file() else None
    changes = [word for change in case.changes for word in ("--set", change)]
    text = run(capsys, *case.command, *changes, status=case.status)
    said = text[text.index("error:") :]
    assert case.says in " ".join(said.split())
    assert len(said.splitlines()[0]) > len("error: ")
    assert "Traceback" not in text
    if case.store:
        assert shard_hashes(folder / "run.zarr") == kept
        assert flexcache.verify(folder / "run.zarr").sound
        assert "nothing to do" in run(capsys, "capture", config)
    elif mine is not None:
        assert (folder / "run.zarr").read_text() == "mine"
    elif case.before is another_zarr:
        assert sorted(path.name for path in (folder / "run.zarr").iterdir()) == ["x", "zarr.json"]
    elif (folder / "run.zarr").exists():
        assert flexcache.verify(folder / "run.zarr").sound, "what was planned stays, and is whole"


def test_unusual_but_valid_documents_are_captured(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A document of one token, and one longer than all others together, the context and a batch."""
    long = " ".join(f"w{4 + i % 90}" for i in range(900))
    texts({"id": "one", "text": "w4"}, {"id": "long", "text": long}, {"id": "ünï/cödé", "text": "w5 w6"})(config.parent)
    run(capsys, "capture", config, "-q", "--set", "documents=own.jsonl")
    store = flexcache.open("run.zarr")
    assert store.complete
    counts = dict(zip(store.documents["id"].to_pylist(), store.documents["n_rows"].to_pylist()))
    context = tiny("llama").config.max_position_embeddings
    assert counts == {"one": 1, "long": min(900, context), "ünï/cödé": 2}


def test_the_documentation_has_the_same_table() -> None:
    text = DOCS.read_text("utf-8")
    table = [line.split("|")[1].strip() for line in text[text.index("## Mistakes") :].splitlines() if line[:2] == "| "]
    assert table[1:] == [case.what for case in CASES], "docs/reliability.md, under Mistakes"
