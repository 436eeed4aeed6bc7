"""Worker processes of a DataLoader that do not share memory with the process that made the stream."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from flexcache import training
from tests.analysis.stores import value_store


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_stream_gives_its_rows_whatever_the_start_method(method: str, tmp_path: Path) -> None:
    lengths = [9, 14, 20, 6, 11]
    values = np.random.default_rng(0).normal(size=(2, sum(lengths), 6))
    store = value_store(tmp_path / "run.zarr", values, lengths, dtype="bfloat16")
    scale = 2.0
    stream = training.stream(
        store, "resid_post", 1, batch_size=8, normalize="standard", transform=lambda batch: batch * scale
    )
    far = list(stream.loader(num_workers=1, multiprocessing_context=method))
    stream.epoch = 0
    here = list(stream)
    assert len(far) == len(here) == len(stream)
    for found, expected in zip(far, here, strict=True):
        assert torch.equal(found, expected)
