"""Int8 stores of schema 1 are read, resumed and extended as they are; new ones keep outliers, and have schema 2."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

import flexcache
from tests.golden.make import DOCUMENTS, FOLDER, INT8, fill, make, value

KEYS = [("resid_post", 0), ("resid_post", 1), ("model.norm", None)]


def shards(path: Path) -> dict[str, bytes]:
    files = (file for name, _ in KEYS for file in sorted(path.glob(f"{name}*/c/**/*")) if file.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def schema(path: Path) -> int:
    return int(json.loads((path / "zarr.json").read_text())["attributes"]["flexcache"]["schema"])


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDER / "1-int8.zarr", tmp_path / "1.zarr"))


def rounded(rows: np.ndarray, layer: int | None) -> np.ndarray:
    """Return what a store of schema 1 holds of the rows."""
    exact = value(rows, layer or 0, 4).astype(np.float32)
    scale = np.abs(exact).max(axis=1, keepdims=True) / np.float32(127)
    return np.rint(exact / scale) * scale


@pytest.mark.parametrize("number", [1, 2])
def test_int8_stores_of_both_schemas_are_read(number: int) -> None:
    store = flexcache.open(FOLDER / f"{number}-int8.zarr")
    assert schema(Path(str(store.path))) == number
    assert flexcache.verify(store.path).sound
    rows = np.arange(store.n_rows)
    for site, layer in KEYS:
        exact, found = value(rows, layer or 0, 4), store.read(site, layer)
        assert np.array_equal(store.read(site, layer, rows[::-3]), found[::-3])
        if number == 1:
            assert np.array_equal(found, rounded(rows, layer))
        else:
            largest = np.abs(exact).argmax(axis=1)
            assert np.array_equal(found[rows, largest], exact[rows, largest])
            assert np.abs(found - exact).max() <= 8 / 127 / 2
        assert zarr.open_array(store.path / f"{site}.scale", mode="r").shape[-1] == number


def test_new_int8_stores_are_written_as_they_were(tmp_path: Path) -> None:
    make("int8", tmp_path / "now.zarr")
    assert shards(tmp_path / "now.zarr") == shards(FOLDER / "2-int8.zarr")


def test_an_unfinished_store_of_schema_1_is_finished_in_schema_1(earlier: Path) -> None:
    before = shards(earlier)
    (earlier / "ledger" / "0" / "0.json").unlink()
    for name in before:
        (earlier / name).unlink()
    fill(earlier, DOCUMENTS, **INT8, extend=False)
    assert shards(earlier) == before
    assert schema(earlier) == 1


def test_a_store_of_schema_1_is_extended_and_copied_in_schema_1(earlier: Path, tmp_path: Path) -> None:
    more = [{**document, "id": f"e{i}"} for i, document in enumerate(DOCUMENTS)]
    fill(earlier, more, **INT8)
    grown = flexcache.open(earlier)
    assert grown.n_rows == 2 * flexcache.open(FOLDER / "1-int8.zarr").n_rows
    copied = flexcache.copy(earlier, tmp_path / "copy.zarr", compression="zstd")
    for store in (grown, copied):
        assert schema(Path(str(store.path))) == 1
        for site, layer in KEYS:
            assert np.array_equal(store.read(site, layer), rounded(np.arange(store.n_rows), layer))
    wide = flexcache.copy(earlier, tmp_path / "wide.zarr", dtype="float32")
    assert schema(Path(str(flexcache.copy(wide.path, tmp_path / "new.zarr", dtype="int8").path))) == 2
