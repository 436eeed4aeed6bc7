"""Extending a store by documents, layers and sites keeps its bytes, row numbers and readers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import flexcache
from flexcache.errors import DamagedError, DocumentsError, MismatchError, StoreError
from flexcache.recording.forward.batch_reader import BatchReader
from flexcache.store.format.schema import STAGED
from flexcache.store.manage.copy import copy
from flexcache.store.manage.extension_transaction import ExtensionTransaction
from flexcache.store.manage.remove import Removal
from flexcache.store.write.worker import ALIVE
from tests.corpora import (
    LAYERS,
    SITES,
    activation,
    build_store,
    lengths,
    open_recorder,
    padded_activation,
    token_documents,
)
from tests.recording.test_recorder import shard_hashes
from tests.reliability.steps import Steps, counted

OLD = token_documents(lengths(150))
NEW = [{**document, "id": f"new-{document['id']}"} for document in token_documents(lengths(120, seed=5), seed=9)]
MORE: dict[str, Any] = {"sites": {**SITES, "mlp_out": (5, 24)}, "layers": [0, 1, 3, 4]}


class Killed(BaseException):
    """Simulated SIGKILL: no handler catches it."""


def killed(name: str) -> None:
    raise Killed(name)


def bury(path: Path) -> None:
    """Let the workers that a `Killed` left behind belong to an ended process; claims are links to these files."""
    for alive in path.rglob(ALIVE):
        alive.write_text(json.dumps(json.loads(alive.read_text()) | {"started": "never"}))


def fill(recorder: flexcache.Recorder) -> list[int]:
    """Write the values of all rows that the recorder requests; return these rows."""
    asked: list[int] = []
    with recorder:
        for batch in recorder.batches():
            asked += batch.rows
            for name, layer in recorder.keys:
                features = recorder.store.arrays[name].features
                values = batch.kept(padded_activation(batch, layer or 0, features))
                recorder.put(name, values, rows=batch.rows, layer=layer)
    return asked


def add_documents(path: Path, documents: list[dict[str, Any]] = NEW, **options: Any) -> list[int]:
    return fill(open_recorder(path, documents, extend=True, **options))


def add_sites(path: Path, **options: Any) -> list[int]:
    return fill(open_recorder(path, OLD, extend=True, **{**MORE, **options}))


def check_values(store: flexcache.Store) -> None:
    """Check that every row of every site has the value of its token and position."""
    at = {name: np.asarray(variable.values) for name, variable in store.coordinates.items()}
    for name, array in store.arrays.items():
        for layer in array.slices:
            expected = activation(at["token_id"], at["position"], layer or 0, array.features)
            assert np.array_equal(store.read(name, layer), expected.astype(store.raw(name).dtype).astype(np.float32))


def check_documents(store: flexcache.Store, documents: list[dict[str, Any]]) -> None:
    """Check that the tables hold the documents, each with all of its tokens in order."""
    by_id = {document["id"]: document for document in documents}
    assert sorted(store.documents.column("id").to_pylist()) == sorted(by_id)
    assert store.plan["documents"] == len(documents)
    for number, row in enumerate(store.documents.to_pylist()):
        rows = store.rows(number)
        assert np.asarray(store.coordinates["token_id"].values)[rows].tolist() == by_id[row["id"]]["tokens"]
        assert row["label"] == by_id[row["id"]].get("label")


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> flexcache.Store:
    store = build_store(tmp_path_factory.mktemp("before") / "run.zarr", OLD)
    assert store.n_rows % store.shard_rows, "the last unit must be part full"
    return store


@pytest.fixture
def path(before: flexcache.Store, tmp_path: Path) -> Path:
    shutil.copytree(before.path, tmp_path / "run.zarr")
    return tmp_path / "run.zarr"


@pytest.mark.parametrize("options", [{}, {"compression": "zstd"}, {"rows": "last"}, {"rows": "mean"}])
def test_new_documents_follow_the_existing_ones(options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    old = build_store(path, OLD, **options)
    copied = shutil.copytree(path, tmp_path / "old.zarr")
    asked = add_documents(path, **options)
    store = flexcache.open(path)
    assert asked == list(range(old.n_rows, store.n_rows)), "each new row once, and no old one"
    assert store.complete
    assert flexcache.verify(path).sound
    for name, array in store.arrays.items():
        for layer in array.slices:
            assert np.array_equal(store.read(name, layer, slice(old.n_rows)), flexcache.open(copied).read(name, layer))
    full = old.n_rows // old.shard_rows
    shards = {name: value for name, value in shard_hashes(copied).items() if name.count("/") > 2}
    kept = {name: value for name, value in shards.items() if int(name.split("/")[-2]) < full}
    assert kept
    assert kept.items() <= shard_hashes(path).items()
    if options.get("rows", "all") == "all":
        check_values(store)
        check_documents(store, OLD + NEW)
    assert store.provenance.history[-1]["rows"] == [old.n_rows, store.n_rows]
    assert store.documents.column("source_index").to_pylist()[old.plan["documents"] :] == sorted(
        range(len(OLD), len(OLD + NEW)), key=store.documents.column("source_index").to_pylist().index
    )
    with xr.open_zarr(path) as dataset:
        assert dataset.sizes["token"] == store.n_rows
        last = dataset["resid_post"][LAYERS[-1], -1].values.astype(np.float32)
    assert np.array_equal(last, store.read("resid_post", LAYERS[-1], [-1])[0])
    assert not (path / STAGED).exists()


def test_added_sites_and_layers_give_the_store_of_one_capture(path: Path, tmp_path: Path) -> None:
    whole = build_store(tmp_path / "whole.zarr", OLD, **MORE)
    asked = add_sites(path)
    store = flexcache.open(path)
    assert asked == list(range(store.n_rows))
    assert shard_hashes(path) == shard_hashes(whole.path)
    assert [*store.ledger] == [*whole.ledger]
    assert store.arrays == whole.arrays
    assert store.spec == whole.spec
    assert flexcache.verify(path).sound
    check_values(store)
    with xr.open_zarr(path) as dataset:
        assert dataset["resid_post"].attrs["layers"] == [0, 1, 3, 4]
    with open_recorder(path, OLD, **MORE) as recorder:  # a capture of all of it resumes this store
        assert recorder.pending() == []


def test_existing_rows_are_not_requested_again(path: Path) -> None:
    assert add_sites(path)
    assert add_sites(path) == []
    assert add_documents(path, **MORE)
    assert add_documents(path, **MORE) == []
    assert add_sites(path, layers=[0, 1, 2, 3, 4]) == list(range(flexcache.open(path).n_rows))
    store = flexcache.open(path)
    check_values(store)
    check_documents(store, OLD + NEW)
    assert store.layers("resid_post") == (0, 1, 2, 3, 4)
    assert flexcache.verify(path).sound


def test_an_extended_corpus_adds_only_its_new_documents(path: Path) -> None:
    mixed = [*NEW[:3], *OLD, *NEW[3:]]
    with pytest.raises(DocumentsError, match=r"some of the documents are in the store already"):
        open_recorder(path, mixed, extend=True)
    assert add_documents(path, mixed, new_only=True)
    check_documents(flexcache.open(path), OLD + NEW)
    third = token_documents([4, 5, 6], seed=3)
    with pytest.raises(DocumentsError, match="'doc-0' is in the store with other contents"):
        open_recorder(path, third, extend=True)
    assert not ExtensionTransaction(path).staged


def test_new_documents_may_have_other_labels(path: Path) -> None:
    add_documents(path, [{"id": "a", "tokens": [5, 6], "score": 3, "mood": "fair"}, {"id": "b", "tokens": [7]}])
    table = flexcache.open(path).documents.to_pylist()
    assert table[0]["mood"] is None
    assert {row["id"]: (row["label"], row["score"], row["mood"]) for row in table[-2:]} == {
        "a": (None, 3.0, "fair"),
        "b": (None, None, None),
    }
    with pytest.raises(DocumentsError, match="another type"):
        open_recorder(path, [{"id": "c", "tokens": [5], "score": "high"}], extend=True)


def test_a_different_request_raises_an_error_while_an_extension_is_unfinished(path: Path) -> None:
    open_recorder(path, NEW, extend=True)
    for documents, options in ((NEW[:50], {}), (OLD, MORE)):
        with pytest.raises(MismatchError, match="another extension"):
            open_recorder(path, documents, extend=True, **options)
    with pytest.raises(StoreError, match="extension"):
        Removal(path, ["resid_post"]).run()
    assert flexcache.verify(path).sound
    check_documents(copy(path, path.with_name("copy.zarr")), OLD)
    assert ExtensionTransaction(path).discard()
    assert flexcache.verify(path).sound
    check_documents(flexcache.open(path), OLD)
    assert add_sites(path)


def test_an_invalid_extension_raises_an_error(path: Path, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="another form"):
        open_recorder(path, OLD, extend=True, sites={**MORE["sites"], "resid_post": (5, 12)})
    with pytest.raises(MismatchError, match=r"spec.dtype: bfloat16 in the store, float32 now"):
        open_recorder(path, NEW, extend=True, dtype="float32")
    with pytest.raises(MismatchError, match=r"documents.count: 150 in the store, 120 now"):
        open_recorder(path, NEW, extend=True, **MORE)
    with pytest.raises(MismatchError, match="other conditions"):
        open_recorder(path, NEW, extend=True, fingerprint={"device": "another"})
    assert not ExtensionTransaction(path).discard()
    part = tmp_path / "part.zarr"
    with open_recorder(part, OLD):
        pass
    with pytest.raises(StoreError, match="not complete"):
        open_recorder(part, NEW, extend=True)
    shard = next(path.glob("resid_post/c/0/*/0"))
    last = path / f"resid_post/c/0/{flexcache.open(path).n_units - 1}/0"
    last.write_bytes(bytes(len(last.read_bytes())))
    assert shard
    with pytest.raises(DamagedError, match="other bytes than were written"):
        add_documents(path)


def readings(store: flexcache.Store) -> tuple[Any, ...]:
    at = {name: np.asarray(variable.values).tolist() for name, variable in store.coordinates.items()}
    tables = store.documents.column("id").to_pylist(), store.tokens.column("row_start").to_pylist()
    values = [store.read(name, layer).tobytes() for name in SITES for layer in store.arrays[name].slices if layer != 1]
    return at, tables, values, store.read("resid_post", 3, [5, 1, -1]).tobytes(), store.complete, store.n_rows


def foreign(path: Path, n_rows: int) -> bytes:
    with xr.open_zarr(path) as dataset:
        assert dataset.sizes["token"] >= n_rows
        return b"".join(dataset["resid_post"][layer, :n_rows].values.tobytes() for layer in LAYERS)


@pytest.mark.parametrize("kind", ["documents", "sites", "zstd"])
@pytest.mark.parametrize("tries", [5, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_kill_at_any_step_leaves_the_old_or_new_store_and_the_same_call_resumes(
    kind: str, tries: int, tmp_path: Path
) -> None:
    options = {"compression": "zstd"} if kind == "zstd" else {}
    add: Callable[[Path], Any] = add_sites if kind == "sites" else lambda path: add_documents(path, **options)
    origin = build_store(tmp_path / "origin.zarr", OLD, **options).path
    whole = shutil.copytree(origin, tmp_path / "whole.zarr")
    add(whole)
    expected = shard_hashes(whole)
    with counted(Steps(tmp_path)) as steps:
        counted_path = shutil.copytree(origin, tmp_path / "counted.zarr")
        copied = len(steps.taken)
        add(counted_path)
    total = len(steps.taken) - copied
    assert total > 60
    old = readings(flexcache.open(origin))
    old_foreign = foreign(origin, flexcache.open(origin).n_rows)
    for at in range(0, total, max(1, total // tries)):
        path = shutil.copytree(origin, tmp_path / "run.zarr")
        early = flexcache.open(path)  # reads nothing yet
        with pytest.raises(Killed), counted(Steps(path, at, killed)):
            add(path)
        bury(path)
        store = flexcache.open(path)
        assert flexcache.verify(path).sound, f"killed before step {at}"
        assert readings(early) == old, f"killed before step {at}"
        assert foreign(path, early.n_rows) == old_foreign
        if store.n_rows == early.n_rows and store.arrays == early.arrays:
            assert readings(store) == old
        else:
            check_values(store)
        add(path)
        assert shard_hashes(path) == expected
        assert flexcache.verify(path).sound
        assert not (path / STAGED).exists()
        check_values(flexcache.open(path))
        shutil.rmtree(path)


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_an_open_reader_keeps_reading_the_old_rows(compression: str, tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    options: dict[str, Any] = {"sites": {"wide": 32768}, "rows": "last", "compression": compression, "dtype": "float32"}
    fill(open_recorder(path, OLD, **options))
    fresh, used = flexcache.open(path), flexcache.open(path)
    used_before = used.read("wide", rows=[0, -1]).tobytes(), used.read("wide").tobytes()
    last = path / f"wide/c/{used.n_units - 1}/0"
    size = last.stat().st_size
    add_documents(path, **options)
    assert last.stat().st_size > size, "an inner chunk was added to the last shard"
    for store in (fresh, used):
        assert (store.read("wide", rows=[0, -1]).tobytes(), store.read("wide").tobytes()) == used_before
        store.refresh()
        assert store.complete
        assert len(store.documents) == len(OLD)
        assert len(store.coordinates["token_id"]) == store.n_rows == len(OLD)
    check_values(flexcache.open(path))


@settings(max_examples=12, deadline=None)
@given(
    parts=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=40), min_size=2, max_size=4),
    rows=st.sampled_from(["all", "last", "first"]),
)
def test_a_store_can_be_extended_by_any_sequence_of_corpora(
    parts: list[list[int]], rows: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("grown") / "run.zarr"
    documents: list[dict[str, Any]] = []
    for number, part in enumerate(parts):
        new = [{**d, "id": f"{number}-{d['id']}"} for d in token_documents(part, seed=number)]
        documents += new
        fill(open_recorder(path, new, extend=True, rows=rows, batch_tokens=64))
        store = flexcache.open(path)
        assert store.complete
        check_values(store)
        assert store.documents.num_rows == len(documents)
        reader = BatchReader(path)
        rows_run = [row for unit in range(store.n_units) for batch in reader.read_unit(unit) for row in batch.rows]
        assert rows_run == list(range(store.n_rows))
    assert flexcache.verify(path).sound
    if rows == "all":
        check_documents(store, documents)


def test_tables_that_are_committed_before_the_metadata_are_readable(tmp_path: Path) -> None:
    """An extension killed between the two leaves more documents than the metadata has rows."""
    path = tmp_path / "run.zarr"
    build_store(path, OLD[:1], rows="last")
    open_recorder(path, NEW[:7], rows="last", extend=True)
    extension = ExtensionTransaction(path)
    assert extension.staged
    (extension.folder / "placing").touch()
    shutil.copy(extension.folder / "documents.parquet", path / "documents.parquet")
    store = flexcache.open(path)
    assert store.n_rows == 1
    assert store.documents.num_rows >= 1
