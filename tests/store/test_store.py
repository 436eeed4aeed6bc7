from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import xarray as xr
import zarr

import flexcache
from flexcache.errors import DamagedError, SiteError, StoreError, UncommittedError, VersionError
from tests.corpora import build_store, expected_rows, lengths, open_recorder, put_batch, token_documents

DTYPES = ("float32", "bfloat16", "float16")


@pytest.fixture(scope="module", params=[(d, c) for d in DTYPES for c in ("none", "zstd")], ids="-".join)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> flexcache.Store:
    dtype, compression = request.param
    path = tmp_path_factory.mktemp("stores") / "run.zarr"
    return build_store(path, token_documents(lengths(260)), dtype=dtype, compression=compression)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> flexcache.Store:
    return build_store(tmp_path_factory.mktemp("plain") / "run.zarr", token_documents(lengths(260)), dtype="float32")


def stored(store: flexcache.Store, layer: int, features: int = 24) -> np.ndarray:
    return expected_rows(store, layer, features).astype(store.reader("resid_post").dtype)


# The same store, five readers


def test_the_row_reader_returns_the_written_rows(store: flexcache.Store) -> None:
    rows = np.random.default_rng(0).integers(0, store.n_rows, 500)
    for layer in (0, 3):
        expected = stored(store, layer)
        assert np.array_equal(store.read("resid_post", layer), expected.astype(np.float32))
        raw = store.read("resid_post", layer, rows, raw=True)
        assert raw.dtype == expected.dtype
        assert np.array_equal(raw.view(np.uint8), expected[rows].view(np.uint8))
    assert store.n_units > 3


def test_zarr_python_reads_the_same(store: flexcache.Store) -> None:
    array = zarr.open_group(store.path, mode="r")["resid_post"]
    assert isinstance(array, zarr.Array)
    assert array.shape == (5, store.n_rows, 24)
    assert np.array_equal(np.asarray(array[3]).view(np.uint8), stored(store, 3).view(np.uint8))
    assert np.isnan(np.asarray(array[1]).astype(np.float32)).all()


def test_tensorstore_reads_the_same(store: flexcache.Store) -> None:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(store.path / "resid_post")}}
    array = tensorstore.open(spec).result()
    assert np.array_equal(np.asarray(array[3].read().result()).view(np.uint8), stored(store, 3).view(np.uint8))


def test_xarray_opens_a_store_with_coordinates_and_without_warnings(store: flexcache.Store) -> None:
    with xr.open_zarr(store.path) as dataset:
        assert set(dataset.coords) == {"token_id", "position", "document"}
        assert dataset["resid_post"].dims == ("layer", "token", "hidden")
        values = dataset["resid_post"].isel(layer=3).values
        assert np.array_equal(values.view(np.uint8), stored(store, 3).view(np.uint8))
        assert np.array_equal(dataset["token_id"].values, store.coordinates["token_id"].values)


def test_xarray_opens_a_store_if_flexcache_is_not_imported(plain: flexcache.Store) -> None:
    code = f"import xarray as xr; print(float(xr.open_zarr({str(plain.path)!r})['resid_post'][3, 0, 0]))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) == float(stored(plain, 3)[0, 0])


def test_the_flexcache_engine_opens_the_dataset_of_the_store(plain: flexcache.Store) -> None:
    with xr.open_dataset(plain.path, engine="flexcache") as dataset:
        assert dataset["resid_post"].sel(layer=3).values.tobytes() == stored(plain, 3).tobytes()
        assert list(dataset.layer.values) == [0, 3]


# Lazy arrays


def test_a_site_is_a_lazy_float32_array_of_captured_layers(store: flexcache.Store) -> None:
    array = store["resid_post"]
    assert array.dtype == np.float32
    assert array.dims == ("layer", "token", "hidden")
    assert array.shape == (2, store.n_rows, 24)
    assert array.chunks is not None
    assert array.chunks[1][0] == store.shard_rows
    assert {"token_id", "position", "document", "layer"} <= set(array.coords)
    assert store.raw("resid_post").dtype == store.reader("resid_post").dtype


@pytest.mark.parametrize(
    "key",
    [
        (0, slice(None), slice(None)),
        (slice(None), slice(10, 200, 7), slice(None)),
        ([1, 0], [5, 3, 400, 3], slice(None, None, 2)),
        (1, -1, [2, 1]),
        (slice(None, None, -1), slice(50, 10, -3), -1),
        ([], slice(0, 4), slice(None)),
    ],
)
def test_lazy_indexing_equals_numpy_indexing(plain: flexcache.Store, key: tuple) -> None:
    whole = np.stack([stored(plain, 0), stored(plain, 3)])
    expected = xr.DataArray(whole, dims=("layer", "token", "hidden"))[key].values
    assert np.array_equal(plain["resid_post"][key].values, expected)
    engine = xr.open_dataset(plain.path, engine="flexcache")["resid_post"]
    assert np.array_equal(engine[key].values, expected)


def test_reductions_are_those_of_float32(store: flexcache.Store) -> None:
    mean = store["resid_post"].mean("token").compute()
    assert np.allclose(mean.sel(layer=3), stored(store, 3).astype(np.float64).mean(0), rtol=1e-4)


def test_a_dataset_joins_sites_on_the_row_axis(plain: flexcache.Store) -> None:
    dataset = plain.dataset()
    assert set(dataset.data_vars) == {"resid_post", "model.embed"}
    assert dataset["model.embed"].dims == ("token", "feature_model.embed")
    assert np.array_equal(dataset["model.embed"].values, expected_rows(plain, 0, 6))


# Rows, documents, tokens


def test_documents_and_rows_agree(plain: flexcache.Store) -> None:
    documents = plain.documents
    assert documents.column("label").to_pylist()[:2] != [None, None]
    texts = {item["id"]: item for item in token_documents(lengths(260))}
    token_id = plain.coordinates["token_id"].values
    for row in documents.to_pylist():
        original = texts[row["id"]]
        span = slice(row["row_start"], row["row_start"] + row["n_rows"])
        assert token_id[span].tolist() == original["tokens"]
        assert row["n_tokens"] == len(original["tokens"])
        assert (row["label"], row["score"]) == (original["label"], original["score"])
        assert f"doc-{row['source_index']}" == row["id"]
    assert np.array_equal(
        plain.coordinates["document"].values, np.repeat(np.arange(260), documents.column("n_rows").to_numpy())
    )


def test_rows_are_found_by_document_and_position(plain: flexcache.Store) -> None:
    document, position = (plain.coordinates[name].values for name in ("document", "position"))
    documents = plain.documents
    starts, counts = (documents.column(name).to_numpy() for name in ("row_start", "n_rows"))
    ids = documents.column("id").to_pylist()
    assert np.array_equal(plain.rows(), np.arange(plain.n_rows))
    assert np.array_equal(plain.rows(position=-1), starts + counts - 1)
    assert np.array_equal(plain.rows(position=5), np.flatnonzero(position == 5))
    assert np.array_equal(plain.rows(position=slice(2, 4)), np.flatnonzero((position >= 2) & (position < 4)))
    ends = counts[document]
    assert np.array_equal(plain.rows(position=slice(-3, None)), np.flatnonzero(position >= ends - 3))
    assert np.array_equal(plain.rows("doc-7"), np.flatnonzero(document == ids.index("doc-7")))
    assert np.array_equal(plain.rows(["doc-7", "doc-2"], 0), starts[[ids.index("doc-7"), ids.index("doc-2")]])
    assert np.array_equal(plain.rows([3, -1], 0), starts[[3, 259]])
    with pytest.raises(StoreError, match="no document 'doc-999'"):
        plain.rows("doc-999")


@pytest.mark.parametrize("rows", ["last", "first", "mean"])
def test_a_store_may_have_one_row_per_document(tmp_path: Path, rows: str) -> None:
    documents = token_documents(lengths(50))
    store = build_store(tmp_path / "run.zarr", documents, rows=rows, dtype="float32")
    assert store.n_rows == 50
    by_id = {item["id"]: np.array(item["tokens"]) for item in documents}
    read = store.read("resid_post", 3)
    from tests.corpora import activation

    for line, row in enumerate(store.documents.to_pylist()):
        tokens = by_id[row["id"]]
        whole = activation(tokens, np.arange(len(tokens)), 3, 24)
        expected = {"last": whole[-1], "first": whole[0], "mean": whole.mean(0)}[rows]
        assert np.allclose(read[line], expected, rtol=1e-6)
    if rows == "last":
        assert np.array_equal(store.rows(position=-1), np.arange(50))


def test_sequences_hold_the_tokens_of_every_batch(plain: flexcache.Store) -> None:
    table = plain.tokens
    ids = plain.documents.column("id").to_pylist()
    texts = {item["id"]: item["tokens"] for item in token_documents(lengths(260))}
    for row in table.to_pylist():
        assert row["tokens"] == texts[ids[row["document"]]]
    assert len(table) >= 260


# Errors


def test_reading_a_missing_site_or_row_names_the_existing_ones(plain: flexcache.Store) -> None:
    with pytest.raises(SiteError, match="did you mean resid_post"):
        plain.read("resid_pots", 0)
    with pytest.raises(SiteError, match="layer 2 of resid_post was not captured"):
        plain.read("resid_post", 2)
    with pytest.raises(SiteError, match="has no layers"):
        plain.read("model.embed", 2)
    with pytest.raises(IndexError, match="row numbers are 0"):
        plain.read("resid_post", 0, [0, plain.n_rows])
    with pytest.raises(IndexError, match="list of integers"):
        plain.read("resid_post", 0, [0.5])
    assert plain.read("resid_post", -2, [-1]).shape == (1, 24)
    assert plain.read("resid_post", 0, []).shape == (0, 24)
    mask = np.zeros(plain.n_rows, bool)
    mask[[3, 9]] = True
    assert np.array_equal(plain.read("resid_post", 0, mask), plain.read("resid_post", 0, [3, 9]))


def test_uncommitted_units_raise_an_error_or_are_left_out(tmp_path: Path) -> None:
    recorder = open_recorder(tmp_path / "run.zarr", token_documents(lengths(260)), dtype="float32")
    with pytest.raises(RuntimeError, match="stop"), recorder:
        for batch in recorder.batches():
            if batch.unit == 2:
                recorder._session.writer.drain()
                raise RuntimeError("stop")
            put_batch(recorder, batch)
    store = flexcache.open(tmp_path / "run.zarr")
    assert store.committed_units.tolist() == [0, 1]
    assert not store.complete
    with pytest.raises(UncommittedError, match="unit 2"):
        store.read("resid_post", 0)
    with pytest.raises(UncommittedError):
        store["resid_post"].isel(layer=0).values  # noqa: B018
    kept = store.dataset(committed=True)
    assert kept.sizes["token"] == 2 * store.shard_rows == len(store.committed_rows)
    assert np.array_equal(kept["resid_post"].sel(layer=3).values, stored(store, 3)[: 2 * store.shard_rows])
    assert "2 of" in repr(store)
    assert np.isnan(xr.open_zarr(store.path)["resid_post"].values[0, -1, 0])


def test_opening_something_else_than_a_store_raises_an_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no such folder"):
        flexcache.open(tmp_path / "nothing")
    zarr.create_group(tmp_path / "foreign.zarr")
    with pytest.raises(StoreError, match="not a FlexCache store"):
        flexcache.open(tmp_path / "foreign.zarr")
    (tmp_path / "broken.zarr").mkdir()
    (tmp_path / "broken.zarr" / "zarr.json").write_text('{"attributes": {"flexcache"')
    with pytest.raises(DamagedError, match="metadata cannot be read"):
        flexcache.open(tmp_path / "broken.zarr")


def test_a_store_of_a_newer_version_raises_a_version_error(plain: flexcache.Store, tmp_path: Path) -> None:
    shutil.copytree(plain.path, tmp_path / "newer.zarr")
    metadata = tmp_path / "newer.zarr" / "zarr.json"
    content = json.loads(metadata.read_text())
    content["attributes"]["flexcache"]["schema"] = 99
    metadata.write_text(json.dumps(content))
    with pytest.raises(VersionError, match="schema 99"):
        flexcache.open(tmp_path / "newer.zarr")


@pytest.mark.parametrize("name", ["../outside", "/etc", "a/../../b", ".."])
def test_arrays_that_lead_out_of_the_store_raise_an_error(plain: flexcache.Store, tmp_path: Path, name: str) -> None:
    shutil.copytree(plain.path, tmp_path / "hostile.zarr")
    metadata = tmp_path / "hostile.zarr" / "zarr.json"
    content = json.loads(metadata.read_text())
    arrays = content["attributes"]["flexcache"]["arrays"]
    arrays[name] = arrays.pop("resid_post") | {"name": name}
    metadata.write_text(json.dumps(content))
    with pytest.raises(DamagedError):
        flexcache.open(tmp_path / "hostile.zarr")


@pytest.mark.parametrize("change", ["missing", "short", "long"])
def test_a_shard_of_another_length_raises_an_error(plain: flexcache.Store, tmp_path: Path, change: str) -> None:
    shutil.copytree(plain.path, tmp_path / "run.zarr")
    shard = tmp_path / "run.zarr" / "resid_post" / "c" / "0" / "1" / "0"
    content = shard.read_bytes()
    shard.unlink()
    if change != "missing":
        shard.write_bytes(content[:-1] if change == "short" else content + b"x")
    store = flexcache.open(tmp_path / "run.zarr")
    for rows in ([store.shard_rows], slice(None)):
        with pytest.raises(DamagedError, match="resid_post/c/0/1/0"):
            store.read("resid_post", 0, rows)


# Display


def test_the_text_of_a_store_shows_its_main_facts(plain: flexcache.Store) -> None:
    text = repr(plain)
    for part in ("arithmetic", "complete", "resid_post", "0, 3", "float32", "label, score", f"{plain.n_rows:,}"):
        assert part in text
    markup = plain._repr_html_()
    assert "<table>" in markup
    assert "resid_post" in markup


def test_the_html_of_a_store_escapes_its_text(tmp_path: Path) -> None:
    store = build_store(tmp_path / "run.zarr", token_documents([3, 4]), model="<script>alert(1)</script>")
    assert "<script>" not in store._repr_html_()


def test_a_store_is_a_mapping(plain: flexcache.Store) -> None:
    assert list(plain) == ["resid_post", "model.embed"]
    assert len(plain) == 2
    assert "resid_post" in plain
    assert plain.layers("resid_post") == (0, 3)
    assert plain.layers("model.embed") == ()


def test_a_store_opens_and_reads_without_torch(plain: flexcache.Store) -> None:
    code = f"""
import sys
sys.modules.update(dict.fromkeys(["torch", "transformers", "accelerate"]))
import flexcache
store = flexcache.open({str(plain.path)!r})
print(store["resid_post"].sel(layer=3).values.sum(), store.read("resid_post", 3).sum(), len(store.documents))
assert flexcache.verify(store.path).sound
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


@pytest.mark.parametrize("raw", [False, True])
def test_a_scan_yields_all_committed_rows_in_order(store: flexcache.Store, raw: bool) -> None:
    expected = stored(store, 3)
    seen = 0
    for rows, block in store.scan("resid_post", 3, raw=raw, block_bytes=5000):
        assert rows.start == seen
        wanted = expected[rows] if raw else expected[rows].astype(np.float32)
        assert block.dtype == wanted.dtype
        assert np.array_equal(block.view(np.uint8), wanted.view(np.uint8))
        assert block.nbytes <= 5000
        seen = rows.stop
    assert seen == store.n_rows
