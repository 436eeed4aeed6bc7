"""Worker processes open stores on object storage themselves."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from flexcache.store.manage.copy import copy
from tests.corpora import build_store, lengths, token_documents

DOCUMENTS = token_documents(lengths(30))


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_lazy_array_on_object_storage_pickles_as_its_url(compression: str, base: str, tmp_path: Path) -> None:
    here = build_store(tmp_path / "run.zarr", DOCUMENTS, compression=compression)
    there = copy(here.path, f"{base}/run.zarr")
    lazy = pickle.dumps((there["resid_post"], there))
    assert len(lazy) < 5000
    array, store = pickle.loads(lazy)
    assert array.identical(here["resid_post"])
    assert store.documents.equals(here.documents)
    assert np.array_equal(store.read("resid_post", 3, [9, 2]), here.read("resid_post", 3, [9, 2]))


@pytest.mark.usefixtures("s3")
def test_a_dask_process_reads_a_store_on_s3(tmp_path: Path) -> None:
    here = build_store(tmp_path / "run.zarr", DOCUMENTS)
    there = copy(here.path, "s3://bucket/workers/run.zarr")
    found = there["resid_post"].compute(scheduler="processes", num_workers=1)
    assert np.array_equal(found, here["resid_post"])
