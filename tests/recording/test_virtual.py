"""Virtual layers: computed and hashed by a capture as if they were written, and not on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
import zarr

import flexcache
from flexcache.errors import ConfigError, FlexCacheError, MismatchError, SiteError
from flexcache.recording.forward.batch_reader import BatchReader
from flexcache.store.format.ledger import UnitRecord
from flexcache.store.read.store import Store
from flexcache.training.preshuffle import preshuffle
from tests.corpora import lengths, token_documents
from tests.models import DEPTH, VOCABULARY, tiny

DOCUMENTS = token_documents(lengths(60, longest=20), vocabulary=VOCABULARY)
SITES = ["resid_post", "mlp_post", "z"]
QUIET: dict[str, Any] = {"progress": False, "batch_tokens": 64}
KEEP: dict[str, Any] = {"keep": {"resid_post": "every 2"}}


def capture(path: Path, model: torch.nn.Module | None = None, documents: Any = DOCUMENTS, **changes: Any) -> Store:
    options = {"sites": SITES, **QUIET, **changes}
    return flexcache.capture(tiny("llama") if model is None else model, None, documents, path, **options)


def expected_digests(full: Store, record: UnitRecord, site: str, layer: int) -> tuple[str, ...]:
    """Hash the stored rows of a full capture, batch by batch."""
    batches = BatchReader(full.path).read_unit(record.unit, record.batch_tokens)
    rows = [full.read(site, layer, slice(batch.rows.start, batch.rows.stop), raw=True) for batch in batches]
    return tuple(xxhash.xxh3_128_hexdigest(np.ascontiguousarray(values).tobytes()) for values in rows)


def check_digests(store: Store, full: Store) -> None:
    """Assert that each virtual shard has the digests of a full capture, and each shard on disk its bytes."""
    for record, whole in zip(store.ledger, full.ledger, strict=True):
        wanted = {
            f"{array.name}/c/{layer}/{record.unit}/0": (array.name, layer)
            for array in store.arrays.values()
            for layer in array.virtual
        }
        assert set(record.virtual) == set(wanted)
        for name, key in wanted.items():
            assert record.virtual[name] == expected_digests(full, record, *key)
            assert not (store.path / name).exists()
        assert record.files == {name: file for name, file in whole.files.items() if name not in wanted}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("keep", [{"resid_post": "every 2"}, {}, {"resid_post": "all", "z": [0, -1]}])
def test_virtual_layers_have_the_digests_of_a_full_capture(keep: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    model = tiny("llama", dtype=getattr(torch, dtype))
    full = capture(tmp_path / "full.zarr", model)
    store = capture(tmp_path / "run.zarr", model, keep=keep)
    assert store.n_units > 1
    assert store.complete
    assert store.arrays["mlp_post"].virtual == tuple(range(DEPTH))
    assert (store.n_rows, store.shard_rows) == (full.n_rows, full.shard_rows)
    check_digests(store, full)


def test_rounded_values_are_hashed_as_they_would_be_stored(tmp_path: Path) -> None:
    options: dict[str, Any] = {"dtype": "bfloat16"}
    full = capture(tmp_path / "full.zarr", **options)
    store = capture(tmp_path / "run.zarr", keep={}, **options)
    check_digests(store, full)


def test_kept_residual_streams_may_have_the_dtype_of_the_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rounded") as refused:
        capture(tmp_path / "run.zarr", dtype="bfloat16", **KEEP)
    assert "keep_dtype to compute" in str(refused.value.remedy)
    store = capture(tmp_path / "run.zarr", dtype="bfloat16", keep_dtype="compute", **KEEP)
    assert {name: array.dtype for name, array in store.arrays.items()} == {
        "resid_post": "float32",
        "mlp_post": "bfloat16",
        "z": "bfloat16",
    }


def test_a_last_residual_stream_may_be_rounded_since_nothing_starts_from_it(tmp_path: Path) -> None:
    store = capture(tmp_path / "run.zarr", sites=["resid_post"], dtype="bfloat16", keep={"resid_post": -1})
    assert store.arrays["resid_post"].layers == (DEPTH - 1,)


def test_reading_a_virtual_layer_names_the_remedy(tmp_path: Path) -> None:
    store = capture(tmp_path / "run.zarr", **KEEP)
    reads: list[Any] = [
        lambda: store.read("mlp_post", 1),
        lambda: store.read("resid_post", -4, [0]),
        lambda: next(iter(store.scan("z", 0))),
        lambda: store["mlp_post"],
        lambda: store.raw("z"),
        lambda: store.reader("z").gather(0, np.array([1]), raw=True),
        lambda: store.reader("z").scan(0, 0, 2, raw=True),
        lambda: flexcache.training.stream(store, "resid_post", layer=0, batch_size=4),
        lambda: preshuffle(store.path, tmp_path / "shuffled.zarr", sites=["resid_post"]),
        lambda: flexcache.export(store.path, tmp_path / "out", to="parquet", sites=["mlp_post"]),
    ]
    for read in reads:
        with pytest.raises(SiteError, match="virtual") as refused:
            read()
        assert "flexcache.attach(store, model)" in str(refused.value.remedy)
    assert store.read("resid_post", 1).shape == (store.n_rows, 64)
    assert list(store.dataset()) == ["resid_post"]
    assert "0–3 (2 on disk, 2 virtual)" in repr(store)
    assert "0–3 (virtual)" in repr(store)
    assert np.isnan(zarr.open_array(store.path / "resid_post", mode="r")[0]).all()


def test_a_site_without_layers_on_disk_is_an_array_of_missing_values_for_other_readers(tmp_path: Path) -> None:
    store = capture(tmp_path / "run.zarr", sites=["resid_post"], keep={})
    array = zarr.open_array(store.path / "resid_post", mode="r")
    assert array.shape == (DEPTH, store.n_rows, 64)
    assert np.isnan(array[:]).all()


def test_another_keep_is_another_store(tmp_path: Path) -> None:
    store = capture(tmp_path / "run.zarr", **KEEP)
    assert capture(tmp_path / "run.zarr", keep={"resid_post": "every:2"}).path == store.path
    with pytest.raises(MismatchError, match="spec.keep.resid_post: every 2 in the store, all now"):
        capture(tmp_path / "run.zarr", keep={"resid_post": "all"})
    with pytest.raises(MismatchError, match="spec.keep"):
        capture(tmp_path / "run.zarr")


def test_only_stores_with_virtual_layers_have_the_new_schema(tmp_path: Path) -> None:
    def content(path: Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((path / "zarr.json").read_text())["attributes"]["flexcache"]
        return found

    capture(tmp_path / "plain.zarr")
    capture(tmp_path / "kept.zarr", **KEEP)
    plain, kept = content(tmp_path / "plain.zarr"), content(tmp_path / "kept.zarr")
    assert (plain["schema"], kept["schema"]) == (1, 3)
    assert "keep" not in plain["spec"]
    assert "keep_dtype" not in plain["spec"]
    assert all("virtual" not in array for array in plain["arrays"].values())
    assert "virtual" not in json.loads((tmp_path / "plain.zarr/ledger/0/0.json").read_text())


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"rows": "last"}, "rows: last"),
        ({"packing": {"length": 16, "separator": 0}}, "packing"),
        ({"dtype": "int8"}, "dtype: int8"),
        ({"compression": "zstd"}, "compression: zstd"),
        ({"windows": {"length": 8, "stride": 4}}, "windows"),
        ({"keep": {"q": "all"}}, "names q, which is not captured"),
        ({"keep": {"resid_post": [0, 9]}}, "no layer 9"),
        ({"sites": {"resid_post": [0, 1]}, "keep": {"resid_post": [2]}}, "not captured"),
        ({"sites": ["resid_post", "model.norm"], "keep": {"model.norm": 0}}, "model.norm are on disk"),
        ({"sites": ["resid_post", "z.grad"], "keep": {"z.grad": [0]}}, "z.grad are on disk"),
        ({"keep": 3}, "keep cannot be read"),
        ({"keep": None, "keep_dtype": "compute"}, "there is no keep"),
    ],
)
def test_what_cannot_be_recomputed_is_refused_before_work(changes: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(FlexCacheError, match=text):
        capture(tmp_path / "run.zarr", **{**KEEP, **changes})
    assert not (tmp_path / "run.zarr").exists()


def test_gradients_module_paths_and_transforms_are_on_disk(tmp_path: Path) -> None:
    norm = flexcache.Transform("resid_norm", "resid_post", function=lambda values: values.norm(dim=-1, keepdim=True))
    store = capture(tmp_path / "run.zarr", sites=["resid_post", "z.grad", "model.norm"], transforms=[norm], keep={})
    assert {name for name, array in store.arrays.items() if array.virtual} == {"resid_post"}
    assert {name for name, array in store.arrays.items() if array.slices} == set(store.arrays) - {"resid_post"}
