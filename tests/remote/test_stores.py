from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import flexcache
from analysis.statistics import moments
from flexcache.errors import (
    CaptureError,
    ConfigError,
    DamagedError,
    MismatchError,
    SiteError,
    StoreError,
    UncommittedError,
)
from flexcache.store.manage.copy import copy
from flexcache.store.read.object_reader import GAP_BYTES
from flexcache.store.storage.location import parse_location
from flexcache.store.storage.multipart_upload import PART_BYTES
from flexcache.store.storage.object_path import ObjectPath
from pipelines.cli import app
from tests.corpora import build_store, lengths, open_recorder, plan_virtual, put_batch, token_documents
from tests.models import tiny
from tests.recording.test_recorder import shard_hashes

CODECS = pytest.mark.parametrize("compression", ["none", "zstd"])
DOCUMENTS = token_documents(lengths(90))


def local(path: Path, **options: Any) -> flexcache.Store:
    return build_store(path, DOCUMENTS, dtype="bfloat16", **options)


def records(store: flexcache.Store) -> list[Any]:
    return list(store.ledger)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> flexcache.Store:
    return local(tmp_path_factory.mktemp("source") / "run.zarr")


# Copies, in both directions


@CODECS
def test_a_copy_there_and_back_has_the_bytes_of_its_source(compression: str, everywhere: str, tmp_path: Path) -> None:
    origin = local(tmp_path / "run.zarr", compression=compression)
    there = copy(origin.path, f"{everywhere}/run.zarr")
    assert there.complete
    assert isinstance(there.path, ObjectPath)
    assert records(there) == records(origin)
    assert flexcache.verify(there.path).sound
    back = copy(there.path, tmp_path / "back.zarr")
    assert shard_hashes(back.path) == shard_hashes(origin.path)
    assert back.documents.equals(origin.documents)
    assert not [name for name in there.path.sizes() if name.startswith(".")]
    assert not (there.path.parent / ".run.zarr.planning").exists()


def test_a_copy_converts_on_its_way(base: str, source: flexcache.Store, tmp_path: Path) -> None:
    there = copy(source.path, f"{base}/run.zarr", dtype="float32", compression="zstd", sites=["resid_post"])
    here = copy(source.path, tmp_path / "run.zarr", dtype="float32", compression="zstd", sites=["resid_post"])
    assert [record.files for record in records(there)] == [record.files for record in records(here)]
    assert flexcache.verify(there.path).sound


def test_a_copy_goes_on_where_it_stopped(base: str, source: flexcache.Store) -> None:
    class EnoughError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done > total // 3:
            raise EnoughError

    with pytest.raises(EnoughError):
        copy(source.path, f"{base}/run.zarr", progress=stop)
    begun = flexcache.open(f"{base}/run.zarr")
    assert 0 < len(begun.committed_units) < begun.n_units
    assert copy(source.path, f"{base}/run.zarr").complete
    assert flexcache.verify(f"{base}/run.zarr").sound


def test_another_store_in_the_place_is_refused(base: str, source: flexcache.Store, tmp_path: Path) -> None:
    copy(source.path, f"{base}/run.zarr")
    other = build_store(tmp_path / "other.zarr", token_documents(lengths(50, seed=9)))
    with pytest.raises(MismatchError, match="another store"):
        copy(other.path, f"{base}/run.zarr")


def test_a_damaged_source_never_appears_in_the_copy(base: str, tmp_path: Path) -> None:
    origin = local(tmp_path / "run.zarr")
    shard = origin.path / "resid_post/c/0/1/0"
    content = bytearray(shard.read_bytes())
    content[5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DamagedError, match="other bytes"):
        copy(origin.path, f"{base}/run.zarr")
    assert 1 not in flexcache.open(f"{base}/run.zarr").committed_units


# Reading


@CODECS
def test_reading_is_as_from_a_folder(compression: str, base: str, tmp_path: Path) -> None:
    here = local(tmp_path / "run.zarr", compression=compression)
    there = copy(here.path, f"{base}/run.zarr")
    rows = np.random.default_rng(0).integers(-here.n_rows, here.n_rows, 400)
    for layer in here.layers("resid_post"):
        for raw in (False, True):
            for asked in (slice(None), slice(100, 900), slice(5, 1500, 7), rows, [], [3, 3, 2]):
                found = there.read("resid_post", layer, asked, raw=raw)
                np.testing.assert_array_equal(found, here.read("resid_post", layer, asked, raw=raw))
    for (rows_there, values), (rows_here, expected) in zip(
        there.scan("model.embed", block_bytes=4000), here.scan("model.embed", block_bytes=4000), strict=True
    ):
        assert rows_there == rows_here
        np.testing.assert_array_equal(values, expected)
    xr.testing.assert_identical(there["resid_post"].load(), here["resid_post"].load())
    with xr.open_dataset(f"{base}/run.zarr", engine="flexcache") as dataset:
        assert dataset.sizes == here.dataset().sizes
    assert there.documents.equals(here.documents)
    assert there.tokens.equals(here.tokens)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_gathered_rows_are_those_of_numpy(data: st.DataObject, wide: tuple[flexcache.Store, np.ndarray]) -> None:
    store, values = wide
    rows = data.draw(st.lists(st.integers(-store.n_rows, store.n_rows - 1), max_size=40))
    np.testing.assert_array_equal(store.read("wide", rows=rows), values[rows])


@pytest.fixture(scope="module")
def wide() -> tuple[flexcache.Store, np.ndarray]:
    """Rows of which a few are as long as the gap over which a request reads on."""
    features = GAP_BYTES // 12
    documents = token_documents([7] * 12)
    with flexcache.record(
        "memory://wide/run.zarr", documents, sites={"wide": features}, model="x", dtype="float32", batch_tokens=64
    ) as recorder:
        for batch in recorder.batches():
            values = np.arange(batch.rows.start, batch.rows.stop)[:, None] + np.arange(features) / features
            recorder.put("wide", values.astype(np.float32), rows=batch.rows)
    store = flexcache.open("memory://wide/run.zarr")
    return store, store.read("wide")


def test_readers_see_committed_units_only(everywhere: str) -> None:
    recorder = open_recorder(f"{everywhere}/run.zarr", DOCUMENTS)
    with pytest.raises(KeyboardInterrupt), recorder:
        for batch in recorder.batches():
            if batch.unit == 2:
                raise KeyboardInterrupt
            put_batch(recorder, batch)
    store = flexcache.open(f"{everywhere}/run.zarr")
    assert store.committed_units.tolist() == [0, 1]
    assert len(store.read("resid_post", 0, store.committed_rows))
    with pytest.raises(UncommittedError):
        store.read("resid_post", 0)
    assert not [name for name in store.path.sizes() if name.startswith(".")]


FOREIGN = """
import sys
import numpy as np
import zarr
from obstore.store import S3Store
objects = S3Store.from_url(sys.argv[1], client_options={"allow_http": True})
group = zarr.open_group(zarr.storage.ObjectStore(objects), mode="r")
np.save(sys.argv[2], group["resid_post"][3])
assert "flexcache" not in sys.modules
"""


def test_zarr_python_alone_opens_it(s3: Any, tmp_path: Path) -> None:
    here = build_store(tmp_path / "run.zarr", DOCUMENTS, dtype="float32")
    copy(here.path, "s3://bucket/foreign/run.zarr")
    subprocess.run(
        [sys.executable, "-c", FOREIGN, "s3://bucket/foreign/run.zarr", str(tmp_path / "read.npy")], check=True
    )
    np.testing.assert_array_equal(np.load(tmp_path / "read.npy"), here.read("resid_post", 3), strict=True)


def test_statistics_are_those_of_a_folder(base: str, source: flexcache.Store) -> None:
    there = copy(source.path, f"{base}/run.zarr")
    expected = moments.compute(source, "resid_post", by=["layer"], progress=False)
    xr.testing.assert_allclose(moments.compute(there, "resid_post", by=["layer"], progress=False), expected)


# Recording


@CODECS
def test_a_recording_there_is_one_in_a_folder(compression: str, everywhere: str, tmp_path: Path) -> None:
    here = local(tmp_path / "run.zarr", compression=compression)
    there = build_store(f"{everywhere}/run.zarr", DOCUMENTS, dtype="bfloat16", compression=compression)
    assert there.complete
    assert records(there) == records(here)
    back = copy(there.path, tmp_path / "back.zarr")
    assert shard_hashes(back.path) == shard_hashes(here.path)
    assert there.tokens.equals(here.tokens)
    log = [json.loads(path.read_bytes()) for path in (parse_location(f"{everywhere}/run.zarr") / "runs").glob("*.json")]
    assert [entry["outcome"] for entry in log] == ["finished"]


@CODECS
def test_shards_of_several_parts_are_whole(compression: str, everywhere: str, tmp_path: Path) -> None:
    documents, features = token_documents([16] * 40), 3000
    stores = []
    for target in (str(tmp_path / "run.zarr"), f"{everywhere}/run.zarr"):
        with flexcache.record(
            target, documents, sites={"wide": features}, model="x", dtype="float32", compression=compression,
            batch_tokens=128,
        ) as recorder:  # fmt: skip
            rng = np.random.default_rng(0)
            for batch in recorder.batches():
                recorder.put("wide", rng.normal(size=(len(batch.rows), features)).astype("f4"), rows=batch.rows)
        stores.append(flexcache.open(target))
    here, there = stores
    assert max(file.size for record in records(here) for file in record.files.values()) > PART_BYTES
    assert records(there) == records(here)
    assert flexcache.verify(there.path).sound
    np.testing.assert_array_equal(there.read("wide"), here.read("wide"))


def test_a_buffer_without_room_for_a_part_of_every_shard_is_refused(base: str) -> None:
    with pytest.raises(CaptureError, match="buffer is too small"):
        flexcache.record(
            f"{base}/run.zarr", token_documents([16] * 40), sites={"wide": 3000}, model="x", dtype="float32",
            batch_tokens=128, buffer_bytes=14 << 20,
        )  # fmt: skip


def test_other_documents_are_refused(base: str) -> None:
    build_store(f"{base}/run.zarr", DOCUMENTS)
    with pytest.raises(MismatchError):
        open_recorder(f"{base}/run.zarr", token_documents(lengths(20, seed=4)))


def test_a_place_with_other_objects_is_refused(base: str) -> None:
    (parse_location(base) / "run.zarr" / "notes.txt").write_bytes(b"mine")
    with pytest.raises(StoreError, match="is not a store"):
        open_recorder(f"{base}/run.zarr", DOCUMENTS)
    assert (parse_location(base) / "run.zarr" / "notes.txt").read_bytes() == b"mine"


# When something is wrong


def test_damage_is_named_and_taken_back(everywhere: str, source: flexcache.Store) -> None:
    store = copy(source.path, f"{everywhere}/run.zarr")
    flipped, gone = store.path / "resid_post/c/0/1/0", store.path / "model.embed/c/2/0"
    content = bytearray(flipped.read_bytes())
    content[100] ^= 4
    flipped.write_bytes(bytes(content))
    gone.unlink()
    (store.path / "stray").write_bytes(b"?")
    found = {finding.file: finding.problem for finding in flexcache.verify(store.path).findings}
    assert set(found) == {"resid_post/c/0/1/0", "model.embed/c/2/0", "stray"}
    assert found["model.embed/c/2/0"] == "is missing"
    with pytest.raises(DamagedError, match="missing"):
        flexcache.open(store.path).read("model.embed", rows=[2 * store.shard_rows])
    assert flexcache.repair(store.path).units == (1, 2)
    assert copy(source.path, f"{everywhere}/run.zarr").complete
    (store.path / "stray").unlink()
    assert flexcache.verify(store.path).sound


def test_no_store_there_is_one_clear_error(base: str) -> None:
    with pytest.raises(StoreError, match="is not a store"):
        flexcache.open(f"{base}/nothing.zarr")


def test_a_kind_of_url_that_is_unknown_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("nonsense://bucket/run.zarr", "https://example.org/run.zarr"):
        with pytest.raises(ConfigError, match="cannot be opened") as caught:
            flexcache.open(url)
        assert "s3://" in str(caught.value.expected)
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ConfigError, match="cannot be opened") as caught:
        flexcache.open("gs://bucket/run.zarr")
    assert "flexcache-activations[remote]" in str(caught.value.remedy)


def test_what_needs_a_folder_says_so(base: str, source: flexcache.Store) -> None:
    store = copy(source.path, f"{base}/run.zarr")
    for command in (["rm", str(store.path), "--sites", "model.embed", "--yes"],):
        result = CliRunner().invoke(app, command)
        assert isinstance(result.exception, StoreError)
        assert "not on object storage" in str(result.exception)


# The command line


def test_commands_take_urls(base: str, source: flexcache.Store, tmp_path: Path) -> None:
    runner = CliRunner()
    assert runner.invoke(app, ["copy", str(source.path), f"{base}/run.zarr", "--quiet"]).exit_code == 0
    told = runner.invoke(app, ["info", f"{base}/run.zarr"], env={"COLUMNS": "200"})
    assert told.exit_code == 0, told.output
    assert f"{base}/run.zarr" in told.output
    verified = runner.invoke(app, ["verify", f"{base}/run.zarr", "--quiet"])
    assert "every checksum agrees" in verified.output
    assert runner.invoke(app, ["copy", f"{base}/run.zarr", str(tmp_path / "back.zarr"), "-q"]).exit_code == 0
    assert shard_hashes(tmp_path / "back.zarr") == shard_hashes(Path(str(source.path)))


def test_a_capture_there_is_one_in_a_folder(everywhere: str, tmp_path: Path) -> None:
    model, documents = tiny("llama"), token_documents(lengths(60), vocabulary=90)
    options: dict[str, Any] = {"sites": ["resid_post", "mlp_post"], "progress": False}
    here = flexcache.capture(model, None, documents, tmp_path / "run.zarr", **options)
    there = flexcache.capture(model, None, documents, f"{everywhere}/run.zarr", **options)
    assert there.complete
    assert records(there) == records(here)
    again = flexcache.capture(model, None, documents, f"{everywhere}/run.zarr", **options)
    assert records(again) == records(here)


def test_virtual_layers_have_the_digests_of_a_local_capture(base: str, tmp_path: Path) -> None:
    for path in (tmp_path / "run.zarr", parse_location(f"{base}/run.zarr")):
        plan_virtual(path, DOCUMENTS, {"resid_post": (6, 8), "z": (6, 4)}, {"resid_post": "every 3"}, batch_tokens=64)
        with flexcache.Recorder(path) as recorder:
            for batch in recorder.batches():
                put_batch(recorder, batch)
    here, there = flexcache.open(tmp_path / "run.zarr"), flexcache.open(f"{base}/run.zarr")
    assert records(there) == records(here)
    assert flexcache.verify(there.path).virtual == 10 * here.n_units
    with pytest.raises(SiteError, match="virtual"):
        there.read("z", 0)
    back = copy(there.path, tmp_path / "back.zarr")
    assert records(back) == records(here)
