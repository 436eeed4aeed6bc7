"""Virtual layers: computed and hashed by a capture as if they were written, and not on disk."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
import zarr

import flexcache
from flexcache.errors import CaptureError, ConfigError, FlexCacheError, MismatchError, SiteError
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


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captures of the same rows: all on disk, and most of them virtual."""
    folder = tmp_path_factory.mktemp("stores")
    capture(folder / "full.zarr")
    capture(folder / "kept.zarr", **KEEP)
    return folder


def copied(folder: Path, name: str, to: Path) -> Store:
    return Store(shutil.copytree(folder / name, to / name))


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


def test_virtual_layers_have_the_digests_of_a_full_capture(made: Path) -> None:
    full, store = Store(made / "full.zarr"), Store(made / "kept.zarr")
    assert store.n_units > 1
    assert store.complete
    assert store.arrays["mlp_post"].virtual == tuple(range(DEPTH))
    assert (store.n_rows, store.shard_rows) == (full.n_rows, full.shard_rows)
    check_digests(store, full)


@pytest.mark.parametrize("keep", [{}, {"resid_post": "all", "z": [0, -1]}])
def test_any_layers_may_be_virtual_in_the_dtype_of_the_model(keep: dict[str, Any], tmp_path: Path) -> None:
    model = tiny("gpt2", dtype=torch.bfloat16)
    full, store = capture(tmp_path / "full.zarr", model), capture(tmp_path / "run.zarr", model, keep=keep)
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


def test_reading_a_virtual_layer_names_the_remedy(made: Path, tmp_path: Path) -> None:
    store = Store(made / "kept.zarr")
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


def test_another_keep_is_another_store(made: Path) -> None:
    assert capture(made / "kept.zarr", keep={"resid_post": "every:2"}).complete
    with pytest.raises(MismatchError, match="spec.keep.resid_post: every 2 in the store, all now"):
        capture(made / "kept.zarr", keep={"resid_post": "all"})
    with pytest.raises(MismatchError, match="spec.keep"):
        capture(made / "kept.zarr")


def test_only_stores_with_virtual_layers_have_the_new_schema(made: Path) -> None:
    def content(path: Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((path / "zarr.json").read_text())["attributes"]["flexcache"]
        return found

    plain, kept = content(made / "full.zarr"), content(made / "kept.zarr")
    assert (plain["schema"], kept["schema"]) == (1, 3)
    assert "keep" not in plain["spec"]
    assert "keep_dtype" not in plain["spec"]
    assert all("virtual" not in array for array in plain["arrays"].values())
    assert "virtual" not in json.loads((made / "full.zarr/ledger/0/0.json").read_text())


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


# Together with everything else


def test_an_extension_adds_documents_and_sites_in_the_batches_of_the_store(made: Path, tmp_path: Path) -> None:
    model, more = tiny("llama"), [{**document, "id": f"new-{document['id']}"} for document in DOCUMENTS[:40]]
    full, store = (copied(made, name, tmp_path) for name in ("full.zarr", "kept.zarr"))
    shared = full.n_rows // full.shard_rows
    assert full.n_rows % full.shard_rows
    with pytest.raises(CaptureError, match="batches that it was captured in"):
        flexcache.extend(model, None, more, store.path, batch_tokens=32, progress=False)
    full, store = (flexcache.extend(model, None, more, one.path, progress=False) for one in (full, store))
    assert store.n_units > shared + 1
    check_digests(store, full)
    full = flexcache.extend(model, None, path=full.path, sites=["q", "k"], progress=False)
    kept = {"sites": ["z", "k"], "keep": {"k": [0]}}
    store = flexcache.extend(model, None, path=store.path, spec=kept, progress=False)
    store = flexcache.extend(model, None, path=store.path, sites=["q", "resid_post"], progress=False)
    assert {name: (array.layers, array.virtual) for name, array in store.arrays.items()} == {
        "resid_post": ((1, 3), (0, 2)),
        "mlp_post": ((), (0, 1, 2, 3)),
        "z": ((), (0, 1, 2, 3)),
        "k": ((0,), (1, 2, 3)),
        "q": ((0, 1, 2, 3), ()),
    }
    assert store.spec.keep == {"resid_post": "every 2", "k": [0], "q": "all"}
    assert flexcache.verify(store.path).sound
    check_digests(store, full)


def test_virtual_sites_are_added_to_a_store_that_has_everything_on_disk(made: Path, tmp_path: Path) -> None:
    full = Store(made / "full.zarr")
    part = flexcache.copy(full.path, tmp_path / "run.zarr", sites=["resid_post"])
    spec = {"sites": ["mlp_post", "z"], "keep": {}}
    store = flexcache.extend(tiny("llama"), None, path=part.path, spec=spec, progress=False)
    assert store.spec.keep == {"resid_post": "all"}
    check_digests(store, full)


def test_a_model_is_compared_with_digests_where_no_layer_is_on_disk(tmp_path: Path) -> None:
    model = tiny("llama")
    store = capture(tmp_path / "run.zarr", model, keep={})
    assert all(one.equal for one in flexcache.recompute(model, store.path))
    store.ledger.take_back(1)
    for unit in (0, 2):  # as if the model had computed something else in layer 2
        record = store.ledger.read_record(unit)
        other = {f"z/c/2/{unit}/0": tuple(digest[::-1] for digest in record.virtual[f"z/c/2/{unit}/0"])}
        store.ledger.commit(replace(record, virtual=record.virtual | other))
    found = flexcache.recompute(model, store.path)
    assert {(one.site, one.layer) for one in found if one.wrong} == {("z", 2)}
    assert all(np.isinf([one.difference, one.relative_error]).all() for one in found if one.wrong)
    with pytest.raises(MismatchError, match="z of layer 2"):
        capture(tmp_path / "run.zarr", model, keep={})


def test_variants_have_the_digests_of_separate_captures(made: Path, tmp_path: Path) -> None:
    models = {"one": tiny("llama"), "two": tiny("llama")}  # they share the first two blocks
    with torch.no_grad():
        models["two"].model.layers[2].mlp.down_proj.weight.mul_(1.5)
    stores = flexcache.capture_variants(models, None, DOCUMENTS, tmp_path, sites=SITES, **KEEP, **QUIET)
    assert list(stores["one"].ledger) == list(Store(made / "kept.zarr").ledger)
    assert list(stores["two"].ledger) == list(capture(tmp_path / "alone.zarr", models["two"], **KEEP).ledger)
    one, two = (next(iter(store.ledger)).virtual for store in stores.values())
    assert one["resid_post/c/0/0/0"] == two["resid_post/c/0/0/0"]
    assert one["resid_post/c/2/0/0"] != two["resid_post/c/2/0/0"]


def test_rows_of_a_forward_of_the_caller_or_of_a_generation_are_never_virtual(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot recompute virtual layers"):
        flexcache.record(
            tmp_path / "run.zarr", DOCUMENTS, {"keep": {}}, sites={"resid_post": (4, 8)}, model="a forward"
        )
    with pytest.raises(ConfigError, match="generate.capture"):
        capture(tmp_path / "run.zarr", keep={}, generate={"max_new_tokens": 4, "capture": True})
