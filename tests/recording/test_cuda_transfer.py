"""Test on a CPU which rows a GPU would transfer, and when a buffer is free again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flexcache.recording.forward.batch import Batch
from flexcache.recording.forward.batch_reader import BatchReader
from flexcache.recording.run.cuda_transfer import CudaTransfer, kept_index, select_rows
from flexcache.store.write.slabs import Slab, SlabPool
from tests.corpora import lengths, open_recorder, token_documents

DOCUMENTS = token_documents(lengths(30))


def batches(path: Path, **options: Any) -> list[Batch]:
    open_recorder(path, DOCUMENTS, **options)
    return list(BatchReader(path).read_unit(0))


@pytest.mark.parametrize("rows", ["all", "last", "mean"])
def test_rows_are_chosen_on_the_device_as_on_the_host(rows: str, tmp_path: Path) -> None:
    for batch in batches(tmp_path / "run.zarr", rows=rows):
        wide = torch.randn(*batch.shape, 40)
        for values in (wide[..., :24], wide[..., :24].transpose(0, 1).contiguous().transpose(0, 1)):
            found = select_rows(batch, values, kept_index(batch))
            assert np.allclose(found.numpy(), batch.kept(values), rtol=1e-6, atol=1e-6)
            assert batch.mean or np.array_equal(found.numpy(), batch.kept(values))


def test_rows_with_gaps_are_chosen_in_their_order(tmp_path: Path) -> None:
    from dataclasses import replace

    batch = batches(tmp_path / "run.zarr")[0]
    sequences = tuple(
        replace(one, kept_positions=np.arange(0, len(one.tokens), 2) if line % 2 else one.kept_positions)
        for line, one in enumerate(batch.sequences)
    )
    gaps = replace(batch, sequences=sequences)
    values = torch.randn(*batch.shape, 6)
    assert np.array_equal(select_rows(gaps, values, kept_index(gaps)).numpy(), gaps.kept(values))


def test_values_that_are_on_the_host_are_taken_as_from_a_cpu(tmp_path: Path) -> None:
    batch = batches(tmp_path / "run.zarr")[0]
    values = torch.randn(*batch.shape, 6)
    transfer = CudaTransfer()
    for given in (values, values.numpy()):
        content, spans = transfer.rows_of(batch, given, np.dtype(np.float32))[0]
        rows = np.concatenate([content[start : start + count] for start, count in spans]).view(np.float32)
        assert np.array_equal(rows.reshape(-1, 6), batch.kept(values))


def test_a_slab_is_free_only_after_the_copies_into_it() -> None:
    class Fence:
        waited = False

        def synchronize(self) -> None:
            Fence.waited = True

    pool = SlabPool(4096, 1)
    slab: Slab = pool.take_slab()
    slab.fences.append(Fence())
    pool.return_slab(slab)
    assert Fence.waited
    assert not slab.fences
