from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import flexcache
from flexcache.errors import ConfigError, DamagedError, MismatchError, StoreError
from flexcache.store.manage.copy import copy
from flexcache.store.manage.merge import merge
from flexcache.store.manage.row_copy import RowCopy
from tests.corpora import build_store, lengths, token_documents
from tests.recording.test_recorder import shard_hashes
from tests.store.test_copy import partial_store

LAYERS = [0, 1, 3, 4]


@pytest.fixture(scope="module", params=["none", "zstd"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> flexcache.Store:
    path = tmp_path_factory.mktemp("source") / "run.zarr"
    return build_store(path, token_documents(lengths(200)), layers=LAYERS, compression=request.param)


@settings(max_examples=7)
@given(data=st.data())
def test_merging_the_parts_of_a_store_gives_the_store(
    whole: flexcache.Store, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """The parts may overlap and come in any order."""
    folder = tmp_path_factory.mktemp("parts")
    keys = [*LAYERS, None]
    count = data.draw(st.integers(2, 3))
    owners = [data.draw(st.sets(st.integers(0, count - 1), min_size=1)) for _ in keys]
    parts = []
    for part in range(count):
        mine = [key for key, owner in zip(keys, owners, strict=True) if part in owner]
        layers = [key for key in mine if key is not None]
        sites = [*(["resid_post"] if layers else []), *(["model.embed"] if None in mine else [])]
        if sites:
            parts.append(copy(whole.path, folder / f"{part}.zarr", sites=sites, layers=layers or "all").path)
    if len(parts) < 2:
        parts.append(whole.path)
    merged = merge(data.draw(st.permutations(parts)), folder / "merged.zarr")
    assert merged.complete
    assert shard_hashes(merged.path) == shard_hashes(whole.path)
    assert [*merged.ledger] == [*whole.ledger]
    assert merged.arrays == whole.arrays
    assert merged.spec == whole.spec.model_copy(update={"sites": merged.spec.sites})
    assert merged.spec.sites.keys() == whole.spec.sites.keys()
    assert flexcache.verify(merged.path).sound
    for layer in LAYERS:
        assert np.array_equal(merged.read("resid_post", layer), whole.read("resid_post", layer))
    with xr.open_zarr(merged.path) as dataset:
        assert dataset["resid_post"].attrs["layers"] == LAYERS
    assert len(merged.provenance.history[-1]["merged_from"]) == len(parts)
    shutil.rmtree(folder)


def test_separate_captures_are_merged_and_the_capture_resumes(tmp_path: Path) -> None:
    documents = token_documents(lengths(260))
    first = partial_store(tmp_path / "first.zarr", 3)
    second = build_store(
        tmp_path / "second.zarr", documents, dtype="bfloat16", layers=[1], fingerprint={"device": "another"}
    )
    merged = merge([first.path, second.path], tmp_path / "merged.zarr")
    assert merged.committed_units.tolist() == [0, 1, 2]
    assert merged.layers("resid_post") == (0, 1, 3)
    assert merged.spec.sites["resid_post"] == [0, 1, 3]
    assert merged.ledger.read_record(0).fingerprint == {"merged": [{}, {"device": "another"}]}
    assert flexcache.verify(merged.path).sound
    build_store(first.path, documents, dtype="bfloat16")
    merged = merge([first.path, second.path], tmp_path / "merged.zarr")
    assert merged.complete
    assert np.array_equal(merged.read("resid_post", 1), second.read("resid_post", 1))
    assert np.array_equal(merged.read("resid_post", 3), flexcache.open(first.path).read("resid_post", 3))


def test_an_interrupted_merge_resumes(whole: flexcache.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [copy(whole.path, tmp_path / f"{layer}.zarr", layers=[layer]).path for layer in LAYERS]
    bring, left = RowCopy._copy_unit, 2

    def dies(self: RowCopy, unit: int, *arguments: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        bring(self, unit, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(RowCopy, "_copy_unit", dies)
        with pytest.raises(KeyboardInterrupt):
            merge(parts, tmp_path / "merged.zarr")
    assert len(flexcache.open(tmp_path / "merged.zarr").committed_units) == 2
    assert flexcache.verify(tmp_path / "merged.zarr").sound
    assert shard_hashes(merge(parts, tmp_path / "merged.zarr").path) == shard_hashes(whole.path)


# Errors


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"documents": token_documents(lengths(200, seed=5))}, "documents.parquet differs"),
        ({"documents": token_documents(lengths(200), seed=5)}, "plan.corpus_xxh3_128"),
        ({"sites": {"resid_post": (5, 24), "model.embed": 4096}}, "4096 feature_model.embed"),
        ({"documents": token_documents([300] * 20)}, "plan.shard_rows"),
        ({"rows": "last"}, "spec.rows"),
        ({"seed": 7}, "spec.seed"),
        ({"model": {"name": "x", "class": "another"}}, "model.class"),
        ({"compression": "zstd"}, "spec.compression"),
        ({"dtype": "float32"}, "array resid_post"),
        ({"sites": {"resid_post": (6, 24), "model.embed": 6}}, "6 layers of 24"),
    ],
    ids=str,
)
def test_merging_different_stores_raises_an_error_that_lists_the_differences(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    documents = token_documents(lengths(200))
    build_store(tmp_path / "a.zarr", documents, layers=[0])
    options = {"layers": [1], **change}
    build_store(tmp_path / "b.zarr", options.pop("documents", documents), **options)
    with pytest.raises(MismatchError, match="cannot be merged") as raised:
        merge([tmp_path / "a.zarr", tmp_path / "b.zarr"], tmp_path / "c.zarr")
    assert words in str(raised.value)
    assert not (tmp_path / "c.zarr").exists()


def test_merging_two_versions_of_one_layer_raises_an_error(tmp_path: Path) -> None:
    store = build_store(tmp_path / "a.zarr", token_documents(lengths(200)))
    with flexcache.record(
        tmp_path / "b.zarr",
        token_documents(lengths(200)),
        sites={"resid_post": (5, 24)},
        layers=[3],
        model="arithmetic",
        batch_tokens=128,
    ) as recorder:
        for batch in recorder.batches():
            recorder.put("resid_post", np.zeros((len(batch.rows), 24), np.float32), rows=batch.rows, layer=3)
    with pytest.raises(MismatchError, match="has other bytes"):
        merge([store.path, tmp_path / "b.zarr"], tmp_path / "c.zarr")


def test_a_merge_with_an_invalid_target_or_a_damaged_source_raises_an_error(
    whole: flexcache.Store, tmp_path: Path
) -> None:
    part = copy(whole.path, tmp_path / "part.zarr", sites=["model.embed"])
    other = copy(whole.path, tmp_path / "other.zarr", sites=["resid_post"])
    with pytest.raises(ConfigError, match="two stores or more"):
        merge([part.path], tmp_path / "c.zarr")
    with pytest.raises(StoreError, match="inside the other"):
        merge([part.path, other.path], other.path)
    merge([part.path, other.path], tmp_path / "c.zarr")
    with pytest.raises(MismatchError, match="another store"):
        merge([part.path, copy(whole.path, tmp_path / "x.zarr", sites=["r*"], layers=0).path], tmp_path / "c.zarr")
    shard = other.path / "resid_post/c/3/1/0"
    shard.write_bytes(b"?" + shard.read_bytes()[1:])
    with pytest.raises(DamagedError, match="other bytes than were written"):
        merge([part.path, other.path], tmp_path / "d.zarr")
