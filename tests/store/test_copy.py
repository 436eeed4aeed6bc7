from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import flexcache
from flexcache.errors import ConfigError, DamagedError, MismatchError, RangeError, SiteError, StoreError
from flexcache.store.format.shard import shard_name
from flexcache.store.manage.copy import copy
from flexcache.store.manage.row_copy import RowCopy
from flexcache.store.manage.store_contents import ledger_digest
from tests.corpora import build_store, lengths, open_recorder, put_batch, token_documents
from tests.recording.test_recorder import shard_hashes


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> flexcache.Store:
    path = tmp_path_factory.mktemp("source") / "run.zarr"
    return build_store(path, token_documents(lengths(260)), dtype="bfloat16")


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> flexcache.Store:
    path = tmp_path_factory.mktemp("source") / "zstd.zarr"
    return build_store(path, token_documents(lengths(260)), dtype="bfloat16", compression="zstd")


def partial_store(path: Path, units: int) -> flexcache.Store:
    recorder = open_recorder(path, token_documents(lengths(260)), dtype="bfloat16")
    with pytest.raises(KeyboardInterrupt), recorder:
        for batch in recorder.batches():
            if batch.unit == units:
                raise KeyboardInterrupt
            put_batch(recorder, batch)
    return flexcache.open(path)


def records(store: flexcache.Store) -> list[Any]:
    return [store.ledger.read_record(unit) for unit in store.committed_units.tolist()]


# Unchanged


@pytest.mark.parametrize("kind", ["source", "compressed"])
def test_a_copy_has_the_bytes_and_the_records_of_its_source(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    origin = request.getfixturevalue(kind)
    store = copy(origin.path, tmp_path / "copy.zarr")
    assert store.complete
    assert shard_hashes(store.path) == shard_hashes(origin.path)
    assert records(store) == records(origin)
    assert flexcache.verify(store.path).sound
    assert store.documents.equals(origin.documents)
    assert store.tokens.equals(origin.tokens)
    assert not [p for p in store.path.iterdir() if p.name.startswith(".")]
    with xr.open_zarr(store.path) as dataset:
        assert dataset["resid_post"].shape == (5, store.n_rows, 24)
    change = store.provenance.history[-1]
    assert change["copied_from"] == {
        "store": origin.path.name,
        "ledger_xxh3_128": ledger_digest(origin),
        "units_committed": origin.n_units,
    }
    assert change["changed"] == {}


def test_a_copy_of_a_copy_is_equal_and_records_both_steps(source: flexcache.Store, tmp_path: Path) -> None:
    first = copy(source.path, tmp_path / "first.zarr")
    second = copy(first.path, tmp_path / "second.zarr")
    assert shard_hashes(second.path) == shard_hashes(first.path)
    assert records(second) == records(first)
    assert [step["copied_from"]["store"] for step in second.provenance.history] == ["run.zarr", "first.zarr"]


def test_a_copy_of_a_partial_store_follows_it_and_can_resume_the_capture(tmp_path: Path) -> None:
    origin = partial_store(tmp_path / "run.zarr", 2)
    store = copy(origin.path, tmp_path / "copy.zarr")
    assert store.committed_units.tolist() == [0, 1]
    assert flexcache.verify(store.path).sound
    shutil.copytree(store.path, tmp_path / "other.zarr")
    build_store(origin.path, token_documents(lengths(260)), dtype="bfloat16")
    store = copy(origin.path, tmp_path / "copy.zarr")
    assert store.complete
    assert shard_hashes(store.path) == shard_hashes(origin.path)
    captured = build_store(tmp_path / "other.zarr", token_documents(lengths(260)), dtype="bfloat16")
    assert shard_hashes(captured.path) == shard_hashes(origin.path)
    assert flexcache.verify(captured.path).sound


@pytest.mark.parametrize("change", [{}, {"dtype": "float32"}, {"compression": "zstd"}], ids=str)
def test_an_interrupted_copy_resumes_at_any_point(
    change: dict[str, str], source: flexcache.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = copy(source.path, tmp_path / "whole.zarr", **change)
    target, left = tmp_path / "copy.zarr", 0
    bring = RowCopy._copy_unit

    def dies(self: RowCopy, unit: int, worker: Any, writer: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        bring(self, unit, worker, writer)

    monkeypatch.setattr(RowCopy, "_copy_unit", dies)
    seen = []
    for done in range(1, source.n_units + 1):
        left = 1
        if done < source.n_units:
            with pytest.raises(KeyboardInterrupt):
                copy(source.path, target, **change)
        else:
            copy(source.path, target, **change)
        store = flexcache.open(target)
        seen.append(len(store.committed_units))
        assert flexcache.verify(target).sound
        assert not (target / ".partial").exists()
    assert seen == list(range(1, source.n_units + 1))
    assert shard_hashes(target) == shard_hashes(whole.path)
    assert records(store) == records(whole)


def test_kills_lose_nothing(source: flexcache.Store, tmp_path: Path) -> None:
    """SIGKILL comes a little later in each copy; a last copy finishes."""
    target = tmp_path / "copy.zarr"
    code = f"from flexcache.store.manage.copy import copy; copy({str(source.path)!r}, {str(target)!r}, dtype='float32')"
    for wait in (0.0, 0.02, 0.05):
        process = subprocess.Popen([sys.executable, "-c", code])
        before = len(flexcache.open(target).committed_units) if target.exists() else 0
        while process.poll() is None and not (target.exists() and len(list(target.glob("ledger/0/*.json"))) > before):
            time.sleep(0.001)
        time.sleep(wait)
        process.kill()
        process.wait()
        store = flexcache.open(target)
        for unit in store.committed_units.tolist():
            rows = slice(unit * store.shard_rows, (unit + 1) * store.shard_rows)
            assert np.array_equal(store.read("resid_post", 3, rows), source.read("resid_post", 3, rows))
    copy(source.path, target, dtype="float32")
    assert flexcache.verify(target).sound
    assert shard_hashes(target) == shard_hashes(copy(source.path, tmp_path / "whole.zarr", dtype="float32").path)
    assert not [path.name for path in target.iterdir() if path.name.startswith(".")]


def test_a_copy_works_where_the_kernel_cannot_copy_ranges(
    source: flexcache.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*arguments: Any) -> int:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuses)
    assert shard_hashes(copy(source.path, tmp_path / "copy.zarr").path) == shard_hashes(source.path)


# Converted


def test_a_copy_to_float32_and_back_gives_the_same_store(source: flexcache.Store, tmp_path: Path) -> None:
    wide = copy(source.path, tmp_path / "wide.zarr", dtype="float32")
    assert wide.reader("resid_post").dtype == np.float32
    assert wide.spec.dtype == "float32"
    for layer in (0, 3):
        assert np.array_equal(wide.read("resid_post", layer), source.read("resid_post", layer))
    assert wide.ledger.read_record(0).fingerprint["converted_from"] == {
        "resid_post": "bfloat16",
        "model.embed": "bfloat16",
    }
    assert wide.provenance.history[-1]["changed"]["dtype"]["resid_post"] == ["bfloat16", "float32"]
    assert flexcache.verify(wide.path).sound
    narrow = copy(wide.path, tmp_path / "narrow.zarr", dtype="bfloat16")
    assert shard_hashes(narrow.path) == shard_hashes(source.path)


def test_another_codec_changes_bytes_but_no_values(
    source: flexcache.Store, compressed: flexcache.Store, tmp_path: Path
) -> None:
    packed = copy(source.path, tmp_path / "packed.zarr", compression="zstd")
    assert shard_hashes(packed.path) == shard_hashes(compressed.path)
    assert records(packed) == records(compressed)
    unpacked = copy(compressed.path, tmp_path / "unpacked.zarr", compression="none")
    assert shard_hashes(unpacked.path) == shard_hashes(source.path)
    assert flexcache.verify(unpacked.path).sound
    with xr.open_zarr(packed.path) as dataset:
        assert np.array_equal(
            dataset["resid_post"][3].values.view(np.uint16), source.raw("resid_post").sel(layer=3).values.view("u2")
        )


@settings(max_examples=10)
@given(
    st.sampled_from(["bfloat16", "float16", "float32"]),
    st.sampled_from(["none", "zstd"]),
    st.sampled_from(["all", "0", [3], "0:2"]),
    st.sampled_from([None, ["resid_post"], ["model.*"], ["resid_post", "model.embed"]]),
)
def test_a_converted_copy_reads_as_numpy_casts(
    source: flexcache.Store,
    tmp_path_factory: pytest.TempPathFactory,
    dtype: str,
    compression: str,
    layers: Any,
    sites: Any,
) -> None:
    target = tmp_path_factory.mktemp("copy") / "copy.zarr"
    store = copy(source.path, target, dtype=dtype, compression=compression, layers=layers, sites=sites)
    assert flexcache.verify(target).sound
    assert store.sites == tuple(
        name for name in source.sites if sites is None or name in sites or (name == "model.embed" and "m" in sites[0])
    )
    for name, array in store.arrays.items():
        for layer in array.slices:
            read = store.read(name, layer, raw=True)
            expected = source.read(name, layer).astype(read.dtype)
            assert read.dtype.name == dtype
            assert np.array_equal(read.view(np.uint8), expected.view(np.uint8))
    shutil.rmtree(target.parent)


def test_a_copy_of_some_layers_equals_a_capture_of_only_those(source: flexcache.Store, tmp_path: Path) -> None:
    store = copy(source.path, tmp_path / "copy.zarr", sites=["resid_post"], layers=[-2])
    assert store.sites == ("resid_post",)
    assert store.layers("resid_post") == (3,)
    assert store.spec.sites == {"resid_post": [3]}
    assert store["resid_post"].shape == (1, store.n_rows, 24)
    assert store.plan["files"] == store.n_units
    shards = {name for name in shard_hashes(store.path) if name.startswith("resid_post")}
    assert shards == {shard_name("resid_post", 3, unit) for unit in range(store.n_units)}
    with xr.open_zarr(store.path) as dataset:
        assert list(dataset.data_vars) == ["resid_post"]
        assert dataset["resid_post"].attrs["layers"] == [3]
    assert store.provenance.history[-1]["changed"] == {
        "sites_left_out": ["model.embed"],
        "layers": {"resid_post": [3]},
    }


def test_a_float16_overflow_is_located_and_leaves_a_readable_store(tmp_path: Path) -> None:
    recorder = open_recorder(tmp_path / "run.zarr", token_documents(lengths(260)), dtype="float32")
    with recorder:
        for batch in recorder.batches():
            for name, array in recorder.store.arrays.items():
                for layer in array.slices:
                    values = np.ones((len(batch.rows), array.features), np.float32)
                    if layer == 3 and 700 in batch.rows:
                        values[700 - batch.rows.start, 5] = 70000.0
                    recorder.put(name, values, rows=batch.rows, layer=layer)
    with pytest.raises(RangeError) as raised:
        copy(tmp_path / "run.zarr", tmp_path / "half.zarr", dtype="float16")
    text = str(raised.value)
    for part in ("resid_post of layer 3", "row 700", "feature 5", "70000", "65504"):
        assert part in text
    store = flexcache.open(tmp_path / "half.zarr")
    assert 0 < len(store.committed_units) < store.n_units
    assert flexcache.verify(store.path).sound
    assert (store.read("resid_post", 3, store.committed_rows) == 1).all()


# Errors


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "table"])
@pytest.mark.parametrize("change", [{}, {"dtype": "float32"}], ids=str)
def test_a_damaged_source_file_is_named_and_its_unit_is_not_committed(
    source: flexcache.Store, tmp_path: Path, damage: str, change: dict[str, str]
) -> None:
    path = tmp_path / "run.zarr"
    shutil.copytree(source.path, path)
    name = "documents.parquet" if damage == "table" else shard_name("resid_post", 3, 1)
    content = (path / name).read_bytes()
    if damage == "remove":
        (path / name).unlink()
    else:
        (path / name).write_bytes(content[:-1] if damage == "truncate" else b"?" + content[1:])
    with pytest.raises(DamagedError) as raised:
        copy(path, tmp_path / "copy.zarr", **change)
    assert raised.value.where == str(path / name)
    if damage == "table":
        assert not (tmp_path / "copy.zarr").exists()
    else:
        assert 1 not in flexcache.open(tmp_path / "copy.zarr").committed_units


def test_a_copy_to_another_store_raises_an_error(source: flexcache.Store, tmp_path: Path) -> None:
    copy(source.path, tmp_path / "copy.zarr")
    for change in ({"dtype": "float32"}, {"compression": "zstd"}, {"layers": "0"}, {"sites": ["resid_post"]}):
        with pytest.raises(MismatchError, match="another store"):
            copy(source.path, tmp_path / "copy.zarr", **change)  # type: ignore[arg-type]
    build_store(tmp_path / "other.zarr", token_documents(lengths(200, seed=9)), dtype="bfloat16")
    with pytest.raises(MismatchError, match=r"documents\.parquet differs"):
        copy(source.path, tmp_path / "other.zarr")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("x")
    with pytest.raises(StoreError, match="is not a store"):
        copy(source.path, tmp_path / "folder")
    for place in (source.path, source.path / "inside", source.path.parent):
        with pytest.raises(StoreError, match="inside the other"):
            copy(source.path, place)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"sites": ["resid_pots"]}, SiteError, "did you mean resid_post"),
        ({"layers": 1}, SiteError, "layer 1 of resid_post is not in the store"),
        ({"layers": [0, 1]}, SiteError, "layer 1 of resid_post is not in the store"),
        ({"layers": "1:3"}, SiteError, "is not in the store"),
        ({"layers": 9}, SiteError, "no layer 9"),
        ({"dtype": "int4"}, ConfigError, "no dtype 'int4'"),
        ({"compression": "gzip"}, ConfigError, "no compression 'gzip'"),
    ],
    ids=str,
)
def test_invalid_arguments_raise_an_error_before_anything_is_written(
    source: flexcache.Store, tmp_path: Path, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        copy(source.path, tmp_path / "copy.zarr", **options)
    assert not list(tmp_path.iterdir())


def test_a_copy_needs_no_torch(source: flexcache.Store, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from flexcache.store.manage.copy import copy;"
        f"copy({str(source.path)!r}, {str(tmp_path / 'copy.zarr')!r}, dtype='float32')"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
    metadata = json.loads((tmp_path / "copy.zarr" / "zarr.json").read_text())
    assert metadata["consolidated_metadata"]["metadata"]["resid_post"]["data_type"] == "float32"
