from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flexcache
from flexcache.errors import CaptureError, ConfigError, DocumentsError, MismatchError, PlanError, RangeError, StoreError
from flexcache.recording.forward.batch_reader import BatchReader
from flexcache.store.write.slabs import SlabPool
from tests.corpora import (
    SITES,
    build_store,
    expected_rows,
    lengths,
    open_recorder,
    padded_activation,
    put_batch,
    token_documents,
)

ROOT = Path(__file__).parents[2]
DOCUMENTS = token_documents(lengths(200))


def shard_hashes(path: Path) -> dict[str, str]:
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.glob("*/c/**/0"))
        if file.is_file()
    }


# Filling


def test_batches_cover_every_row_once_in_order(tmp_path: Path) -> None:
    at = 0
    with open_recorder(tmp_path / "run.zarr", DOCUMENTS) as recorder:
        for batch in recorder.batches():
            assert batch.rows.start == at
            at = batch.rows.stop
            ids, mask = batch.input_ids(pad=9), batch.attention_mask()
            assert ids.shape == mask.shape == batch.shape
            assert (ids[mask == 0] == 9).all()
            assert mask.sum() == batch.n_tokens
            wider = batch.inputs(9, batch.shape[1] + 2)
            assert np.array_equal(wider["input_ids"], np.pad(ids, ((0, 0), (0, 2)), constant_values=9))
            assert np.array_equal(wider["attention_mask"], np.pad(mask, ((0, 0), (0, 2))))
            assert sum(stop - start for start, stop in batch.keep) == len(batch.rows)
            put_batch(recorder, batch)
    assert at == recorder.store.n_rows
    assert recorder.store.complete


def test_padded_activations_and_kept_rows_are_stored_as_the_same_bytes(tmp_path: Path) -> None:
    build_store(tmp_path / "put.zarr", DOCUMENTS, dtype="float32")
    with open_recorder(tmp_path / "record.zarr", DOCUMENTS, dtype="float32") as recorder:
        for batch in recorder.batches():
            for name, array in recorder.store.arrays.items():
                for layer in array.slices:
                    recorder.record(name, layer, padded_activation(batch, layer or 0, array.features))
    assert shard_hashes(tmp_path / "put.zarr") == shard_hashes(tmp_path / "record.zarr")


def test_values_may_be_torch_tensors_of_any_layout(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    for name in ("bfloat16", "float16"):
        store = build_store(tmp_path / f"numpy-{name}.zarr", DOCUMENTS, dtype=name)
        with open_recorder(tmp_path / f"torch-{name}.zarr", DOCUMENTS, dtype=name) as recorder:
            for batch in recorder.batches():
                for site, array in recorder.store.arrays.items():
                    for layer in array.slices:
                        values = torch.from_numpy(padded_activation(batch, layer or 0, array.features))
                        if layer == 3:  # not contiguous, and cast by the caller
                            values = values.to(getattr(torch, name)).transpose(0, 1).contiguous().transpose(0, 1)
                        recorder.record(site, layer, values.requires_grad_(layer == 0))
        assert shard_hashes(store.path) == shard_hashes(tmp_path / f"torch-{name}.zarr")


def test_several_puts_may_share_a_batch(tmp_path: Path) -> None:
    with open_recorder(tmp_path / "run.zarr", DOCUMENTS, sites={"resid_post": (1, 24)}, layers="all") as recorder:
        for batch in recorder.batches():
            values = batch.kept(padded_activation(batch, 0, 24))
            half = len(batch.rows) // 2
            if half:
                recorder.put("resid_post", values[:half], rows=batch.rows[:half], layer=0)
            recorder.put("resid_post", values[half:], rows=np.array(batch.rows)[half:], layer=0)
    whole = build_store(tmp_path / "whole.zarr", DOCUMENTS, sites={"resid_post": (1, 24)}, layers="all")
    assert shard_hashes(tmp_path / "run.zarr") == shard_hashes(whole.path)


@settings(max_examples=8)
@given(budget=st.integers(400_000, 4_000_000))
def test_the_bytes_do_not_depend_on_the_buffer(budget: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("buffers")
    documents = DOCUMENTS[:30]
    a = build_store(folder / "a.zarr", documents)
    b = build_store(folder / "b.zarr", documents, buffer_bytes=budget)
    assert shard_hashes(a.path) == shard_hashes(b.path)


def test_rows_wider_than_a_slab_are_split_across_slabs(tmp_path: Path) -> None:
    sites = {"resid_post": (2, 70_001)}
    options = {"sites": sites, "layers": "all", "dtype": "float32", "buffer_bytes": 2_000_000}
    store = build_store(tmp_path / "run.zarr", token_documents([3, 5, 2]), **options)
    assert np.array_equal(store.read("resid_post", 1), expected_rows(store, 1, 70_001))


def test_memory_is_bounded_by_the_buffer(tmp_path: Path) -> None:
    recorder = open_recorder(tmp_path / "run.zarr", DOCUMENTS, buffer_bytes=1 << 20)
    assert recorder._pool.size * recorder._pool.count <= 1 << 20
    with pytest.raises(CaptureError, match="buffer is too small"):
        open_recorder(tmp_path / "run.zarr", DOCUMENTS, buffer_bytes=1000)


def test_a_pool_waits_for_a_slab_and_stops_waiting_when_it_is_told() -> None:
    pool = SlabPool(4096, 1)
    pool.take_slab()

    def check() -> None:
        raise RuntimeError("the writer failed")

    with pytest.raises(RuntimeError, match="the writer failed"):
        pool.take_slab(check)


# Order and shape


def test_rows_in_the_wrong_order_or_shape_are_refused(tmp_path: Path) -> None:
    recorder = open_recorder(tmp_path / "run.zarr", DOCUMENTS)
    with pytest.raises(CaptureError, match="no batch"):
        recorder.put("resid_post", np.zeros((1, 24)), rows=range(1), layer=0)
    with pytest.raises(CaptureError, match="wrong order"), recorder:
        for batch in recorder.batches():
            rows = range(batch.rows.start + 1, batch.rows.stop)
            recorder.put("resid_post", np.zeros((len(rows), 24)), rows=rows, layer=0)
    recorder = open_recorder(tmp_path / "run.zarr", DOCUMENTS)
    with pytest.raises(CaptureError, match="wrong shape"), recorder:
        for batch in recorder.batches():
            recorder.put("resid_post", np.zeros((len(batch.rows), 23)), rows=batch.rows, layer=0)
    recorder = open_recorder(tmp_path / "run.zarr", DOCUMENTS)
    with pytest.raises(CaptureError, match="are missing"), recorder:
        for batch in recorder.batches():
            values = batch.kept(padded_activation(batch, 0, 24))
            recorder.put("resid_post", values, rows=batch.rows, layer=0)
    assert recorder.store.committed_units.tolist() == []


def test_a_site_or_layer_outside_of_the_plan_is_named(tmp_path: Path) -> None:
    recorder = open_recorder(tmp_path / "run.zarr", DOCUMENTS)
    with pytest.raises(flexcache.FlexCacheError, match="no layer 1 of resid_post"), recorder:
        for batch in recorder.batches():
            recorder.put("resid_post", np.zeros((len(batch.rows), 24)), rows=batch.rows, layer=1)


# Values


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_value_that_is_not_finite_is_named_and_its_unit_not_committed(
    tmp_path: Path, value: float, dtype: str
) -> None:
    recorder = open_recorder(tmp_path / "run.zarr", DOCUMENTS, dtype=dtype)
    spoiled = recorder.store.shard_rows + 70
    with pytest.raises(RangeError) as caught, recorder:
        for batch in recorder.batches():
            for name, array in recorder.store.arrays.items():
                for layer in array.slices:
                    values = batch.kept(padded_activation(batch, layer or 0, array.features))
                    if layer == 3 and spoiled in batch.rows:
                        values[spoiled - batch.rows.start, 17] = value
                    recorder.put(name, values, rows=batch.rows, layer=layer)
    store = flexcache.open(tmp_path / "run.zarr")
    document = store.documents.column("id")[int(store.coordinates["document"].values[spoiled])].as_py()
    text = str(caught.value)
    for part in ("resid_post of layer 3", repr(document), f"row {spoiled}", "feature 17", f"{value:g}"):
        assert part in text
    assert store.committed_units.tolist() == [0]
    assert not list(store.path.glob(".partial"))


def test_overflow_of_float16_is_named_with_the_value_that_overflows(tmp_path: Path) -> None:
    recorder = open_recorder(tmp_path / "run.zarr", DOCUMENTS, dtype="float16")
    with pytest.raises(RangeError, match="overflows float16") as caught, recorder:
        for batch in recorder.batches():
            for name, array in recorder.store.arrays.items():
                for layer in array.slices:
                    values = batch.kept(padded_activation(batch, layer or 0, array.features))
                    values[2, 5] = 70_000.0
                    recorder.put(name, values, rows=batch.rows, layer=layer)
    for part in ("70000", "65504", "row 2", "feature 5", "bfloat16 or float32"):
        assert part in str(caught.value)


# Resuming


def test_a_recorder_resumes_after_the_committed_units(tmp_path: Path) -> None:
    whole = build_store(tmp_path / "whole.zarr", DOCUMENTS)
    recorder = open_recorder(tmp_path / "run.zarr", DOCUMENTS)
    with pytest.raises(RuntimeError), recorder:
        for batch in recorder.batches():
            if batch.unit == 2:
                raise RuntimeError("stop")
            put_batch(recorder, batch)
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "run.zarr").glob("*/c/**/0") if path.is_file()}
    units = set()
    with open_recorder(tmp_path / "run.zarr", DOCUMENTS) as recorder:
        for batch in recorder.batches():
            units.add(batch.unit)
            put_batch(recorder, batch)
    assert 0 not in units
    assert all(path.stat().st_mtime_ns == before for path, before in done.items())
    assert shard_hashes(whole.path) == shard_hashes(tmp_path / "run.zarr")
    assert flexcache.verify(tmp_path / "run.zarr").sound


def test_another_configuration_on_the_same_path_is_refused_with_the_difference(tmp_path: Path) -> None:
    build_store(tmp_path / "run.zarr", DOCUMENTS)
    with pytest.raises(MismatchError, match="spec.seed: 0 in the store, 7 now"):
        open_recorder(tmp_path / "run.zarr", DOCUMENTS, seed=7)
    with pytest.raises(MismatchError, match=r"class: arithmetic before, another now"):
        open_recorder(tmp_path / "run.zarr", DOCUMENTS, model="another")
    with pytest.raises(MismatchError, match="documents.count: 200 in the store, 199 now"):
        open_recorder(tmp_path / "run.zarr", DOCUMENTS[:-1])
    with pytest.raises(MismatchError, match="arrays.resid_post.features"):
        open_recorder(tmp_path / "run.zarr", DOCUMENTS, sites={**SITES, "resid_post": (5, 25)})


def test_other_conditions_are_refused_unless_mixing_is_allowed(tmp_path: Path) -> None:
    recorder = open_recorder(tmp_path / "run.zarr", DOCUMENTS, fingerprint={"threads": 2})
    with pytest.raises(RuntimeError), recorder:
        for batch in recorder.batches():
            if batch.unit == 1:
                recorder._session.writer.drain()
                raise RuntimeError("stop")
            put_batch(recorder, batch)
    with pytest.raises(MismatchError, match="threads: 2 before, 4 now"):
        open_recorder(tmp_path / "run.zarr", DOCUMENTS, fingerprint={"threads": 4})
    options = {"fingerprint": {"threads": 4}, "allow_mixed": True}
    with open_recorder(tmp_path / "run.zarr", DOCUMENTS, **options) as recorder:
        for batch in recorder.batches():
            put_batch(recorder, batch)
    store = flexcache.open(tmp_path / "run.zarr")
    assert [record.fingerprint["threads"] for record in store.ledger] == [2] + [4] * (store.n_units - 1)


def test_a_ledger_record_depends_on_nothing_but_the_unit(tmp_path: Path) -> None:
    for name in ("a", "b"):
        build_store(tmp_path / f"{name}.zarr", DOCUMENTS)
    for record in sorted((tmp_path / "a.zarr" / "ledger" / "0").iterdir()):
        assert record.read_bytes() == (tmp_path / "b.zarr" / "ledger" / "0" / record.name).read_bytes()


def test_files_in_progress_of_a_dead_process_are_removed_and_of_a_living_one_kept(tmp_path: Path) -> None:
    build_store(tmp_path / "run.zarr", DOCUMENTS)
    path = tmp_path / "run.zarr"
    (path / "ledger" / "0" / "1.json").unlink()
    code = "import sys, os; from tests.corpora import *"
    code += "; r = open_recorder(Path(sys.argv[1]), token_documents(lengths(200)))"
    code += "; r.__enter__(); r.begin_unit(r.claim_unit())"
    code += "; print(r._session.worker.id, flush=True); os.kill(os.getpid(), 9)"
    dead = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True)
    folder = path / ".partial" / dead.stdout.strip()
    assert folder.is_dir(), dead.stderr
    with open_recorder(path, DOCUMENTS) as living:
        for batch in living.batches():
            assert not folder.exists()
            with open_recorder(path, DOCUMENTS) as other:
                assert other.claim_unit() is None
                assert living._session.writer.folder.exists()
            put_batch(living, batch)
    assert not (path / ".partial").exists()
    assert not (path / ".claims").exists()


# The disk


def test_a_store_larger_than_the_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("flexcache.store.write.create.shutil.disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(PlanError, match="does not fit on the disk"):
        open_recorder(tmp_path / "run.zarr", DOCUMENTS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", ["pwrite", "fsync", "open"])
def test_a_failing_disk_is_one_clear_error_and_the_rest_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    whole = build_store(tmp_path / "whole.zarr", DOCUMENTS)
    recorder = open_recorder(tmp_path / "run.zarr", DOCUMENTS)
    real = getattr(os, call)
    failing = False

    def fail(*arguments: object, **options: object) -> object:
        if failing:
            raise OSError(code, os.strerror(code))
        return real(*arguments, **options)

    monkeypatch.setattr(f"flexcache.store.write.shard_writer.os.{call}", fail)
    with pytest.raises(CaptureError, match="disk") as caught, recorder:
        for batch in recorder.batches():
            if batch.unit == 2:
                recorder._session.writer.drain()
                failing = True
            put_batch(recorder, batch)
    failing = False
    assert "committed units are kept" in str(caught.value)
    assert ("full" in str(caught.value)) == (code == errno.ENOSPC)
    assert flexcache.open(tmp_path / "run.zarr").committed_units.tolist() == [0, 1]
    with open_recorder(tmp_path / "run.zarr", DOCUMENTS) as recorder:
        for batch in recorder.batches():
            put_batch(recorder, batch)
    assert shard_hashes(whole.path) == shard_hashes(tmp_path / "run.zarr")


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build_store(tmp_path / "whole.zarr", DOCUMENTS)
    real = os.pwrite
    monkeypatch.setattr("flexcache.store.write.shard_writer.direct_works", lambda folder: False)
    monkeypatch.setattr("flexcache.store.write.shard_writer.os.pwrite", lambda fd, data, at: real(fd, data[:777], at))
    short = build_store(tmp_path / "run.zarr", DOCUMENTS)
    assert shard_hashes(whole.path) == shard_hashes(short.path)


def test_a_disk_without_direct_writes_gets_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    direct = build_store(tmp_path / "direct.zarr", DOCUMENTS)
    monkeypatch.setattr("flexcache.store.write.shard_writer.direct_works", lambda folder: False)
    buffered = build_store(tmp_path / "buffered.zarr", DOCUMENTS)
    assert shard_hashes(direct.path) == shard_hashes(buffered.path)
    runs = [json.loads(next((p / "runs").iterdir()).read_text()) for p in (direct.path, buffered.path)]
    assert runs[1]["direct_io"] is False
    assert runs[0]["outcome"] == "finished"


# Plans and documents


def test_the_largest_batch_is_the_largest(tmp_path: Path) -> None:
    store = build_store(tmp_path / "run.zarr", DOCUMENTS)
    reader = BatchReader(store.path)
    sizes = [int(np.prod(batch.shape)) for unit in range(store.n_units) for batch in reader.read_unit(unit)]
    assert int(np.prod(reader.read_largest().shape)) == max(sizes)


def test_texts_are_tokenized_by_any_callable_and_kept_or_hashed(tmp_path: Path) -> None:
    documents = [{"id": str(i), "text": "word " * (i + 1), "label": i % 2} for i in range(9)]
    tokenizer = lambda texts: [[len(word) for word in text.split()] for text in texts]  # noqa: E731
    options = {"tokenizer": tokenizer, "max_length": 5}
    store = build_store(tmp_path / "kept.zarr", documents, **options)
    assert store.documents.column("text").to_pylist() != []
    assert store.plan["truncated_documents"] == 4
    assert max(store.documents.column("n_tokens").to_pylist()) == 5
    hashed = build_store(tmp_path / "hashed.zarr", documents, keep_text=False, **options)
    assert "text" not in hashed.documents.column_names
    assert len(hashed.documents.column("text_xxh3_128")[0].as_py()) == 32


def test_empty_documents_are_an_error_or_skipped_and_counted(tmp_path: Path) -> None:
    documents = [{"id": "a", "tokens": [1, 2]}, {"id": "b", "tokens": []}, {"id": "c", "tokens": [3]}]
    with pytest.raises(DocumentsError, match="document 'b' has no tokens"):
        open_recorder(tmp_path / "run.zarr", documents)
    store = build_store(tmp_path / "run.zarr", documents, empty_documents="skip")
    assert store.plan["skipped_documents"] == 1
    assert dict(zip(*(store.documents.column(n).to_pylist() for n in ("id", "source_index")), strict=True)) == {
        "a": 0,
        "c": 2,
    }
    with pytest.raises(DocumentsError, match="no documents"):
        open_recorder(tmp_path / "none.zarr", [{"id": "b", "tokens": []}], empty_documents="skip")


def test_texts_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DocumentsError, match="no tokenizer"):
        open_recorder(tmp_path / "run.zarr", [{"id": "a", "text": "b"}])


def test_a_folder_that_is_not_a_store_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run.zarr").mkdir()
    (tmp_path / "run.zarr" / "mine").write_text("mine")
    with pytest.raises(StoreError, match="exists and is not a store"):
        open_recorder(tmp_path / "run.zarr", DOCUMENTS)
    assert (tmp_path / "run.zarr" / "mine").read_text() == "mine"


def test_invalid_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch_tokens"):
        open_recorder(tmp_path / "run.zarr", DOCUMENTS, batch_tokens=0)
    with pytest.raises(ConfigError, match="dtype"):
        open_recorder(tmp_path / "run.zarr", DOCUMENTS, dtype="float8")
    with pytest.raises(ConfigError, match="exists once per layer"):
        open_recorder(tmp_path / "run.zarr", DOCUMENTS, sites={"resid_post": 24})


def test_more_shards_than_the_soft_limit_of_open_files_are_written(tmp_path: Path) -> None:
    code = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
from pathlib import Path
from tests.corpora import build_store, token_documents
options = {"sites": {"resid_post": (90, 8)}, "layers": "all"}
assert build_store(Path(sys.argv[1]), token_documents([5, 9, 3]), **options).complete
"""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run.zarr")], check=True, cwd=root)
