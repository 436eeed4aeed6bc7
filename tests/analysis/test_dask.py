"""The Dask page runs as printed on two worker processes, which compute the same results as threads."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import flexcache
from analysis import probes, survey
from analysis.dataset import probe_dataset, targets
from analysis.statistics import geometry, moments, quantiles
from flexcache.errors import DamagedError, StoreError, UncommittedError
from tests.corpora import build_store, lengths, open_recorder, token_documents

pytest.importorskip("distributed")

PAGE = Path(__file__).parents[2] / "docs" / "dask.md"
DOCUMENTS = token_documents(lengths(60))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Yield the variables of the code of the page; its last block, which closes the cluster, runs at the end."""
    folder, before = tmp_path_factory.mktemp("dask"), Path.cwd()
    build_store(folder / "run.zarr", DOCUMENTS, dtype="bfloat16")
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"__name__": "__main__"}
    os.chdir(folder)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Consolidated metadata is currently not part")
            for block in blocks[:-1]:
                exec(compile(block, str(PAGE), "exec"), names)
        yield names
        exec(compile(blocks[-1], str(PAGE), "exec"), names)
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def store(page: dict[str, Any]) -> flexcache.Store:
    found: flexcache.Store = page["store"]
    return found


def test_the_page_computes_on_two_processes_what_threads_compute(page: dict[str, Any], store: flexcache.Store) -> None:
    workers = page["client"].run(os.getpid)
    assert len({os.getpid(), *workers.values()}) == 3
    assert page["client"].scheduler.address.startswith("tcp://")
    lazy = store["resid_post"]
    assert page["mean"].identical(lazy.mean("token").compute(scheduler="threads"))
    last = lazy.isel(layer=-1)
    expected = last.groupby("document").mean().compute(scheduler="threads")
    assert page["by_document"].identical(expected)
    for number, rows in enumerate(np.split(store.read("resid_post", 3), store.documents["row_start"].to_numpy()[1:])):
        np.testing.assert_allclose(page["by_document"][number], rows.mean(0), rtol=1e-5)
    np.testing.assert_allclose(page["norms"], np.linalg.norm(store.read("resid_post", 3), axis=1), rtol=1e-5)
    assert page["far"].identical(store.dataset().mean("token").compute(scheduler="threads"))
    here = moments.compute(store, "resid_post", by=["layer", "position"], progress=False)
    assert page["statistics"].identical(here)
    swept = [
        probes.sweep(store, "label", "resid_post", layers=layer, progress=False) for layer in store.layers("resid_post")
    ]
    assert [one.best for one in page["sweeps"]] == [one.best for one in swept]
    with xr.open_zarr("last-layer.zarr") as written:
        assert np.array_equal(written["resid_post"].compute(scheduler="threads"), store["resid_post"].values[-1:])


@pytest.mark.usefixtures("page")
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_every_way_to_read_gives_the_same_numbers(tmp_path: Path, compression: str) -> None:
    store = build_store(tmp_path / "run.zarr", DOCUMENTS, dtype="bfloat16", compression=compression)
    lazy, raw = store["resid_post"], store.raw("resid_post")
    expected = np.stack([store.read("resid_post", layer) for layer in (0, 3)])
    stored = np.stack([store.read("resid_post", layer, raw=True) for layer in (0, 3)])
    assert raw.compute().dtype == stored.dtype
    assert np.array_equal(raw.compute().values.view(np.uint16), stored.view(np.uint16))
    assert np.array_equal(raw.persist().values.view(np.uint16), stored.view(np.uint16))
    assert np.array_equal(lazy.compute(), expected)
    assert np.array_equal(lazy.chunk({"token": 100}).persist(), expected)
    chosen = lazy.sel(layer=3).isel(token=[700, 3, 5])
    assert np.array_equal(chosen.compute(), expected[1][[700, 3, 5]])
    assert chosen["token_id"].compute().values.tolist() == store.coordinates["token_id"].values[[700, 3, 5]].tolist()
    opened = xr.open_dataset(store.path, engine="flexcache", chunks={"token": 64})
    assert np.array_equal(opened["resid_post"].compute(), expected)
    assert opened.chunk({"token": 100}).compute().identical(store.dataset().compute(scheduler="threads"))


def test_statistics_datasets_and_targets_are_equal_on_workers(page: dict[str, Any], store: flexcache.Store) -> None:
    client, quiet = page["client"], {"progress": False}
    for compute in (moments.compute, quantiles.compute, geometry.pca):
        assert compute(store, "resid_post", scheduler=client, **quiet).identical(compute(store, "resid_post", **quiet))
    asked = ["moments", "quantiles", "outliers", "examples"]
    there = survey.survey(store, only=asked, scheduler=client, **quiet)
    here = survey.survey(store, only=asked, **quiet)
    assert all(there[name].identical(here[name]) for name in here.results)
    position = targets.function("odd", lambda tokens: tokens["position"] % 2)
    for target, rows in (("label", "mean"), (position, "all")):
        joined = probe_dataset.build_dataset(store, "resid_post", target, rows=rows)
        assert np.array_equal(client.submit(joined.read_layer, 3).result(), joined.read_layer(3))
        sent = client.submit(probe_dataset.build_dataset, store, "resid_post", target, rows=rows).result()
        assert np.array_equal(sent.y, joined.y)
        assert np.array_equal(sent.read_layer(0), joined.read_layer(0))


def test_errors_of_a_worker_are_errors_of_flexcache(page: dict[str, Any], tmp_path: Path) -> None:
    with open_recorder(tmp_path / "half.zarr", DOCUMENTS):
        pass
    half = flexcache.open(tmp_path / "half.zarr")
    with pytest.raises(UncommittedError, match="not committed") as missing:
        half["resid_post"].mean().compute()
    assert missing.value.remedy
    store = build_store(tmp_path / "run.zarr", DOCUMENTS)
    (store.path / "resid_post/c/3/0/0").unlink()
    for ask in (
        lambda: store["resid_post"].mean().compute(),
        lambda: page["client"].submit(store.read, "resid_post", 3).result(),
        lambda: moments.compute(store, "resid_post", scheduler=page["client"], progress=False),
    ):
        with pytest.raises(DamagedError, match="missing") as damaged:
            ask()
        assert damaged.value.where == str(store.path / "resid_post/c/3/0/0")
    gone = build_store(tmp_path / "gone.zarr", DOCUMENTS[:5])
    lazy = gone["resid_post"]
    gone.path.rename(tmp_path / "moved.zarr")
    with pytest.raises(StoreError, match="cannot find it"):
        lazy.compute()


def test_processes_without_a_cluster_compute_the_same_results(tmp_path: Path) -> None:
    lazy = build_store(tmp_path / "run.zarr", DOCUMENTS, compression="zstd")["resid_post"]
    expected = lazy.compute(scheduler="threads")
    assert np.array_equal(lazy.compute(scheduler="processes", num_workers=1), expected)
