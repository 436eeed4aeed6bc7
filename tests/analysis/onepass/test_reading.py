from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flexcache
from analysis.statistics import moments, onepass
from analysis.statistics.moments import Moments
from analysis.statistics.onepass import DocumentSample, RowBlock, State, grouping
from analysis.statistics.onepass.row_block import widen
from flexcache.errors import AnalysisError, ConfigError, SiteError
from flexcache.store.read.shard_reader import RowReader
from tests.analysis.stores import value_store

LENGTHS = [7, 1, 30, 12, 5, 5, 18, 2, 9, 40, 3, 11] * 9


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> flexcache.Store:
    values = np.random.default_rng(0).normal(size=(3, sum(LENGTHS), 6)) * 10 + 1
    return value_store(tmp_path_factory.mktemp("stores") / "s.zarr", values, LENGTHS, dtype="bfloat16")


def sampled(share: float) -> Moments:
    statistic = Moments()
    object.__setattr__(statistic, "sample", DocumentSample(share, 3))
    return statistic


def bits(found: onepass.PassResult) -> list[bytes]:
    return [v.tobytes() for layer in found.layers for s in found.states[layer].values() for v in s.values()]


def test_each_shard_is_read_once_for_any_number_of_statistics(
    store: flexcache.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: Counter[tuple[Any, ...]] = Counter()
    scan = RowReader._scan_shard

    def counted(self: RowReader, layer: int | None, shard: int, first: int, out: np.ndarray) -> None:
        for row in range(first, first + len(out)):
            reads[layer, shard, row] += 1
        scan(self, layer, shard, first, out)

    monkeypatch.setattr("analysis.statistics.onepass.reading.SCAN_SHARE", 1.0)
    monkeypatch.setattr(RowReader, "_scan_shard", counted)
    statistics = {"a": Moments(), "b": Moments(grouping(store, ["position"]), 2), "c": sampled(0.4)}
    found = onepass.read(store, "resid_post", statistics, progress=False)
    assert len(reads) == 3 * store.n_rows
    assert set(reads.values()) == {1}
    assert found.rows == store.n_rows
    assert store.n_units == 3  # an odd number, which a tree of pairs must not drop
    assert found["a"]["n"].values.tolist() == [store.n_rows] * 3
    assert found["b"]["n"].sum("position").values.tolist() == [store.n_rows] * 3
    assert 0 < int(found["c"]["n"][0]) < store.n_rows


def test_results_are_the_same_bits_on_any_scheduler_and_number_of_workers(store: flexcache.Store) -> None:
    statistics = {"moments": Moments(grouping(store, ["position"]))}
    options: list[dict[str, Any]] = [
        {"scheduler": "synchronous"},
        {"workers": 1},
        {"workers": 4},
        {"scheduler": "processes", "workers": 2},
    ]
    found = [onepass.read(store, "resid_post", statistics, progress=False, **option) for option in options]
    assert all(bits(other) == bits(found[0]) for other in found[1:])


def test_a_scheduler_address_runs_tasks_on_its_workers(store: flexcache.Store) -> None:
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster:
        address = cluster.scheduler_address
        assert address.startswith("tcp://")
        far = moments.compute(store, "resid_post", scheduler=address, progress=False)
    assert far.identical(moments.compute(store, "resid_post", progress=False))


class Deadly(Moments):
    def update(self, state: State, block: RowBlock) -> State:
        os._exit(1)


@pytest.mark.filterwarnings("ignore")  # of a cluster that lost its workers
def test_dying_workers_and_a_missing_scheduler_are_errors(
    store: flexcache.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dask
    from distributed import LocalCluster

    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster,
        pytest.raises(AnalysisError, match="workers died"),
    ):
        onepass.read(
            store, "resid_post", {"x": Deadly()}, scheduler=cluster.scheduler_address, progress=False, layers=0
        )
    monkeypatch.setattr("analysis.statistics.onepass.scheduler.TIMEOUT", 1)
    with pytest.raises(AnalysisError, match="no scheduler at"):
        moments.compute(store, "resid_post", scheduler="tcp://127.0.0.1:9", progress=False)


def test_only_sampled_documents_are_read_if_all_statistics_sample(
    store: flexcache.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("analysis.statistics.onepass.reading.SCAN_SHARE", 1.0)
    monkeypatch.setattr(RowReader, "_scan_shard", lambda *_: pytest.fail("scanned"))
    statistic = sampled(0.2)
    assert statistic.sample is not None
    found = onepass.read(store, "resid_post", {"few": statistic}, progress=False)["few"]
    chosen = statistic.sample(store.coordinates["document"].values, store.coordinates["position"].values)
    assert 0 < chosen.sum() < store.n_rows / 2
    for layer in range(3):
        rows = store.read("resid_post", layer, np.flatnonzero(chosen)).astype(np.float64)
        assert int(found["n"][layer]) == len(rows)
        np.testing.assert_allclose(found["mean"][layer], rows.mean(0), rtol=1e-12)


def test_a_sample_has_whole_documents_and_contains_smaller_samples() -> None:
    documents, position = np.arange(20_000), np.zeros(20_000, np.int64)
    small, large = DocumentSample(0.1, 7)(documents, position), DocumentSample(0.3, 7)(documents, position)
    assert abs(small.mean() - 0.1) < 0.01
    assert abs(large.mean() - 0.3) < 0.015
    assert not (small & ~large).any()
    assert (DocumentSample(0.1, 8)(documents, position) != small).any()
    assert not DocumentSample(1.0, 7, skip=1)(documents, position).any()
    assert DocumentSample(1.0, 7, skip=1)(documents, position + 1).all()
    assert DocumentSample.of_rows(10, 5) is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_widening_is_exact(dtype: str) -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    stored = bits.view(dtype) if dtype != "float32" else np.random.default_rng(0).normal(size=99).astype(np.float32)
    stored = stored[np.isfinite(stored.astype(np.float32))]
    np.testing.assert_array_equal(widen(stored), stored.astype(np.float32))


def test_only_committed_units_are_read(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(1, sum(LENGTHS), 4))
    store = value_store(tmp_path / "s.zarr", values, LENGTHS)
    (tmp_path / "s.zarr" / "ledger" / "0" / "0.json").unlink()
    store = flexcache.open(tmp_path / "s.zarr")
    found = moments.compute(store, "resid_post", progress=False)
    assert int(found["n"][0]) == store.n_rows - store.shard_rows


def test_impossible_reads_are_refused_before_they_start(
    store: flexcache.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="did you mean threads"):
        moments.compute(store, "resid_post", scheduler="thread")
    with pytest.raises(ConfigError, match="must be a worker"):
        moments.compute(store, "resid_post", workers=0)
    with pytest.raises(SiteError, match="no layer"):
        moments.compute(store, "resid_post", layers=[9])
    monkeypatch.setattr(Moments, "state_bytes", lambda self, features: 10**12)
    with pytest.raises(AnalysisError, match="would not fit into memory"):
        moments.compute(store, "resid_post")


def test_a_store_that_replaced_another_one_is_read_again(tmp_path: Path) -> None:
    for seed, lengths in ((1, [5, 6]), (2, [2, 9])):
        values = np.random.default_rng(seed).normal(size=(1, 11, 3))
        store = value_store(tmp_path / "s.zarr", values, lengths)
        found = moments.compute(store, "resid_post", by=["layer", "position"], progress=False)
        rows = store.read("resid_post", 0).astype(np.float64)
        first = rows[store.coordinates["position"].values == 0]
        np.testing.assert_allclose(found["mean"].sel(layer=0, position=0), first.mean(0), rtol=1e-12)
        assert int(found["n"].sum()) == 11
        shutil.rmtree(tmp_path / "s.zarr")
