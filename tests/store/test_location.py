"""Spellings of the path of a store, and permissions of the files that are written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import flexcache
from flexcache.errors import ConfigError, DocumentsError, FlexCacheError, StoreError
from flexcache.paths import local_path
from flexcache.store.manage.copy import copy
from tests.models import tiny

DOCS = [{"id": str(i), "tokens": [5 + i, 6, 7], "label": "ab"[i % 2]} for i in range(6)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a new folder, which contains the home folder."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def capture(path: Any, **options: Any) -> flexcache.Store:
    return flexcache.capture(tiny("llama"), None, DOCS, path, layers=[0], progress=False, **options)


def test_a_store_is_created_and_opened_by_any_spelling_of_its_path(here: Path) -> None:
    (here / "empty").mkdir()
    (here / "link").symlink_to("empty")
    (here / "dangling").symlink_to("home/later.zarr")
    places = {
        "~/run.zarr": here / "home" / "run.zarr",
        Path("~/path.zarr"): here / "home" / "path.zarr",
        b"bytes.zarr": here / "bytes.zarr",
        f"file://{here}/url.zarr": here / "url.zarr",
        "slash.zarr/": here / "slash.zarr",
        "home/../dots.zarr": here / "dots.zarr",
        "deep/er.zarr": here / "deep" / "er.zarr",
        "link": here / "empty",
        "dangling": here / "home" / "later.zarr",
    }
    for given, made in places.items():
        store = capture(given)
        assert (made / "zarr.json").is_file()
        assert not (here / "~").exists()
        assert flexcache.open(given).read("resid_post").tobytes() == store.read("resid_post").tobytes()
    assert (here / "link").is_symlink()
    assert flexcache.verify("~/run.zarr").sound
    copied = copy("~/run.zarr", "~/copy.zarr")
    assert copied.path == here / "home" / "copy.zarr"
    assert capture(copied).path == copied.path


def test_a_store_reads_after_the_current_folder_has_changed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = capture("run.zarr")
    assert "<flexcache.Store run.zarr>" in repr(store)
    (here / "texts.jsonl").write_text('{"id": "a", "text": "x"}\n')
    corpus = flexcache.open_documents(["texts.jsonl"])
    said = corpus.describe()
    monkeypatch.chdir("/")
    assert store.read("resid_post").shape == (18, 64)
    assert str(here / "run.zarr") in repr(store)
    assert corpus.describe() == said
    assert said["files"][0]["name"] == "texts.jsonl"
    assert next(corpus.batches()).column("text").to_pylist() == ["x"]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        (None, "neither text"),
        (3, "neither text"),
        ("", "empty"),
        ("a\0b", "null character"),
        ("a\nb", "line break"),
        ("n" * 300, "longer than"),
        ("/".join(["d" * 200] * 30), "longer than"),
        ("loop", "circle"),
        (Path("s3://bucket/run.zarr"), "two slashes"),
        ("s3:/bucket/run.zarr", "two slashes"),
        ("~nobody-of-this-name/run.zarr", "home directory"),
        (b"\xff.zarr", "UTF-8"),
        ("n" * 250, "name of the store is too long"),
        ("taken", "exists and is not a store"),
        ("taken/run.zarr", "is not a folder"),
    ],
)
def test_an_unusable_path_raises_one_clear_error(path: Any, says: str, here: Path) -> None:
    (here / "loop").symlink_to("loop")
    (here / "taken").write_text("x")
    before = sorted(os.listdir(here))
    with pytest.raises((ConfigError, StoreError), match=says):
        capture(path)
    with pytest.raises(FlexCacheError):
        flexcache.open(path)
    assert sorted(os.listdir(here)) == before


def test_documents_are_found_by_home_folder_bytes_url_and_glob(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = here / "home" / "with [brackets]"
    folder.mkdir()
    (folder / "one.jsonl").write_text('{"id": "a", "text": "x"}\n')
    monkeypatch.chdir(folder)
    given = ["~/with [brackets]/one.jsonl", b"one.jsonl", f"file://{folder}/one.jsonl", "*.jsonl", "../*/one.jsonl"]
    descriptions = [flexcache.open_documents(path).describe() for path in given]
    assert all(said == descriptions[0] for said in descriptions)
    for path in ("x" * 5000, ["some text", "another"], "a\nb"):
        with pytest.raises(DocumentsError, match="to give texts, give dicts"):
            flexcache.open_documents(path)
    with pytest.raises(DocumentsError, match="give a list"):
        flexcache.open_documents({"id": "a", "text": "x"})


def test_new_files_have_the_permissions_of_the_umask(here: Path) -> None:
    from analysis import probes
    from analysis.survey import survey
    from flexcache.exchange.exporting import export

    before = os.umask(0o002)
    try:
        store = capture("run.zarr")
        flexcache.extend(tiny("llama"), None, [{"id": "n", "tokens": [5, 6], "label": "a"}], "run.zarr", progress=False)
        sweep = probes.sweep("run.zarr", "label", "resid_post", cv=2, progress=False)
        sweep.save("~/probes")
        sweep.plot("~/probes/plot.png")
        sweep.to_direction(0).save("~/probes/direction.safetensors")
        survey(store.path, only=["moments"], folder="~/stats", progress=False)
        for kind in ("safetensors", "npy", "parquet"):
            export("run.zarr", f"~/{kind}", kind)
        copy("run.zarr", "copy.zarr", dtype="int8", compression="zstd")
    finally:
        os.umask(before)
    files = [path for path in here.rglob("*") if path.is_file() and "matplotlib" not in path.parts]
    assert {path.suffix for path in files} >= {".safetensors", ".json", ".png", ".npy", ".parquet"}
    wrong = {str(path): oct(path.stat().st_mode) for path in files if path.stat().st_mode & 0o777 != 0o664}
    assert not wrong


def test_a_path_becomes_absolute_and_keeps_its_links(here: Path) -> None:
    (here / "link").symlink_to("home")
    assert local_path("link/x") == here / "link" / "x"
    assert local_path("link/../x") == here / "x"
