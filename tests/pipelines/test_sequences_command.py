"""Sequences and rows in a configuration file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import flexcache
from tests.pipelines.test_cli import run


def test_windows_rules_and_labels_from_the_configuration(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [{"id": "long", "text": " ".join(f"w{4 + i}" for i in range(40)), "tag": [f"t{i}" for i in range(40)]}]
    (config.parent / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in texts))
    changes = ["documents=own.jsonl", "rows={every: 2}", "windows={length: 16, stride: 8}", "token_labels=[tag]"]
    options = [word for change in changes for word in ("--set", change)]
    assert "1 in 4 sequences" in " ".join(run(capsys, "plan", config, "-q", *options).split())
    run(capsys, "capture", config, "-q", *options)
    store = flexcache.open("run.zarr")
    assert store.coordinates["position"].values.tolist() == list(range(0, 40, 2))
    assert store.token_label("tag").to_pylist() == [f"t{i}" for i in range(0, 40, 2)]
    (config.parent / "own.jsonl").write_text(json.dumps({**texts[0], "id": "another"}) + "\n")
    text = run(capsys, "extend", config, "-q", *options, "--set", "rows={every: 3}", status=1)
    assert "choice" in text
    run(capsys, "extend", config, "-q", *options)
    assert flexcache.open("run.zarr").n_rows == 40
    run(capsys, "verify", "run.zarr", "-q")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("rows={evry: 2}", "did you mean every"),
        ("rows={every: 2, take: most}", "cannot take 'most'"),
        ("windows={length: 8, stride: 20}", "leaves tokens out"),
        ("windows={lenght: 3}", "did you mean length"),
    ],
)
def test_mistakes_fail_before_a_model_is_loaded(
    change: str, message: str, config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexcache.model.ModelSource.load", lambda self: pytest.fail("the model was loaded"))
    text = run(capsys, "capture", config, "-q", "--set", change, status=2)
    assert message in " ".join(text.split())
