from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

import flexcache
from flexcache.errors import ConfigError, MismatchError, PlanError, SiteError, StoreError, UncommittedError
from flexcache.exchange import table
from flexcache.exchange.export_files import FORMATS, label
from flexcache.exchange.exporting import export
from tests.corpora import build_store, lengths, token_documents
from tests.store.test_copy import partial_store


@pytest.fixture(scope="module", params=["bfloat16", "float16", "float32", "bfloat16-zstd"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> flexcache.Store:
    dtype, _, codec = request.param.partition("-")
    path = tmp_path_factory.mktemp("source") / "run.zarr"
    return build_store(path, token_documents(lengths(150)), dtype=dtype, compression=codec or "none")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> flexcache.Store:
    return build_store(tmp_path_factory.mktemp("source") / "run.zarr", token_documents(lengths(150)))


def every(store: flexcache.Store) -> list[tuple[str, int | None]]:
    return [(name, layer) for name, array in store.arrays.items() for layer in array.slices]


def test_exported_safetensors_equal_the_rows_of_the_store(store: flexcache.Store, tmp_path: Path) -> None:
    files = export(store.path, tmp_path / "out", "safetensors")
    assert sorted(path.name for path in files) == [
        "model.embed.safetensors",
        "resid_post.layer_0.safetensors",
        "resid_post.layer_3.safetensors",
    ]
    for key in every(store):
        path = tmp_path / "out" / f"{label(key)}.safetensors"
        tensor = load_file(path)[label(key)]
        assert tensor.dtype == getattr(torch, store.arrays[key[0]].dtype)
        assert np.array_equal(tensor.float().numpy(), store.read(*key))
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        layer = {} if key[1] is None else {"layer": str(key[1])}
        dtype = store.arrays[key[0]].dtype
        assert metadata == {"store": "run.zarr", "model": "arithmetic", "site": key[0], "dtype": dtype, **layer}


def test_npy_files_are_memory_mapped(store: flexcache.Store, tmp_path: Path) -> None:
    export(store.path, tmp_path / "out", "npy")
    for key in every(store):
        mapped = np.load(tmp_path / "out" / f"{label(key)}.npy", mmap_mode="r")
        assert isinstance(mapped, np.memmap)
        assert mapped.dtype == ("float16" if store.arrays[key[0]].dtype == "float16" else "float32")
        assert np.array_equal(mapped.astype(np.float32), store.read(*key))
    assert np.array_equal(np.load(tmp_path / "out" / "rows.npy"), np.arange(store.n_rows))


def test_parquet_has_a_line_per_row_with_document_and_labels(
    store: flexcache.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "GROUP_BYTES", 100 * 54 * 4)
    files = export(store.path, tmp_path / "out", "parquet")
    assert [path.name for path in files] == [
        f"train-{unit:05d}-of-{store.n_units:05d}.parquet" for unit in range(store.n_units)
    ]
    groups = pq.ParquetFile(files[0]).metadata
    assert groups.num_row_groups > 1
    assert groups.row_group(0).num_rows <= 200
    read = pq.read_table(tmp_path / "out" / "data")
    assert len(read) == store.n_rows
    documents = store.documents.to_pylist()
    lines = store.coordinates["document"].values
    assert read.column("row").to_pylist() == list(range(store.n_rows))
    assert read.column("document").to_pylist() == [documents[line]["id"] for line in lines]
    assert read.column("label").to_pylist() == [documents[line]["label"] for line in lines]
    assert read.column("score").to_pylist() == [documents[line]["score"] for line in lines]
    assert np.array_equal(read.column("token_id").to_numpy(), store.coordinates["token_id"].values)
    assert np.array_equal(read.column("position").to_numpy(), store.coordinates["position"].values)
    for key in every(store):
        column = read.column(label(key)).combine_chunks()
        width = store.arrays[key[0]].features
        assert column.type.list_size == width
        values = column.flatten().to_numpy().reshape(-1, width)
        assert np.array_equal(values.astype(np.float32), store.read(*key))


def test_an_export_includes_documents_and_a_manifest(plain: flexcache.Store, tmp_path: Path) -> None:
    for to in FORMATS:
        out = tmp_path / to
        export(plain.path, out, to)
        assert pq.read_table(out / "documents.parquet").equals(plain.documents)
        manifest = json.loads((out / "export.json").read_text())
        assert manifest["provenance"]["model"]["name"] == "arithmetic"
        assert manifest["rows"] == plain.n_rows
        assert not list(out.glob("**/.*"))


@settings(max_examples=15)
@given(
    st.sampled_from(FORMATS),
    st.sampled_from(["all", "0", [3], "0:2"]),
    st.sampled_from([["resid_post"], ["model.*"], None]),
    st.integers(0, 4),
)
def test_an_interrupted_export_resumes_by_file_to_the_same_bytes(
    plain: flexcache.Store, tmp_path_factory: pytest.TempPathFactory, to: str, layers: Any, sites: Any, kept: int
) -> None:
    folder = tmp_path_factory.mktemp("export")
    whole = export(plain.path, folder / "whole", to, layers=layers, sites=sites)
    export(plain.path, folder / "again", to, layers=layers, sites=sites)
    stamps = {}
    for index, path in enumerate(whole):
        twin = folder / "again" / path.relative_to(folder / "whole")
        if index >= kept:
            twin.unlink()
        else:
            stamps[twin] = twin.stat().st_mtime_ns
    seen: list[tuple[int, int]] = []
    again = export(plain.path, folder / "again", to, layers=layers, sites=sites, progress=lambda *at: seen.append(at))
    assert seen[-1][0] == seen[-1][1] > 0
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in whole]
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    shutil.rmtree(folder)


def test_a_failed_write_leaves_no_file_that_looks_whole(
    plain: flexcache.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = flexcache.Store.scan

    def breaks(self: flexcache.Store, site: str, *arguments: Any, **options: Any) -> Any:
        options["block_bytes"] = 4096
        for number, item in enumerate(scan(self, site, *arguments, **options)):
            if site == "model.embed" and number == 2:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(flexcache.Store, "scan", breaks)
    with pytest.raises(KeyboardInterrupt):
        export(plain.path, tmp_path / "out", "npy")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"resid_post.layer_0.npy", "resid_post.layer_3.npy"} <= names
    assert not [name for name in names if "embed" in name]


def test_committed_rows_of_a_partial_store_can_be_exported(tmp_path: Path) -> None:
    store = partial_store(tmp_path / "run.zarr", 2)
    for to in FORMATS:
        with pytest.raises(UncommittedError, match="not all rows"):
            export(store.path, tmp_path / to, to)
        assert not (tmp_path / to).exists()
        files = export(store.path, tmp_path / to, to, rows="committed", sites=["model.embed"])
        assert len(files) == (2 if to == "parquet" else 1)
    mapped = np.load(tmp_path / "npy" / "model.embed.npy")
    rows = np.load(tmp_path / "npy" / "rows.npy")
    assert np.array_equal(rows, store.committed_rows)
    assert np.array_equal(mapped, store.read("model.embed", rows=rows))
    build_store(store.path, token_documents(lengths(260)))
    with pytest.raises(MismatchError, match="another export"):
        export(store.path, tmp_path / "npy", "npy", rows="committed", sites=["model.embed"])


def test_an_impossible_export_is_refused_before_writing(
    plain: flexcache.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="no format 'csv'"):
        export(plain.path, out, "csv")
    with pytest.raises(ConfigError, match="rows 'some'"):
        export(plain.path, out, "npy", rows="some")
    with pytest.raises(SiteError, match="did you mean resid_post"):
        export(plain.path, out, "npy", sites=["resid_pots"])
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("flexcache.store.write.create.shutil.disk_usage", lambda path: usage._replace(free=10))
        with pytest.raises(PlanError, match="export does not fit"):
            export(plain.path, out, "npy")
    assert not out.exists()
    out.mkdir()
    (out / "thesis.txt").write_text("x")
    with pytest.raises(StoreError, match="not empty"):
        export(plain.path, out, "npy")
    export(plain.path, tmp_path / "npy", "npy")
    for change in ({"to": "safetensors"}, {"to": "npy", "layers": "0"}):
        with pytest.raises(MismatchError, match="another export"):
            export(plain.path, tmp_path / "npy", **change)  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="is a file"):
        export(plain.path, out / "thesis.txt", "npy")


def test_memory_is_bounded_by_a_block(tmp_path: Path) -> None:
    import tracemalloc

    store = build_store(
        tmp_path / "run.zarr", token_documents([100] * 400), sites={"resid_post": (1, 512)}, layers="all"
    )
    size = store.n_rows * 512 * 4
    tracemalloc.start()
    for to in ("npy", "safetensors"):
        export(store.path, tmp_path / to, to)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 80e6
    assert peak < 0.4 * size
