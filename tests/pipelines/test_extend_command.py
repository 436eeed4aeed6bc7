"""flexcache extend, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import flexcache
from flexcache.store.manage.extension_transaction import ExtensionTransaction
from tests import processes
from tests.pipelines.test_cli import run
from tests.recording.test_recorder import shard_hashes


@pytest.fixture
def started(config: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A configuration with a complete store."""
    run(capsys, "capture", config, "-q")
    return config


@pytest.fixture
def more(started: Path) -> Path:
    """The same configuration with other documents."""
    lines = [json.dumps({"id": f"u{i}", "text": f"w{5 + i} w6 w7", "label": "no"}) for i in range(30)]
    Path("more.jsonl").write_text("\n".join(lines))
    content = yaml.safe_load(started.read_text()) | {"documents": "more.jsonl"}
    path = started.with_name("more.yaml")
    path.write_text(yaml.safe_dump(content))
    return path


def test_documents_and_layers_are_added(
    started: Path, more: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = run(capsys, "extend", more)
    assert "in place" in text
    assert "complete" in text
    assert "nothing to do" in run(capsys, "extend", more)
    assert "nothing to do" in run(capsys, "capture", started)
    change = ("--set", "sites={resid_post: all, mlp_post: all}")
    run(capsys, "extend", started, "-q", *change)
    store = flexcache.open("run.zarr")
    assert len(store.documents) == 110
    assert store.layers("mlp_post") == (0, 1, 2, 3)
    assert "nothing to do" in run(capsys, "extend", started, *change)
    assert "nothing to do" in run(capsys, "capture", started, *change)
    check = ("--recompute", "50", "--config", started, *change)
    assert "are equal, byte for byte" in run(capsys, "verify", "run.zarr", "-q", *check)
    grown = Path("grown.jsonl")
    grown.write_text(corpus.read_text() + "\n" + json.dumps({"id": "last", "text": "w9", "label": "no"}))
    full = (*change, "--set", f"documents={grown}")
    assert "--new-only" in run(capsys, "extend", started, "-q", *full, status=1)
    run(capsys, "extend", started, "-q", *full, "--new-only")
    assert flexcache.open("run.zarr").documents.column("id").to_pylist()[-1] == "last"


def test_mistakes_end_in_one_message(started: Path, more: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = shard_hashes(Path("run.zarr"))
    assert "dtype: auto in the store, float16" in run(capsys, "extend", more, "--set", "dtype=float16", status=1)
    change = ("--set", "sites=[resid_pre]")
    assert "cannot be added together" in run(capsys, "extend", more, *change, status=2)
    assert "is not a store" in run(capsys, "extend", more, "--set", "store=none.zarr", status=1)
    assert "no extension has begun" in run(capsys, "extend", more, "--discard")
    assert shard_hashes(Path("run.zarr")) == before


def test_an_unfinished_extension_is_reported_and_discarded(
    started: Path, more: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("flexcache.recording.extend.complete_store", stop)
        with pytest.raises(KeyboardInterrupt):
            from pipelines import extend
            from pipelines.config import read_config

            extend.run(read_config(more), progress=False)
    assert "an extension has begun" in run(capsys, "info", "run.zarr")
    assert "another extension" in run(capsys, "extend", started, "--set", "sites=[resid_pre]", status=1)
    assert "the extension is discarded" in run(capsys, "extend", more, "--discard")
    assert not ExtensionTransaction("run.zarr").staged


def test_several_processes_extend_one_store(
    started: Path, more: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        json.dumps({"id": f"v{i}", "text": " ".join(f"w{5 + (i * k) % 90}" for k in range(9))}) for i in range(400)
    ]
    Path("more.jsonl").write_text("\n".join(lines))
    command = ("pipelines", "extend", str(more), "-q")
    two = [
        processes.start(processes.module, *command, folder=tmp_path, output=tmp_path / f"output-{number}")
        for number in range(2)
    ]
    for number, process in enumerate(two):
        process.join(120)
        assert process.exitcode == 0, (tmp_path / f"output-{number}").read_text()
    store = flexcache.open("run.zarr")
    assert len(store.documents) == 480
    assert flexcache.verify("run.zarr").sound
    assert not [entry.name for entry in Path("run.zarr").iterdir() if entry.name.startswith(".")]
    assert "byte for byte" in run(
        capsys, "verify", "run.zarr", "-q", "--recompute", "99", "--config", started, "--set", "documents=more.jsonl"
    )
