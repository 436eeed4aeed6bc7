"""Size and error of codecs on stores with known errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import flexcache
from analysis.statistics import codecs
from analysis.statistics.codecs import compare
from flexcache.errors import AnalysisError, UncommittedError
from flexcache.store.manage.copy import copy
from tests.corpora import build_store, open_recorder, token_documents
from tests.pipelines.test_cli import run


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> flexcache.Store:
    return build_store(tmp_path_factory.mktemp("codecs") / "run.zarr", dtype="float32")


def test_error_and_size_equal_those_of_an_explicit_copy(store: flexcache.Store, tmp_path: Path) -> None:
    results = {result.codec: result for result in compare(store, sample_bytes=1 << 30, rounds=1, progress=False)}
    assert next(iter(results)) == "float32"
    assert results["float32"].size == results["float32"].write == results["float32"].read == 1
    for codec in ("float32", "float32 + zstd"):
        assert results[codec].mean == 0
    assert results["float32 + zstd"].size < 1
    assert results["bfloat16"].size == results["float16"].size == 0.5
    wide, narrow = 24 * 2 + 6, 24 * 2 + 6 + 8 * 3  # of three layers: bytes of int8, of the scales and one outlier
    assert results["int8"].size == pytest.approx(narrow / (4 * wide), rel=0.01)
    for codec, dtype in (("bfloat16", "bfloat16"), ("float16", "float16"), ("int8", "int8"), ("int8 + zstd", "int8")):
        other = copy(store.path, tmp_path / f"{codec}.zarr", dtype=dtype)
        for loss in results[codec].losses:
            exact, found = store.read(loss.site, loss.layer), other.read(loss.site, loss.layer)
            apart = np.linalg.norm(exact - found, axis=1) / np.linalg.norm(exact, axis=1)
            assert loss.largest <= apart.max() * 1.001, "the sample is one unit"
            assert loss.mean == pytest.approx(apart.mean(), rel=0.3)
            assert loss.cosine <= 1
    assert results["int8"].worst.mean > results["bfloat16"].worst.mean > results["float16"].worst.mean


def massive_store(path: Path) -> flexcache.Store:
    """Return a store with two massive dims at every position and one more at some."""
    rows = np.random.default_rng(0).normal(size=(100, 256)).astype(np.float32)
    rows[:, 9] += 500
    rows[:, 200] -= 900
    with open_recorder(path, token_documents([5] * 20), sites={"x": 256}, dtype="float32") as recorder:
        for batch in recorder.batches():
            recorder.put("x", rows[batch.rows.start : batch.rows.stop], rows=batch.rows)
    return flexcache.open(path)


def test_the_error_is_stated_with_the_largest_dims_and_without_them(tmp_path: Path) -> None:
    store = massive_store(tmp_path / "run.zarr")
    results = {result.codec: result for result in compare(store, sample_bytes=1 << 30, rounds=1, progress=False)}
    other = copy(store.path, tmp_path / "int8.zarr", dtype="int8")
    exact, found = store.read("x"), other.read("x")
    rest = np.delete(np.arange(256), [9, 200])
    expected = [
        float((np.linalg.norm((exact - found)[:, dims], axis=1) / np.linalg.norm(exact[:, dims], axis=1)).mean())
        for dims in (slice(None), rest)
    ]
    assert results["int8"].mean == pytest.approx(expected[0], rel=0.03), "the sample is one unit"
    assert results["int8"].others == pytest.approx(expected[1], rel=0.03)
    assert results["int8"].mean < 2e-4 < results["int8"].others < 0.01
    estimated = codecs.estimate_losses(other)[0]
    assert estimated.mean == pytest.approx(expected[0], rel=0.05)
    assert estimated.others == pytest.approx(expected[1], rel=0.05)
    card = (tmp_path / "int8.zarr" / "README.md").read_text()
    assert "2 of 256 in `x`" in card
    assert "flexcache bench-codec int8.zarr" in card


def test_the_error_of_a_stored_int8_store_is_estimated_by_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = massive_store(tmp_path / "run.zarr")
    coarse = copy(store.path, tmp_path / "int8.zarr", dtype="int8")
    text = run(capsys, "bench-codec", coarse.path, "-o", tmp_path / "out.json", "-q")
    assert "estimated from its scales" in " ".join(text.split())
    assert json.loads((tmp_path / "out.json").read_text())[0]["others"] < 0.01
    with pytest.raises(AnalysisError, match="int8 already"):
        compare(coarse)


def test_an_overflow_is_an_infinite_error(tmp_path: Path) -> None:
    with open_recorder(tmp_path / "run.zarr", token_documents([5] * 20), sites={"x": 4}, dtype="bfloat16") as recorder:
        for batch in recorder.batches():
            recorder.put("x", np.full((len(batch.rows), 4), 1e6, np.float32), rows=batch.rows)
    results = {
        result.codec: result for result in compare(flexcache.open(tmp_path / "run.zarr"), rounds=1, progress=False)
    }
    assert results["float16"].mean == float("inf")
    assert results["int8"].mean < 1e-6
    assert "float32" not in results


def test_a_store_without_committed_units_is_refused(tmp_path: Path) -> None:
    open_recorder(tmp_path / "run.zarr", token_documents([5] * 20))
    with pytest.raises(UncommittedError):
        compare(flexcache.open(tmp_path / "run.zarr"))


def test_the_command(store: flexcache.Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "bench-codec", store.path, "--layers", "3", "-o", tmp_path / "out.json", "-q")
    assert "int8 by layer" in text
    found = json.loads((tmp_path / "out.json").read_text())
    assert {loss["layer"] for loss in found[0]["losses"]} == {3, None}
    assert "did you mean resid_post" in run(capsys, "bench-codec", store.path, "--site", "resid_pots", status=1)


def test_a_cosine_of_equal_rows_is_one_in_double() -> None:
    rows = np.random.default_rng(0).normal(50, 1, (64, 4096)).astype(np.float32)
    assert codecs.measure_loss("float32", 0, rows, rows).cosine == pytest.approx(1, abs=1e-14)
