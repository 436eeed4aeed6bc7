"""Stores with virtual layers: copies, merges, removals, checks and repairs of digests of rows that are not there."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

import flexcache
from flexcache.array_spec import mean_blocks
from flexcache.errors import ConfigError, MismatchError
from flexcache.recording.forward.batch_reader import BatchReader
from flexcache.store.format.ledger import digests_of
from flexcache.store.manage.footprint import footprint
from flexcache.store.manage.layer_change import NOTE, LayerChange
from flexcache.store.read.batch_rows import batch_rows, hash_batches
from flexcache.store.read.selection import captured_keys
from flexcache.store.read.store import Store
from tests.corpora import expected_rows, lengths, plan_virtual, put_batch, token_documents

DOCUMENTS = token_documents(lengths(60, longest=20))
SITES = {"resid_post": (6, 8), "z": (6, 4)}
KEEP = {"resid_post": "every 3"}


def fill(path: Path, **options: Any) -> Store:
    with flexcache.Recorder(path, **options) as recorder:
        for batch in recorder.batches():
            put_batch(recorder, batch)
    return Store(path)


def make(path: Path, keep: dict[str, Any], **fields: Any) -> Store:
    plan_virtual(path, DOCUMENTS, SITES, keep, **{"batch_tokens": 64, **fields})
    return fill(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores of the same rows: all on disk, most virtual, and all virtual."""
    folder = tmp_path_factory.mktemp("stores")
    make(folder / "full.zarr", {"resid_post": "all", "z": "all"})
    make(folder / "kept.zarr", KEEP)
    make(folder / "none.zarr", {})
    return folder


@pytest.fixture
def kept(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "kept.zarr", tmp_path / "kept.zarr"))


def check_digests(store: Store) -> None:
    """Assert that each virtual layer has, for each batch, the hash of the rows that were put."""
    for record in store.ledger:
        batches = BatchReader(store.path).read_unit(record.unit, record.batch_tokens)
        for array in store.arrays.values():
            for layer in array.virtual:
                rows = expected_rows(store, layer, array.features).astype(ml_dtypes.bfloat16)
                expected = [xxhash.xxh3_128_hexdigest(rows[b.rows.start : b.rows.stop].tobytes()) for b in batches]
                assert list(digests_of(record, (array.name, layer))) == expected
            for layer in array.slices:
                assert hash_batches(store, record, array.name, layer)
        assert record.names == {
            f"{name}/c/{layer}/{record.unit}/0" for name, layer in captured_keys(store.arrays.values())
        }


layers = st.one_of(
    st.just("all"),
    st.builds("every {}".format, st.integers(1, 6)),
    st.lists(st.integers(0, 5), min_size=1, max_size=6, unique=True),
)


@settings(max_examples=15)
@given(
    keep=st.dictionaries(st.sampled_from(["resid_post", "z"]), layers),
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=40),
    batch_tokens=st.integers(4, 200),
    smaller=st.integers(4, 200),
    stop=st.integers(0, 12),
    buffer_bytes=st.integers(1_000_000, 4_000_000),
)
def test_digests_are_those_of_the_rows_however_a_capture_was_run(
    keep: dict[str, Any],
    counts: list[int],
    batch_tokens: int,
    smaller: int,
    stop: int,
    buffer_bytes: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.mktemp("any") / "run.zarr"
    plan_virtual(path, token_documents(counts), SITES, keep, batch_tokens=batch_tokens)
    with flexcache.Recorder(path, buffer_bytes=buffer_bytes) as recorder:
        for number, batch in enumerate(recorder.batches()):
            if number == stop:
                break  # as if it was killed
            put_batch(recorder, batch)
    store = fill(path, buffer_bytes=buffer_bytes, batch_tokens=smaller)
    assert store.complete
    check_digests(store)
    found = flexcache.verify(path)
    assert found.sound
    assert found.virtual == store.n_units * sum(len(array.virtual) for array in store.arrays.values())


def test_batches_are_split_as_the_reader_of_batches_splits_them(made: Path) -> None:
    store = Store(made / "full.zarr")
    for budget in (7, 23, 64):
        for unit in range(store.n_units):
            batches = BatchReader(store.path).read_unit(unit, budget)
            assert batch_rows(store, unit, budget) == [batch.rows for batch in batches]


def test_a_layer_on_disk_hashes_to_the_digests_that_it_has_where_it_is_virtual(made: Path) -> None:
    full, none = Store(made / "full.zarr"), Store(made / "none.zarr")
    for one, other in zip(full.ledger, none.ledger, strict=True):
        for key in captured_keys(none.arrays.values()):
            assert hash_batches(full, one, *key) == digests_of(other, key)


def test_verify_names_missing_digests_and_repair_has_the_unit_recomputed(kept: Path) -> None:
    store = Store(kept)
    record = store.ledger.read_record(1)
    name, short = "z/c/2/1/0", "z/c/4/1/0"
    virtual = {key: held for key, held in record.virtual.items() if key != name} | {short: record.virtual[short][:-1]}
    store.ledger.commit(replace(record, virtual=virtual))
    found = flexcache.verify(kept)
    batches = len(record.virtual[name])
    assert [(one.file, one.unit, one.problem) for one in found.findings] == [
        (name, 1, f"has no digests in its unit's record, which ran {batches} batches"),
        (short, 1, f"has {batches - 1} digests in its unit's record, which ran {batches} batches"),
    ]
    assert flexcache.repair(kept).units == (1,)
    fill(kept)
    assert flexcache.verify(kept).sound
    assert Store(kept).ledger.read_record(1) == record


def test_a_record_with_another_digest_is_damaged(kept: Path) -> None:
    path = kept / "ledger/0/0.json"
    content = path.read_text()
    digest = json.loads(content)["virtual"]["z/c/0/0/0"][0]
    path.write_text(content.replace(digest, digest[::-1]))
    found = flexcache.verify(kept)
    assert [(one.file, one.unit) for one in found.findings][:1] == [("ledger/0/0.json", 0)]


def test_a_copy_has_the_digests_of_what_it_copies(made: Path, tmp_path: Path) -> None:
    origin = Store(made / "kept.zarr")
    whole = flexcache.copy(origin.path, tmp_path / "whole.zarr")
    assert list(whole.ledger) == list(origin.ledger)
    assert whole.spec == origin.spec
    part = flexcache.copy(origin.path, tmp_path / "part.zarr", layers="1:4")
    assert {name: (array.layers, array.virtual) for name, array in part.arrays.items()} == {
        "resid_post": ((2,), (1, 3)),
        "z": ((), (1, 2, 3)),
    }
    assert part.spec.keep == {"resid_post": "every 3"}
    virtual = flexcache.copy(origin.path, tmp_path / "virtual.zarr", sites=["z"])
    assert virtual.spec.keep == {}
    disk = flexcache.copy(origin.path, tmp_path / "disk.zarr", sites=["resid_post"], layers=[2, 5], dtype="float16")
    assert disk.spec.keep is None
    for store in (whole, part, virtual, disk):
        assert flexcache.verify(store.path).sound
        if store is not disk:
            check_digests(store)
    schemas = [
        json.loads((store.path / "zarr.json").read_text())["attributes"]["flexcache"]["schema"]
        for store in (part, disk)
    ]
    assert schemas == [3, 1]


@pytest.mark.parametrize("change", [{"dtype": "float32"}, {"compression": "zstd"}])
def test_virtual_layers_are_not_converted(change: dict[str, Any], made: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be converted") as refused:
        flexcache.copy(made / "kept.zarr", tmp_path / "run.zarr", **change)
    assert "flexcache fill" in str(refused.value.remedy)


def test_a_merge_puts_layers_on_disk_that_one_of_the_stores_has(made: Path, tmp_path: Path) -> None:
    flexcache.copy(made / "full.zarr", tmp_path / "z.zarr", sites=["z"], layers=[0, 4])
    merged = flexcache.merge([made / "kept.zarr", tmp_path / "z.zarr"], tmp_path / "run.zarr")
    assert merged.arrays["z"].layers == (0, 4)
    assert merged.arrays["z"].virtual == (1, 2, 3, 5)
    assert merged.spec.keep == {"resid_post": "every 3", "z": [0, 4]}
    assert flexcache.verify(merged.path).sound
    check_digests(merged)
    assert np.array_equal(merged.read("z", 4), Store(made / "full.zarr").read("z", 4))


def test_a_merge_refuses_rows_that_do_not_have_the_digests(made: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(made / "none.zarr", tmp_path / "other.zarr"))
    record = Store(other).ledger.read_record(1)
    swapped = record.virtual | {"z/c/0/1/0": record.virtual["z/c/1/1/0"]}
    Store(other).ledger.commit(replace(record, virtual=swapped))
    for store in ("full.zarr", "kept.zarr"):
        with pytest.raises(MismatchError, match="z/c/0/1/0 has other bytes"):
            flexcache.merge([made / store, other], tmp_path / "run.zarr")


def test_a_merge_refuses_digests_of_other_batches(made: Path, tmp_path: Path) -> None:
    plan_virtual(tmp_path / "other.zarr", DOCUMENTS, SITES, {}, batch_tokens=64)
    fill(tmp_path / "other.zarr", batch_tokens=40)
    with pytest.raises(MismatchError, match="batches of 64 and 40 tokens"):
        flexcache.merge([made / "kept.zarr", tmp_path / "other.zarr"], tmp_path / "run.zarr")


def test_removing_a_residual_stream_says_how_many_more_blocks_a_virtual_layer_takes(kept: Path) -> None:
    removal = flexcache.Removal(kept, ["resid_post"], 2)
    # resid_post 0, 1, 3, 4 took 1, 2, 1, 2 blocks, and z 0 to 5 took 1, 2, 3, 1, 2, 3; then 3 and 4 take 4 and 5
    assert removal.price() == "a virtual layer is then recomputed by 3.3 blocks on average, instead of 1.8"
    removal.run()
    store = Store(kept)
    assert store.arrays["resid_post"].layers == (5,)
    assert store.spec.keep == {"resid_post": "every 3"}
    assert store.spec.sites["resid_post"] == [0, 1, 3, 4, 5]
    assert flexcache.verify(kept).sound
    check_digests(store)


def test_removing_virtual_layers_removes_their_digests_and_the_schema_that_they_need(kept: Path) -> None:
    first = flexcache.Removal(kept, ["z"])
    assert (first.bytes(), first.price()) == (len((kept / "z/zarr.json").read_bytes()), "")
    first.run()
    assert flexcache.verify(kept).sound
    flexcache.Removal(kept, ["resid_post"], [0, 1, 3, 4]).run()
    store = Store(kept)
    assert flexcache.verify(kept).sound
    assert store.spec.keep is None
    assert not any(record.virtual for record in store.ledger)
    content = json.loads((kept / "zarr.json").read_text())["attributes"]["flexcache"]
    assert content["schema"] == 1
    assert "keep" not in content["spec"]
    assert "virtual" not in json.loads((kept / "resid_post/zarr.json").read_text())["attributes"]


def test_a_removal_that_was_stopped_is_finished(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(change: LayerChange) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LayerChange, "_change_records", stopped)
        flexcache.Removal(kept, ["z"], "2:").run()
    assert (kept / NOTE).exists()
    flexcache.Removal(kept, ["resid_post"]).run()
    store = Store(kept)
    assert store.arrays["z"].virtual == (0, 1)
    check_digests(store)


def test_blocks_are_counted_from_the_last_residual_stream_on_disk(made: Path) -> None:
    def mean(store: Store) -> float:
        return mean_blocks(store.arrays.values(), captured_keys(store.arrays.values()))

    assert mean(Store(made / "full.zarr")) == 0
    assert mean(Store(made / "none.zarr")) == 3.5  # 1 to 6 blocks from the token ids


def test_the_footprint_counts_digests_and_no_files_of_virtual_layers(made: Path) -> None:
    for name in ("kept.zarr", "none.zarr"):
        store = Store(made / name)
        batches = len(batch_rows(store, store.n_units // 2, 64))
        expected = footprint(list(store.arrays.values()), store.n_rows, store.shard_rows, batches=batches)
        found = [path for path in store.path.rglob("*") if "runs" not in path.parts or path.name == "runs"]
        assert sum(path.is_file() for path in found) == expected.files
        assert 1 + sum(path.is_dir() for path in found) == expected.folders
        record = (store.path / f"ledger/0/{store.n_units // 2}.json").stat().st_size
        assert abs(expected.ledger_bytes / store.n_units - record) < 40
