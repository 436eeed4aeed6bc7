"""Stores and objects made from them are pickled as their location, and read in other processes."""

from __future__ import annotations

import copy
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import xarray as xr

import flexcache
from analysis import probes, survey
from analysis.dataset import probe_dataset, targets
from analysis.statistics import moments
from flexcache import errors
from flexcache.store.format.ledger import Ledger
from flexcache.store.manage.copy import copy as copy_store
from flexcache.store.read.shard_reader import RowReader
from tests.corpora import build_store, lengths, open_recorder, padded_activation, put_batch, token_documents
from tests.golden.make import FOLDER

DOCUMENTS = token_documents(lengths(60))
WAYS: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "oldest protocol": lambda thing: pickle.loads(pickle.dumps(thing, 2)),
    "cloudpickle": lambda thing: cloudpickle.loads(cloudpickle.dumps(thing)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}
through = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> flexcache.Store:
    return build_store(tmp_path_factory.mktemp("pickled") / "run.zarr", DOCUMENTS, dtype="bfloat16")


def check_equal(found: flexcache.Store, store: flexcache.Store) -> None:
    assert found.documents.equals(store.documents)
    assert found.tokens.equals(store.tokens)
    assert found.committed.tolist() == store.committed.tolist()
    assert found.provenance == store.provenance
    assert found.dataset().identical(store.dataset())
    for site in store.sites:
        for layer in store.arrays[site].slices:
            rows = np.random.default_rng(0).integers(0, store.n_rows, 50)
            assert np.array_equal(found.read(site, layer, rows), store.read(site, layer, rows))
            assert np.array_equal(found.read(site, layer, raw=True), store.read(site, layer, raw=True))


@through
def test_a_store_is_equal_after_pickling(way: Callable[[Any], Any], store: flexcache.Store) -> None:
    store.documents, store.tokens, store.coordinates["position"].values  # held in memory from now on
    store.read("resid_post", 3, [5, 6])
    check_equal(way(store), store)


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.zarr")))
def test_a_store_of_every_kind_is_equal_after_pickling(name: str) -> None:
    store = flexcache.open(FOLDER / name)
    check_equal(pickle.loads(pickle.dumps(store)), store)
    for label in store.token_labels:
        assert pickle.loads(pickle.dumps(store)).token_label(label).equals(store.token_label(label))


def test_int8_rows_are_equal_after_pickling(store: flexcache.Store, tmp_path: Path) -> None:
    small = copy_store(store.path, tmp_path / "int8.zarr", dtype="int8", compression="zstd")
    check_equal(pickle.loads(pickle.dumps(small)), small)
    assert pickle.loads(pickle.dumps(small["resid_post"])).identical(small["resid_post"])


@through
def test_lazy_arrays_are_equal_after_pickling(way: Callable[[Any], Any], store: flexcache.Store) -> None:
    arrays = [store["resid_post"], store.raw("resid_post"), store["model.embed"], store.dataset(committed=True)]
    parts = [store["resid_post"].sel(layer=3).isel(token=slice(5, 900, 3)), store.dataset().chunk({"token": 100})]
    for lazy in [*arrays, *parts, xr.open_dataset(store.path, engine="flexcache")]:
        assert way(lazy).identical(lazy)


def test_a_lazy_array_is_pickled_without_the_values_that_were_read(store: flexcache.Store) -> None:
    lazy = store["resid_post"]
    store.documents, store.tokens, lazy["position"].values, lazy.values  # held in memory from now on
    assert len(pickle.dumps(lazy)) < 4500 < 4 * store.n_rows
    assert len(pickle.dumps(store)) < 3000
    graph = lazy.mean("token").data.__dask_graph__()
    assert max(len(cloudpickle.dumps(task)) for task in graph.values()) < 1500


def test_a_process_opens_and_lists_a_store_once_however_often_it_is_unpickled(
    store: flexcache.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    listing = Ledger.units
    monkeypatch.setattr(
        flexcache.store.format.ledger.Ledger, "units", lambda self: opened.append("ledger") or listing(self)
    )
    mapping = RowReader._map
    fresh = flexcache.open(shutil.copytree(store.path, store.path.parent / "many.zarr"))
    pickled = pickle.dumps((fresh["resid_post"], fresh))
    opened.clear()
    monkeypatch.setattr(RowReader, "_map", lambda self, *shard: opened.append(str(id(self))) or mapping(self, *shard))
    for _ in range(20):
        lazy, again = pickle.loads(pickled)
        assert float(lazy[0, 7].sum()) == float(again.read("resid_post", 0, [7]).sum())
    assert opened.count("ledger") == 1
    assert len(set(opened) - {"ledger"}) == 2, "the reader of arrays and that of the store"


def test_an_array_keeps_its_dask_name_until_another_store_takes_its_place(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    first = build_store(path, DOCUMENTS[:30])["resid_post"]
    assert flexcache.open(path)["resid_post"].data.name == first.data.name
    shutil.rmtree(path)
    assert build_store(path, DOCUMENTS[:30])["resid_post"].data.name != first.data.name


def test_a_store_pickled_while_being_written_shows_at_least_the_units_committed_then(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    with open_recorder(path, DOCUMENTS) as recorder:
        batches = recorder.batches()
        while not len(flexcache.open(path).committed_units):
            put_batch(recorder, next(batches))
        half = flexcache.open(path)
        expected = half.dataset(committed=True).load()
        pickled = pickle.dumps((half, half.dataset(committed=True), half["resid_post"]))
        store, known, lazy = pickle.loads(pickled)
        assert 0 < len(store.committed_units) < store.n_units
        assert known.identical(expected)
        with pytest.raises(errors.UncommittedError, match="not committed"):
            lazy.compute()
        for batch in batches:
            put_batch(recorder, batch)
    assert known.identical(expected)
    assert np.array_equal(lazy.values, flexcache.open(path)["resid_post"].values)
    store.refresh()
    assert store.complete


def test_a_unit_that_was_taken_back_is_not_read_by_a_process_that_has_listed_it(tmp_path: Path) -> None:
    store = build_store(tmp_path / "run.zarr", DOCUMENTS)
    pickle.loads(pickle.dumps(store["resid_post"])).compute()
    store.ledger.take_back(0)
    with pytest.raises(errors.UncommittedError):
        pickle.loads(pickle.dumps(flexcache.open(store.path)["resid_post"])).compute()


def test_an_unpickled_store_keeps_its_rows_and_layers_after_an_extension(tmp_path: Path) -> None:
    store = build_store(tmp_path / "run.zarr", DOCUMENTS[:30])
    expected = store.dataset().load()
    pickled = pickle.dumps((store, store.dataset()))
    build_store(store.path, DOCUMENTS[30:], extend=True)
    with open_recorder(store.path, DOCUMENTS[:30], extend=True, layers=[0, 1, 3]) as recorder:
        for batch in recorder.batches():
            for site, layer in recorder.keys:
                values = padded_activation(batch, layer or 0, recorder.store.arrays[site].features)
                recorder.put(site, batch.kept(values), rows=batch.rows, layer=layer)
    found, lazy = pickle.loads(pickled)
    assert lazy.identical(expected)
    assert found.n_rows == store.n_rows
    assert found.dataset().identical(expected)
    grown = pickle.loads(pickle.dumps(flexcache.open(store.path)))
    assert grown.n_rows > store.n_rows
    assert grown.layers("resid_post") == (0, 1, 3)
    check_equal(grown, flexcache.open(store.path))


def test_unpickling_raises_an_error_if_the_store_is_missing_or_replaced(tmp_path: Path) -> None:
    store = build_store(tmp_path / "run.zarr", DOCUMENTS[:20])
    lazy, whole = pickle.dumps(store["resid_post"]), pickle.dumps(store)
    moved = store.path.rename(tmp_path / "moved.zarr")
    with pytest.raises(errors.StoreError, match="cannot find it"):
        pickle.loads(lazy).compute()
    build_store(store.path, DOCUMENTS[:15])
    with pytest.raises(errors.MismatchError, match="another store"):
        pickle.loads(lazy).compute()
    with pytest.raises(errors.MismatchError, match="another store"):
        pickle.loads(whole).read("resid_post", 0)
    shutil.rmtree(store.path)
    moved.rename(store.path)
    assert pickle.loads(lazy).identical(store["resid_post"])


def test_datasets_targets_and_results_survive_pickling(store: flexcache.Store) -> None:
    odd = targets.function("odd", lambda tokens: tokens["token_id"] % 2)
    for target in (odd, targets.coordinate("position"), pickle.loads(pickle.dumps(odd))):
        again = pickle.loads(pickle.dumps(target))
        assert (again.name, type(again)) == (target.name, type(target))
        assert again.values(store).equals(target.values(store))
    for rows in ("last", "mean", "all", "tokens", 2):
        joined = probe_dataset.build_dataset(store, "resid_post", "label", rows=rows)
        again = pickle.loads(pickle.dumps(joined))
        for found, expected in zip(again.read_layer(3), joined.read_layer(3), strict=True):
            assert np.array_equal(found, expected)
        assert np.array_equal(again.y, joined.y)
    swept = probes.sweep(store, "label", "resid_post", layers=3, resamples=20, mdl=False, progress=False)
    assert pickle.loads(pickle.dumps(swept)).best == swept.best
    surveyed = survey.survey(store, only=["moments", "pca"], progress=False)
    assert pickle.loads(pickle.dumps(surveyed))["total"].identical(surveyed["total"])


LABELLED = [{**document, "tags": ["a"] if index % 3 else ["b", "c"]} for index, document in enumerate(DOCUMENTS[:12])]


def test_targets_of_lists_of_labels_pickle(tmp_path: Path) -> None:
    store = build_store(tmp_path / "run.zarr", LABELLED)
    for target in targets.labels(store, "tags"):
        assert pickle.loads(pickle.dumps(target)).values(store).equals(target.values(store))


@through
def test_every_error_keeps_all_its_parts_after_pickling(way: Callable[[Any], Any]) -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    for kind in kinds:
        error = kind("text", where="here", expected="this", found="that", remedy="so")
        error.add_note("while something was computed")
        error.rows = [1, 2]
        found = way(error)
        assert type(found) is kind
        assert str(found) == str(error)
        assert found.args == error.args
        assert vars(found) == vars(error)


def test_an_error_with_its_own_constructor_keeps_its_parts_after_pickling() -> None:
    found = pickle.loads(pickle.dumps(OfAShardError(7)))
    assert (found.shard, str(found)) == (7, "shard 7\n  what to do: look")


class OfAShardError(errors.StoreError):
    def __init__(self, shard: int) -> None:
        super().__init__(f"shard {shard}", remedy="look")
        self.shard = shard


def test_another_process_reads_an_unpickled_store_without_torch(store: flexcache.Store, tmp_path: Path) -> None:
    (tmp_path / "pickled").write_bytes(pickle.dumps((store, store["resid_post"])))
    code = (
        "import pickle, sys; store, lazy = pickle.load(open('pickled', 'rb'));"
        "print(float(store.read('resid_post', 3).sum()), float(lazy.sel(layer=3).sum()), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    expected = float(store.read("resid_post", 3).sum()), float(store["resid_post"].sel(layer=3).sum())
    assert done.stdout.split() == [*map(str, expected), "False"]


def test_a_store_opened_by_a_relative_path_is_found_from_another_folder(
    store: flexcache.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(store.path.parent)
    pickled = pickle.dumps((flexcache.open(store.path.name), flexcache.open(store.path.name)["resid_post"]))
    monkeypatch.chdir(tmp_path)
    found, lazy = pickle.loads(pickled)
    assert lazy.identical(store["resid_post"])
    assert found.documents.equals(store.documents)


def test_statistics_of_an_unpickled_store_are_equal_to_the_bit(store: flexcache.Store) -> None:
    again = pickle.loads(pickle.dumps(store))
    expected = moments.compute(store, "resid_post", by=["layer", "position"], progress=False)
    assert moments.compute(again, "resid_post", by=["layer", "position"], progress=False).identical(expected)
