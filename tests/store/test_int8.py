"""Int8 rows with scales are written, read, copied, extended and analysed like others, within their error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import flexcache
from flexcache.errors import DamagedError, RangeError
from flexcache.store.format.int8 import dequantize, quantize
from flexcache.store.manage.copy import copy
from flexcache.store.manage.merge import merge
from flexcache.store.manage.remove import Removal
from flexcache.training import stream
from tests.corpora import expected_rows, lengths, open_recorder, token_documents
from tests.models import VOCABULARY, tiny
from tests.recording.test_recorder import shard_hashes
from tests.store.test_extension import NEW, OLD, fill


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> flexcache.Store:
    path = tmp_path_factory.mktemp("int8") / "run.zarr"
    fill(open_recorder(path, OLD, dtype="int8"))
    return flexcache.open(path)


def within(found: np.ndarray, exact: np.ndarray, outliers: int = 1) -> bool:
    """Return True if the largest values are exact, and every other one is within half a quantization step."""
    kept = np.zeros(exact.shape, bool)
    np.put_along_axis(kept, np.argsort(-np.abs(exact), axis=1, kind="stable")[:, :outliers], True, axis=1)
    step = np.where(kept, 0, np.abs(exact)).max(axis=1, keepdims=True) / 127
    allowed = np.where(kept, 0, step * (0.5 + 1e-5) + 2e-43)
    return bool((np.abs(found - exact) <= allowed).all())


@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    ),
    st.integers(0, 9),
)
@example(np.array([[3.3762391e38, 3.3762391e38]], np.float32), 1)
def test_the_error_of_a_value_is_at_most_half_a_step(rows: np.ndarray, outliers: int) -> None:
    outliers = min(outliers, rows.shape[1])
    values, scales = quantize(rows, outliers)
    assert values.dtype == np.int8
    assert scales.shape == (len(rows), 1 + outliers)
    assert ((values == -128).sum(axis=1) == outliers).all()
    assert within(dequantize(values.astype(np.float32), scales), rows, outliers)


def test_an_outlier_that_its_scale_cannot_divide_is_kept() -> None:
    rows = np.float32([[0.5, 3e38, -0.25]])
    values, scales = quantize(rows, 1)
    assert values.tolist() == [[127, -128, -64]]
    assert dequantize(values.astype(np.float32), scales)[0, 1] == np.float32(3e38)


def test_a_row_without_its_outliers_is_reported_as_damaged() -> None:
    with pytest.raises(DamagedError, match="outliers of its scales"):
        dequantize(np.zeros((2, 4), np.float32), np.ones((2, 2), np.float32))


def test_massive_dims_at_every_position_do_not_coarsen_the_other_values() -> None:
    rows = np.random.default_rng(0).normal(size=(200, 640)).astype(np.float32)
    rows[:, [7, 300]] += 800
    others = np.delete(np.arange(640), [7, 300])
    plain, apart = (
        dequantize(values.astype(np.float32), scales) for values, scales in (quantize(rows, 0), quantize(rows, 5))
    )
    exact = rows[:, others]

    def error(found: np.ndarray) -> float:
        return float((np.linalg.norm(found[:, others] - exact, axis=1) / np.linalg.norm(exact, axis=1)).mean())

    assert error(plain) > 0.5
    assert error(apart) < 0.01
    assert np.array_equal(apart[:, [7, 300]], rows[:, [7, 300]])


def test_int8_rows_read_as_written_within_the_error_bound(store: flexcache.Store) -> None:
    assert store.sites == ("resid_post", "model.embed")
    assert flexcache.verify(store.path).sound
    rows = np.random.default_rng(0).integers(0, store.n_rows, 50)
    for layer in (0, 3):
        exact = expected_rows(store, layer, 24)
        found = store.read("resid_post", layer)
        values, scales = quantize(exact, 1)
        assert np.array_equal(found, dequantize(values.astype(np.float32), scales))
        assert within(found, exact)
        assert np.array_equal(store.read("resid_post", layer, rows), found[rows])
        assert np.array_equal(store.read("resid_post", layer, rows, raw=True), values[rows])
        assert np.array_equal(store["resid_post"].sel(layer=layer).values, found)
        assert np.array_equal(np.concatenate([v.copy() for _, v in store.scan("resid_post", layer)]), found)
        foreign = zarr.open_group(store.path, mode="r")
        integers, scale = np.asarray(foreign["resid_post"][layer]), np.asarray(foreign["resid_post.scale"][layer])
        product = np.where(integers == -128, scale[:, 1:], integers.astype(np.float32) * scale[:, :1])
        assert np.array_equal(product, found)
    with xr.open_zarr(store.path) as opened:
        assert np.isnan(opened["resid_post.scale"][1].values).all(), "a layer that is not there has no scale"
    assert "int8" in repr(store)
    assert ".scale" not in repr(store)
    assert not store.replayable
    assert "int8" in store.replayable.reasons


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_store_is_copied_to_int8_and_back(store: flexcache.Store, compression: str, tmp_path: Path) -> None:
    again = copy(store.path, tmp_path / "again.zarr", compression=compression)
    wide = copy(again.path, tmp_path / "wide.zarr", dtype="float32", compression="none")
    assert wide.spec.dtype == "float32"
    assert tuple(wide.arrays) == ("resid_post", "model.embed")
    back = copy(wide.path, tmp_path / "back.zarr", dtype="int8")
    for name, layer in (("resid_post", 3), ("model.embed", None)):
        assert np.array_equal(wide.read(name, layer), store.read(name, layer))
        assert np.array_equal(back.read(name, layer, raw=True), store.read(name, layer, raw=True))
    for one in (again, wide, back):
        assert flexcache.verify(one.path).sound
        assert one.complete
    part = copy(store.path, tmp_path / "part.zarr", sites=["resid_*"], layers=[3])
    rest = copy(store.path, tmp_path / "rest.zarr", sites=["resid_post"], layers=[0])
    both = merge([rest.path, part.path], tmp_path / "both.zarr")
    assert np.array_equal(both.read("resid_post", 0), store.read("resid_post", 0))
    Removal(again.path, ["resid_post"]).run()
    left = flexcache.open(again.path)
    assert tuple(left.arrays) == ("model.embed", "model.embed.scale")
    assert not (again.path / "resid_post.scale").exists()


def test_an_int8_store_is_extended_and_resumed(store: flexcache.Store, tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    recorder = open_recorder(path, OLD, dtype="int8")
    with recorder:
        for batch in recorder.batches():
            if batch.unit:
                break
            for name, layer in recorder.keys:
                exact = expected_rows(store, layer or 0, recorder.store.arrays[name].features)
                recorder.put(name, exact[batch.rows.start : batch.rows.stop], rows=batch.rows, layer=layer)
    fill(open_recorder(path, OLD, dtype="int8"))
    assert shard_hashes(path) == shard_hashes(store.path)
    fill(open_recorder(path, NEW, dtype="int8", extend=True))
    fill(open_recorder(path, OLD, dtype="int8", extend=True, layers=[0, 1, 3]))
    grown = flexcache.open(path)
    assert flexcache.verify(path).sound
    assert within(grown.read("resid_post", 1), expected_rows(grown, 1, 24))
    assert np.array_equal(grown.read("resid_post", 3, slice(store.n_rows)), store.read("resid_post", 3))


def test_capture_recompute_and_stream(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model, documents = tiny("llama"), token_documents(lengths(60, longest=30), vocabulary=VOCABULARY)
    options: dict[str, Any] = {"layers": [1, 2], "batch_tokens": 128, "progress": False}
    exact = flexcache.capture(model, None, documents, tmp_path / "exact.zarr", dtype="float32", **options)
    for rows in ("all", "mean"):
        path = tmp_path / f"{rows}.zarr"
        coarse = flexcache.capture(model, None, documents, path, dtype="int8", rows=rows, **options)
        assert all(item.equal for item in flexcache.recompute(model, path, units=100))
        if rows == "all":
            assert within(coarse.read("resid_post", 2), exact.read("resid_post", 2))
            seen = torch.cat([batch.clone() for batch in stream(coarse, "resid_post", 2, batch_size=64)])
            assert seen.dtype == torch.float32
            expected = coarse.read("resid_post", 2)
            assert np.array_equal(np.sort(seen.numpy(), axis=0), np.sort(expected, axis=0))


def test_a_nonfinite_value_or_a_missing_scale_array_raises_an_error(store: flexcache.Store, tmp_path: Path) -> None:
    recorder = open_recorder(tmp_path / "nan.zarr", OLD, dtype="int8")
    with pytest.raises(RangeError, match="not finite"), recorder:
        for batch in recorder.batches():
            recorder.put("resid_post", np.full((len(batch.rows), 24), np.nan), rows=batch.rows, layer=0)
    path = copy(store.path, tmp_path / "copy.zarr").path
    content = (path / "zarr.json").read_text().replace('"resid_post.scale": {', '"other": {')
    (path / "zarr.json").write_text(content)
    with pytest.raises(DamagedError):
        flexcache.open(path)
