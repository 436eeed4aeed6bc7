"""The command that joins labels to a store."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

import flexcache
from tests.corpora import build_store, lengths, token_documents
from tests.pipelines.test_cli import run

DOCUMENTS = token_documents(lengths(20, longest=5))


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pd.DataFrame:
    """The labels in mood.csv, next to run.zarr in the working folder."""
    monkeypatch.chdir(tmp_path)
    build_store(Path("run.zarr"), DOCUMENTS)
    table = pd.DataFrame({"id": [d["id"] for d in DOCUMENTS[2:]] + ["gone"], "mood": 1, "note": "a"})
    table.to_csv("mood.csv", index=False)
    return table


def test_labels_are_joined_listed_replaced_and_removed(table: pd.DataFrame, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no labels were joined" in run(capsys, "label", "run.zarr")
    text = run(capsys, "label", "run.zarr", "mood.csv", "--on", "id")
    assert "mood: 18 of 20 documents by id; 1 line with an unknown id left out" in text
    assert "mood: int64, of documents, 2 documents without a value" in text
    assert run(capsys, "label", "run.zarr") == text
    assert "mood: 18 of 20 documents" in run(capsys, "info", "run.zarr")
    table[:5].to_csv("mood.csv", index=False)
    assert "--replace" in run(capsys, "label", "run.zarr", "mood.csv", status=1)
    assert "5 of 20" in run(capsys, "label", "run.zarr", "mood.csv", "--replace", "--columns", "mood")
    assert "note" not in flexcache.open("run.zarr").documents.column_names
    assert "is removed" in run(capsys, "label", "run.zarr", "--remove", "mood")
    assert "no label table 'mood'" in run(capsys, "label", "run.zarr", "--remove", "mood", status=1)


def test_labels_of_tokens_are_joined(table: pd.DataFrame, capsys: pytest.CaptureFixture[str]) -> None:
    pd.DataFrame({"id": [d["id"] for d in DOCUMENTS], "tag": [["t"] * len(d["tokens"]) for d in DOCUMENTS]}).to_json(
        "tags.jsonl", orient="records", lines=True
    )
    args = ("--token-labels", "tag", "--name", "pos")
    assert "tag: list<item: string>, of tokens" in run(capsys, "label", "run.zarr", "tags.jsonl", *args)
    assert set(flexcache.open("run.zarr").token_label("tag").to_pylist()) == {"t"}


def test_damaged_labels_are_named_by_verify_and_repair(table: pd.DataFrame, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "label", "run.zarr", "mood.csv")
    (file,) = Path("run.zarr/labels").iterdir()
    file.write_bytes(b"")
    assert str(file.relative_to("run.zarr")) in run(capsys, "verify", "run.zarr", "-q", status=1).replace("\n", "")
    text = " ".join(run(capsys, "repair", "run.zarr", "-q", status=1).split())
    assert "holds joined labels: remove them with flexcache label --remove, and join them again" in text
    run(capsys, "label", "run.zarr", "--remove", "mood")
    run(capsys, "verify", "run.zarr", "-q")
