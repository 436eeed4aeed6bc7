"""Read shards of the writer with the installed zarr-python, through each of its codec pipelines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr
import zarr.core.codec_pipeline

from flexcache.array_spec import DTYPES
from flexcache.store.format.bfloat16 import BFloat16
from tests.analysis.stores import value_store

LENGTHS = [40, 7, 64, 1, 33, 90, 12, 55] * 5
PIPELINES = [
    f"zarr.core.codec_pipeline.{name}"
    for name in ("BatchedCodecPipeline", "FusedCodecPipeline")
    if hasattr(zarr.core.codec_pipeline, name)
]


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_codec_pipeline_of_zarr_reads_the_written_bits(
    dtype: str, compression: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "flexcache.store.format.shard.INNER_CHUNK_BYTES", 512
    )  # several inner chunks per shard, the last one partial
    values = np.random.default_rng(0).normal(size=(2, sum(LENGTHS), 20))
    store = value_store(tmp_path / "run.zarr", values, LENGTHS, dtype=dtype, compression=compression)
    stored, unsigned = DTYPES[dtype], f"u{DTYPES[dtype].itemsize}"
    expected = np.stack([store.read("resid_post", layer, raw=True) for layer in (0, 1)]).view(unsigned)
    chosen = np.random.default_rng(1).integers(0, store.n_rows, 40)
    assert store.n_units > 1
    for pipeline in PIPELINES:
        with zarr.config.set({"codec_pipeline.path": pipeline}):
            array = zarr.open_array(store.path / "resid_post", mode="r")
            assert array.dtype == stored
            assert array.chunks[1] < array.shards[1] < store.n_rows
            assert np.array_equal(array[:].view(unsigned), expected)
            assert np.array_equal(array[1, 5:150:3].view(unsigned), expected[1, 5:150:3])
            assert np.array_equal(array.oindex[1, chosen].view(unsigned), expected[1, chosen])


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_zarr_writes_and_reads_back_every_bfloat16_value(pipeline: str, tmp_path: Path) -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    bits = bits[~np.isnan(bits.view(DTYPES["bfloat16"]).astype(np.float32))]
    with zarr.config.set({"codec_pipeline.path": pipeline}):
        array = zarr.create_array(
            tmp_path / "a.zarr", shape=bits.shape, dtype=BFloat16(), chunks=(1000,), shards=(8000,), fill_value=0
        )
        array[:] = bits.view(DTYPES["bfloat16"])
        assert np.array_equal(zarr.open_array(tmp_path / "a.zarr", mode="r")[:].view(np.uint16), bits)
