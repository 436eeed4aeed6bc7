"""Stores that every version so far has written are read by this one, and a newer schema is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr

import flexcache
from flexcache.errors import VersionError
from flexcache.store.format.schema import NEWEST_SCHEMA, SCHEMA
from tests.golden.make import DOCUMENTS, FOLDER, KINDS, make, value

APART = ("int8.zarr", "virtual.zarr")
"""Stores that have tests of their own."""
STORES = sorted(path.name for path in FOLDER.glob("*.zarr") if path.name[2:] not in APART)


def test_there_is_one_of_each_kind_and_schema() -> None:
    assert {f"{SCHEMA}-{kind}.zarr" for kind in KINDS} <= set(STORES)


@pytest.mark.parametrize("name", STORES)
def test_it_is_read_as_it_was_written(name: str) -> None:
    store = flexcache.open(FOLDER / name)
    kind = KINDS[name.split("-", 1)[1].removesuffix(".zarr")]
    assert store.complete
    assert flexcache.verify(store.path).sound
    assert sorted(store.documents["id"].to_pylist()) == sorted(d["id"] for d in DOCUMENTS)
    labels = dict(zip(store.documents["id"].to_pylist(), store.documents["label"].to_pylist()))
    assert labels == {d["id"]: d["label"] for d in DOCUMENTS}
    rows = np.arange(store.n_rows)
    for site, shape in kind["sites"].items():
        stacked = not isinstance(shape, int)
        for layer in kind.get("layers", range(shape[0])) if stacked else [None]:
            expected = value(rows, layer or 0, shape[1] if stacked else shape)
            assert np.array_equal(store.read(site, layer), expected)
            assert np.array_equal(store.read(site, layer, rows[::-3]), expected[::-3])
            lazy = store[site].sel(layer=layer) if stacked else store[site]
            assert np.array_equal(np.asarray(lazy), expected)
            foreign = zarr.open_array(store.path / site, mode="r")
            found = np.asarray(foreign[layer] if stacked else foreign[:]).astype(np.float32)
            assert np.array_equal(found, expected)
    if kind.get("rows", "all") == "all":
        tokens = {d["id"]: d["tokens"] for d in DOCUMENTS}
        for document, ids in tokens.items():
            held = store.rows(document=document)
            assert np.asarray(store.coordinates["token_id"].values)[held].tolist() == ids
    with xr.open_zarr(store.path, consolidated=True) as opened:
        assert set(kind["sites"]) <= set(opened)


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_is_written_today_is_what_was_written(kind: str, tmp_path: Path) -> None:
    """Byte for byte, but for the versions that made it: the format has not drifted without a new schema."""
    make(kind, tmp_path / "now.zarr")
    for path in sorted((FOLDER / f"{SCHEMA}-{kind}.zarr").rglob("*")):
        name = path.relative_to(FOLDER / f"{SCHEMA}-{kind}.zarr")
        if path.is_file() and (name.parts[0] in KINDS[kind]["sites"] and "c" in name.parts):
            assert (tmp_path / "now.zarr" / name).read_bytes() == path.read_bytes(), str(name)


def test_a_newer_schema_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "new.zarr"
    shutil.copytree(FOLDER / f"{SCHEMA}-plain.zarr", path)
    content = json.loads((path / "zarr.json").read_text())
    content["attributes"]["flexcache"]["schema"] = NEWEST_SCHEMA + 1
    (path / "zarr.json").write_text(json.dumps(content))
    with pytest.raises(VersionError, match="newer version of FlexCache") as refused:
        flexcache.open(path)
    assert f"schema {NEWEST_SCHEMA + 1}" in str(refused.value)
