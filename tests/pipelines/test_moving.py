"""The commands that copy, merge, reduce, export and import stores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import flexcache
from tests.corpora import build_store
from tests.pipelines.test_cli import run
from tests.recording.test_recorder import shard_hashes


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> flexcache.Store:
    """A store named run.zarr in the working folder."""
    monkeypatch.chdir(tmp_path)
    return build_store(Path("run.zarr"))


def test_copy_converts_selects_and_resumes(store: flexcache.Store, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "copy", "run.zarr", "copy.zarr")
    assert "copying" in text
    assert "complete" in text
    assert shard_hashes(Path("copy.zarr")) == shard_hashes(store.path)
    args = ("--dtype", "float32", "--compression", "zstd", "--site", "resid_*", "--layers", "0,3")
    run(capsys, "copy", "run.zarr", "part.zarr", *args, "-q")
    part = flexcache.open("part.zarr")
    assert part.sites == ("resid_post",)
    assert part.compressed
    assert part.arrays["resid_post"].dtype == "float32"
    assert "another store" in run(capsys, "copy", "run.zarr", "part.zarr", "-q", status=1)
    assert "cannot be read" in run(capsys, "copy", "run.zarr", "new.zarr", "--layers", "0,x", status=2)
    assert "did you mean resid_post" in run(capsys, "copy", "run.zarr", "new.zarr", "--site", "resid_pots", status=1)
    assert not Path("new.zarr").exists()


def test_rm_asks_and_removes(
    store: flexcache.Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    for answer, text in (("n\n", "nothing was removed"), ("y\n", "freed")):
        monkeypatch.setattr("sys.stdin", io.StringIO(answer))
        shown = run(capsys, "rm", "run.zarr", "--site", "resid_post", "--layers", "0", "-q")
        assert "resid_post, layers 0" in shown
        assert text in shown
    assert flexcache.open("run.zarr").layers("resid_post") == (3,)
    assert "freed" in run(capsys, "rm", "run.zarr", "--site", "model.embed", "--yes")
    assert "no site left" in run(capsys, "rm", "run.zarr", "--site", "resid_post", "--yes", status=1)
    run(capsys, "verify", "run.zarr", "-q")
    assert flexcache.open("run.zarr").sites == ("resid_post",)


def test_export_writes_files_and_prints_their_size(store: flexcache.Store, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "export", "run.zarr", "out", "--to", "npy", "--site", "resid_post", "--layers", "3")
    assert "1 files" in text
    assert np.array_equal(np.load("out/resid_post.layer_3.npy"), store.read("resid_post", 3))
    run(capsys, "export", "run.zarr", "table", "--to", "parquet", "-q")
    assert "another export" in run(capsys, "export", "run.zarr", "out", "--to", "npy", "-q", status=1)


def test_merge_joins_stores(store: flexcache.Store, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "copy", "run.zarr", "a.zarr", "--layers", "0", "-q")
    run(capsys, "copy", "run.zarr", "b.zarr", "--layers", "3", "--site", "resid_post", "-q")
    text = run(capsys, "merge", "a.zarr", "b.zarr", "-o", "merged.zarr")
    assert "merging" in text
    assert shard_hashes(Path("merged.zarr")) == shard_hashes(store.path)
    assert "two stores or more" in run(capsys, "merge", "a.zarr", "-o", "other.zarr", status=2)


def test_import_reads_what_export_wrote(store: flexcache.Store, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "export", "run.zarr", "out", "--to", "safetensors", "--site", "resid_post", "-q")
    args = ("import", "out", "--from", "safetensors", "--site", "resid_post", "-o", "back.zarr", "--depth", "5")
    text = run(capsys, *args, "--documents", "out/documents.parquet", "--token-ids", "token_id.npy", "--model", "mine")
    assert "importing" in text
    back = flexcache.open("back.zarr")
    assert back.provenance.model["name"] == "mine"
    rows, ours = (one.rows("doc-7") for one in (back, store))
    assert np.array_equal(back.read("resid_post", 3, rows), store.read("resid_post", 3, ours))
    assert "has 0 groups" in run(capsys, *args, "--layer-pattern", "x", "-q", status=2)


def test_import_reads_the_samples_of_an_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.exchange.test_engine_samples import prompt, write

    monkeypatch.chdir(tmp_path)
    samples = [prompt(number, 5 + number) for number in range(4)]
    for number, sample in enumerate(samples):
        write(Path("in"), "speculators", number, sample)
    args = ("import", "in", "-o", "run.zarr", "--format", "speculators")
    assert "--layer-ids" in run(capsys, *args, status=2)
    text = run(capsys, *args, "--layer-ids", "1,3,4", "--engine", "vllm==0.22.0", "--depth", "4")
    assert "importing" in text
    store = flexcache.open("run.zarr")
    assert store.provenance.model["engine"] == {"name": "vllm", "version": "0.22.0"}
    assert "in, in vllm 0.22.0" in run(capsys, "info", "run.zarr")
    assert np.array_equal(store.read("resid_post", 2, store.rows("hs_3")), samples[3]["states"][:, 1].numpy())
    assert "no use for a site" in run(capsys, *args, "--layer-ids", "1,3,4", "--site", "resid_post", status=2)
    write(Path("in"), "speculators", 2, {**samples[2], "ids": samples[2]["ids"][:-1]})
    assert "hs_2: 6 token ids, but 7 states" in run(capsys, *args, "--layer-ids", "1,3,4", status=1)


def test_export_writes_tables_with_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import pyarrow.parquet as pq

    from tests.exchange.test_text_export import texts, word_tokenizer

    monkeypatch.chdir(tmp_path)
    words = word_tokenizer()
    words.save_pretrained("words")
    store = build_store(Path("run.zarr"), texts(20), tokenizer=words)
    args = ("export", "run.zarr", "out", "--format", "nla", "--site", "resid_post", "--layers", "3")
    assert "--tokenizer FOLDER" in run(capsys, *args, status=2)
    choice = ("--per-document", "2", "--min-position", "1", "--limit", "15", "--seed", "4")
    assert "1 files" in run(capsys, *args, "--tokenizer", "words", *choice)
    found = pq.read_table("out/base.layer_3.parquet")
    assert len(found) == 15
    assert min(found.column("n_raw_tokens").to_pylist()) >= 2
    assert "no use for limit" in run(capsys, *args[:4], "npy", "--limit", "3", status=2)
    assert store.complete
