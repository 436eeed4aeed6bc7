"""Worker processes of a DataLoader that share no memory with the process that made the stream."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from flexcache import training
from flexcache.store.manage.copy import copy
from tests.analysis.stores import value_store


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_stream_gives_its_rows_with_any_start_method(method: str, tmp_path: Path) -> None:
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


@pytest.mark.usefixtures("s3")
def test_a_loader_over_object_storage_does_not_fork_its_workers(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(1, 30, 6))
    here = value_store(tmp_path / "run.zarr", values, [9, 14, 7], dtype="bfloat16")
    there = copy(here.path, "s3://bucket/loader/run.zarr")
    stream = training.stream(there, "resid_post", 0, batch_size=8)
    found = list(stream.loader(num_workers=1))
    stream.epoch = 0
    for batch, expected in zip(found, stream, strict=True):
        assert torch.equal(batch, expected)
