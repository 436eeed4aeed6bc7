from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import flexcache
from flexcache.errors import ConfigError, DamagedError, FlexCacheError, MismatchError, RangeError, SiteError, StoreError
from flexcache.exchange import safetensors
from flexcache.exchange.exporting import export
from flexcache.exchange.importing import import_folder
from tests.corpora import build_store, lengths, token_documents


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def corpus_rows(store: flexcache.Store, site: str, layer: int | None) -> np.ndarray:
    """Return rows in the order of the files: by document as given, then by position."""
    source = store.documents.column("source_index").to_numpy()[store.coordinates["document"].values]
    order = np.lexsort((store.coordinates["position"].values, source))
    return store.read(site, layer, order)


def save(folder: Path, kind: str, name: str, tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir(exist_ok=True)
    if kind == "safetensors":
        save_file(tensors, folder / f"{name}.safetensors")
    else:
        torch.save(tensors, folder / f"{name}.pt")


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_layers_over_several_files_become_one_array(kind: str, dtype: str, tmp_path: Path) -> None:
    whole = {layer: values(130, 7, 6, seed=layer).to(getattr(torch, dtype)) for layer in (2, 5)}
    ids = torch.arange(130 * 7).reshape(130, 7)
    for part in range(13):  # part10 comes after part2
        span = slice(part * 10, part * 10 + 10)
        tensors = {f"model.layers.{layer}": whole[layer][span].contiguous() for layer in whole}
        save(tmp_path / "acts", kind, f"part{part}", {**tensors, "token_ids": ids[span].contiguous()})
    seen: list[tuple[int, int]] = []
    store = import_folder(
        tmp_path / "acts", tmp_path / "run.zarr", kind, site="resid_post", token_ids="token_ids", depth=8,
        progress=lambda *at: seen.append(at),
    )  # fmt: skip
    assert seen[-1] == (910, 910)
    assert store.complete
    assert flexcache.verify(store.path).sound
    assert store.layers("resid_post") == (2, 5)
    assert store.arrays["resid_post"].depth == 8
    assert store.arrays["resid_post"].dtype == dtype
    assert len(store.documents) == 130
    for layer, tensor in whole.items():
        assert np.array_equal(corpus_rows(store, "resid_post", layer), tensor.float().reshape(-1, 6).numpy())
    order = np.lexsort((store.coordinates["position"].values, store.coordinates["document"].values))
    by_document = store.coordinates["token_id"].values[order].reshape(130, 7)
    assert np.array_equal(by_document[:, 0] % 7, np.zeros(130))
    assert np.array_equal(np.sort(by_document.reshape(-1)), np.arange(910))
    again = import_folder(
        tmp_path / "acts", tmp_path / "run.zarr", kind, site="resid_post", token_ids="token_ids", depth=8
    )
    assert again.complete


@settings(max_examples=12)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=40).filter(any),
    st.sampled_from(["safetensors", "pt"]),
    st.sampled_from([None, "documents"]),
    st.booleans(),
)
def test_imported_rows_equal_the_tensors(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], kind: str, documents: str | None, layered: bool
) -> None:
    folder = tmp_path_factory.mktemp("import")
    tensor = values(sum(sizes), 3)
    save(folder / "acts", kind, "layer_1" if layered else "all", {"acts": tensor})
    if documents:
        table = pa.table({"id": [f"d{i}" for i in range(len(sizes))], "n_rows": sizes, "label": sizes})
        pq.write_table(table, folder / "documents.parquet")
    path = folder / "documents.parquet" if documents else None
    store = import_folder(folder / "acts", folder / "run.zarr", kind, site="mine", documents=path)
    assert store.n_rows == sum(sizes)
    assert store.layers("mine") == ((1,) if layered else ())
    found = store.read("mine", 1 if layered else None)
    if documents is None:
        assert len(store.documents) == sum(sizes)
        assert np.array_equal(corpus_rows(store, "mine", 1 if layered else None), tensor.numpy())
    else:
        starts = {f"d{i}": start for i, start in enumerate(np.cumsum([0, *sizes]).tolist())}
        for line in store.documents.to_pylist():
            assert line["label"] == line["n_rows"]
            rows = slice(line["row_start"], line["row_start"] + line["n_rows"])
            assert np.array_equal(found[rows], tensor[starts[line["id"]] :][: line["n_rows"]].numpy())
    shutil.rmtree(folder)


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_an_export_is_imported_with_documents_and_tokens(compression: str, tmp_path: Path) -> None:
    store = build_store(tmp_path / "run.zarr", token_documents(lengths(120)), compression=compression)
    export(store.path, tmp_path / "out", "safetensors", sites=["resid_post"])
    back = import_folder(
        tmp_path / "out",
        tmp_path / "back.zarr",
        "safetensors",
        site="resid_post",
        depth=5,
        documents=tmp_path / "out" / "documents.parquet",
        token_ids="token_id.npy",
        compression=compression,
    )
    for line in store.documents.to_pylist():
        ours, theirs = store.rows(line["id"]), back.rows(line["id"])
        for layer in (0, 3):
            assert np.array_equal(back.read("resid_post", layer, theirs), store.read("resid_post", layer, ours))
        assert np.array_equal(back.coordinates["token_id"][theirs], store.coordinates["token_id"][ours])
    assert back.documents.column("label").to_pylist().count("odd") == 60
    assert back.arrays["resid_post"] == store.arrays["resid_post"]


def test_nested_dicts_and_lists_of_torch_are_imported(tmp_path: Path) -> None:
    tensors = [values(20, 4, seed=layer) for layer in range(3)]
    (tmp_path / "acts").mkdir()
    torch.save({"run": {"layers": tensors, "step": 3}, "note": "text"}, tmp_path / "acts" / "all.pt")
    store = import_folder(tmp_path / "acts", tmp_path / "run.zarr", "pt", site="mlp_out")
    assert store.layers("mlp_out") == (0, 1, 2)
    for layer, tensor in enumerate(tensors):
        assert np.array_equal(corpus_rows(store, "mlp_out", layer), tensor.numpy())
    old = tmp_path / "old"
    old.mkdir()
    torch.save({"layer_0": tensors[0]}, old / "all.pt", _use_new_zipfile_serialization=False)
    store = import_folder(old, tmp_path / "old.zarr", "pt", site="mlp_out")
    assert np.array_equal(corpus_rows(store, "mlp_out", 0), tensors[0].numpy())


def test_float64_tensors_are_stored_if_a_dtype_is_given(tmp_path: Path) -> None:
    save(tmp_path / "acts", "safetensors", "layer_0", {"x": values(9, 3).double()})
    with pytest.raises(ConfigError, match="float64 cannot be stored"):
        import_folder(tmp_path / "acts", tmp_path / "run.zarr", "safetensors", site="mlp_out")
    store = import_folder(tmp_path / "acts", tmp_path / "run.zarr", "safetensors", site="mlp_out", dtype="bfloat16")
    expected = values(9, 3).double().numpy().astype(ml_dtypes.bfloat16).astype(np.float32)
    assert np.array_equal(corpus_rows(store, "mlp_out", 0), expected)


# SAELens


def saelens_folder(
    folder: Path, hook: str, acts: np.ndarray, ids: np.ndarray | None, extension: str = "", files: int = 2
) -> None:
    """Write the files of datasets for Array2D and Sequence columns, in batches of four lines."""
    folder.mkdir()
    step = -(-len(acts) // files)
    for index in range(files):
        span = slice(index * step, index * step + step)
        columns: dict[str, Any] = {hook: pa.array(acts[span].tolist(), pa.list_(pa.list_(pa.float32())))}
        if ids is not None:
            columns["token_ids"] = pa.array(ids[span].tolist(), pa.list_(pa.int32(), ids.shape[1]))
        table = pa.table(columns)
        if extension:  # the type under which datasets writes Array2D; it is not known here
            mark = {"ARROW:extension:name": extension, "ARROW:extension:metadata": '[[8, 5], "float32"]'}
            table = table.cast(table.schema.set(0, table.schema.field(0).with_metadata(mark)))
        path = str(folder / f"data-{index:05d}-of-{files:05d}.arrow")
        with pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
    (folder / "state.json").write_text("{}")


@pytest.mark.parametrize("with_ids", [True, False])
@pytest.mark.parametrize(
    "extension", ["", "datasets.features.features.Array2DExtensionType", "arrow.py_extension_type"]
)
@pytest.mark.filterwarnings("ignore:pyarrow.PyExtensionType")
def test_a_saelens_cache_is_imported(extension: str, with_ids: bool, tmp_path: Path) -> None:
    acts = np.random.default_rng(0).normal(size=(30, 8, 5)).astype(np.float32)
    ids = np.arange(240).reshape(30, 8)
    saelens_folder(tmp_path / "cache", "blocks.7.hook_resid_post", acts, ids if with_ids else None, extension)
    (tmp_path / "cache" / "cache-1234.arrow").write_text("what datasets leaves beside")
    store = import_folder(tmp_path / "cache", tmp_path / "run.zarr", "saelens", site="resid_post", model="gpt2")
    assert store.layers("resid_post") == (7,)
    assert store.provenance.model["name"] == "gpt2"
    assert np.array_equal(corpus_rows(store, "resid_post", 7), acts.reshape(-1, 5))
    source = store.documents.column("source_index").to_numpy()[store.coordinates["document"].values]
    expected = ids[source, store.coordinates["position"].values] if with_ids else np.zeros(240)
    assert np.array_equal(store.coordinates["token_id"].values, expected)


# Errors


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "pwned"),)

    (tmp_path / "acts").mkdir()
    torch.save({"layer_0": Evil()}, tmp_path / "acts" / "a.pt")
    with pytest.raises(DamagedError, match="tensors alone"):
        import_folder(tmp_path / "acts", tmp_path / "run.zarr", "pt", site="mlp_out")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("tensors", "options", "error", "words"),
    [
        ({"a": (9, 3)}, {}, SiteError, "no tensor of the folder has a layer"),
        ({"layer_0": (9,)}, {}, MismatchError, "wrong number of dims"),
        ({"layer_0": (9, 3), "layer_1": (9, 4)}, {}, MismatchError, "differ in features"),
        ({"layer_0": (9, 3), "layer_1": (8, 3)}, {}, MismatchError, "layer 1 has other tokens"),
        ({"layer_0": (9, 3), "layer_1": (3, 3, 3)}, {}, MismatchError, "wrong number of dims"),
        ({"layer_0": (0, 3)}, {}, MismatchError, "no token"),
        ({"layer_5": (9, 3)}, {"depth": 5}, ConfigError, "depth 5 has no layer 5"),
        ({"layer_0": (9, 3)}, {"layer_pattern": "layer_("}, ConfigError, "cannot be read"),
        ({"layer_0": (9, 3)}, {"layer_pattern": "layer_"}, ConfigError, "has 0 groups"),
        ({"layer_0": (9, 3)}, {"layer_pattern": "(layer)"}, ConfigError, "finds no number"),
        ({"layer_0": (9, 3)}, {"token_ids": "ids"}, ConfigError, "no token ids 'ids'"),
        ({"layer_0": (9, 3), "ids": (9,)}, {"token_ids": "ids"}, MismatchError, "do not fit"),
        ({"layer_0": (9, 3)}, {"documents": "nothing.parquet"}, DamagedError, "cannot be read"),
        ({"layer_0": (9, 3)}, {"documents": "documents.parquet"}, MismatchError, "documents do not fit"),
        ({"layer_0": (9, 3)}, {"kind": "csv"}, ConfigError, "cannot be imported"),
        ({"layer_0": (9, 3)}, {"kind": "pt"}, StoreError, "holds no pt files"),
    ],
    ids=lambda item: str(item)[:40],
)
def test_an_impossible_import_is_refused_before_writing(
    tensors: dict[str, tuple[int, ...]],
    options: dict[str, Any],
    error: type[FlexCacheError],
    words: str,
    tmp_path: Path,
) -> None:
    save(tmp_path / "acts", "safetensors", "part", {name: values(*shape) for name, shape in tensors.items()})
    pq.write_table(pa.table({"id": ["a", "b"], "n_rows": [4, 4]}), tmp_path / "documents.parquet")
    given = {"kind": "safetensors", **options}
    if "documents" in given:
        given["documents"] = tmp_path / given["documents"]
    with pytest.raises(error, match=words):
        import_folder(tmp_path / "acts", tmp_path / "run.zarr", given.pop("kind"), site="resid_post", **given)
    assert not (tmp_path / "run.zarr").exists()


def test_a_value_that_is_not_finite_is_named(tmp_path: Path) -> None:
    tensor = values(50, 3)
    tensor[20, 1] = float("nan")
    save(tmp_path / "acts", "pt", "layer_0", {"x": tensor})
    with pytest.raises(RangeError, match="not finite"):
        import_folder(tmp_path / "acts", tmp_path / "run.zarr", "pt", site="mlp_out")


@pytest.mark.parametrize("cut", [0, 4, 20, 200])
def test_a_truncated_file_is_named(cut: int, tmp_path: Path) -> None:
    save(tmp_path / "acts", "safetensors", "layer_0", {"x": values(50, 3)})
    path = tmp_path / "acts" / "layer_0.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DamagedError, match="safetensors") as raised:
        import_folder(tmp_path / "acts", tmp_path / "run.zarr", "safetensors", site="mlp_out")
    assert raised.value.where == str(path)


def test_headers_agree_with_the_safetensors_package(tmp_path: Path) -> None:
    tensors = {"a": values(3, 5), "b": values(2, 2).bfloat16(), "c": torch.arange(4), "d": values(0, 3).half()}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"key": "value"})
    entries, metadata = safetensors.read_header(tmp_path / "x.safetensors")
    assert metadata == {"key": "value"}
    assert entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        found = entries[name].open(tmp_path / "x.safetensors")
        assert np.array_equal(found.astype(np.float32), tensor.float().numpy())
        assert found.shape == tuple(tensor.shape)
