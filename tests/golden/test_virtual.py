"""The store with virtual layers that schema 3 began with is read, and is what is written today."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import xxhash
import zarr

import flexcache
from flexcache.errors import SiteError
from flexcache.recording.forward.batch_reader import BatchReader
from flexcache.store.format.schema import VIRTUAL_SCHEMA
from tests.golden.make import FOLDER, VIRTUAL, make_virtual, value

GOLDEN = FOLDER / f"{VIRTUAL_SCHEMA}-virtual.zarr"


def test_layers_on_disk_are_read_and_virtual_ones_have_the_digests_of_their_rows() -> None:
    store = flexcache.open(GOLDEN)
    found = flexcache.verify(GOLDEN)
    assert found.sound
    assert found.virtual == store.n_units * 4
    reader = BatchReader(store.path)
    for layer in (0, 2):
        assert np.array_equal(store.read("resid_post", layer), value(np.arange(store.n_rows), layer, 4))
    for record in store.ledger:
        batches = reader.read_unit(record.unit, record.batch_tokens)
        for site, layer in [("resid_post", 1), *(("mlp_post", layer) for layer in range(3))]:
            rows = [value(np.arange(b.rows.start, b.rows.stop), layer, VIRTUAL[site][1]) for b in batches]
            expected = [xxhash.xxh3_128_hexdigest(one.astype(ml_dtypes.bfloat16).tobytes()) for one in rows]
            assert list(record.virtual[f"{site}/c/{layer}/{record.unit}/0"]) == expected
            with pytest.raises(SiteError, match="virtual"):
                store.read(site, layer)
    assert np.isnan(np.asarray(zarr.open_array(GOLDEN / "mlp_post", mode="r")[:], np.float32)).all()


def test_what_is_written_today_is_what_was_written(tmp_path: Path) -> None:
    make_virtual(tmp_path / "now.zarr")
    for path in sorted(GOLDEN.rglob("*")):
        name = path.relative_to(GOLDEN)
        if path.is_file() and (name.parts[:2] == ("ledger", "0") or "c" in name.parts):
            assert (tmp_path / "now.zarr" / name).read_bytes() == path.read_bytes(), name
    described = [
        json.loads((folder / "zarr.json").read_text())["attributes"]["flexcache"]
        for folder in (GOLDEN, tmp_path / "now.zarr")
    ]
    for part in ("schema", "spec", "arrays", "plan"):
        assert described[0][part] == described[1][part]
