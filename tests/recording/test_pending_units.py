from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import flexcache
from flexcache.recording.forward.batch_reader import BatchReader
from flexcache.recording.run import pending_units
from flexcache.store.format.ledger import Ledger
from flexcache.store.format.metadata import largest_batch
from tests.corpora import build_store, lengths, open_recorder, put_batch, token_documents

DOCUMENTS = token_documents(lengths(200))


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make listings of the ledger count as slow; return a list with one item for each."""
    listings: list[int] = []
    listed = Ledger.units

    def units(self: Ledger) -> list[int]:
        listings.append(1)
        return listed(self)

    monkeypatch.setattr(pending_units, "QUICK", -1.0)
    monkeypatch.setattr(pending_units, "SELDOM", 1e9)
    monkeypatch.setattr(Ledger, "units", units)
    return listings


def test_a_long_ledger_is_not_listed_for_every_unit(tmp_path: Path, slow: list[int]) -> None:
    with open_recorder(tmp_path / "run.zarr", DOCUMENTS) as recorder:
        before = len(slow)
        for unit in recorder.claim_units():
            for batch in recorder.begin_unit(unit):
                with recorder.unit_writer.fill_batch(batch):
                    put_batch(recorder, batch)
            recorder.commit_unit()
            assert recorder.rows_done == min(recorder.store.n_rows, (unit + 1) * recorder.store.shard_rows)
        assert recorder.store.n_units > 5
        assert len(slow) <= before + 1
    assert flexcache.open(tmp_path / "run.zarr").complete


def test_units_that_others_committed_unseen_are_not_computed_again(tmp_path: Path, slow: list[int]) -> None:
    units: list[int] = []
    with (
        open_recorder(tmp_path / "run.zarr", DOCUMENTS) as first,
        open_recorder(tmp_path / "run.zarr", DOCUMENTS) as other,
    ):
        first.pending()
        other.pending()
        turn = 0
        while (unit := (recorder := (first, other)[turn % 2]).claim_unit()) is not None:
            for batch in recorder.begin_unit(unit):
                with recorder.unit_writer.fill_batch(batch):
                    put_batch(recorder, batch)
            assert recorder.commit_unit()
            units.append(unit)
            turn += 1
        assert first.pending() == other.pending() == []
    assert units == list(range(first.store.n_units))
    assert flexcache.verify(tmp_path / "run.zarr").sound


def test_the_plan_knows_its_largest_batch(tmp_path: Path) -> None:
    store = build_store(tmp_path / "run.zarr", DOCUMENTS)
    known = largest_batch(store.plan)
    reader = BatchReader(store.path)
    searched = reader.read_largest()
    assert known is not None
    assert known.tokens == searched.shape[0] * searched.shape[1]
    noted = reader.read_largest(known=known)
    assert noted.shape[0] * noted.shape[1] == known.tokens

    reader._file.close()  # so that a read of any row group fails
    reader = BatchReader(store.path)
    groups: list[int] = []
    read = reader._read_group
    reader._read_group = lambda number: groups.append(number) or read(number)  # type: ignore[method-assign, func-returns-value]
    reader.read_largest(known=known)
    assert len(groups) == 1
    wrong = known._replace(tokens=known.tokens + 1)
    assert reader.read_largest(known=wrong).shape == searched.shape


def test_the_plan_of_an_extended_store_knows_its_largest_batch(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    build_store(path, DOCUMENTS)
    longer = [{**document, "id": f"new-{i}"} for i, document in enumerate(token_documents([120, *lengths(40, seed=5)]))]
    build_store(path, longer, extend=True)
    store = flexcache.open(path)
    searched = BatchReader(path).read_largest()
    known = largest_batch(store.plan)
    assert known is not None
    assert known.tokens == searched.shape[0] * searched.shape[1]


@pytest.mark.parametrize("value", [None, [1, 2], [1, -2, 3], "x", [0, 10**6, 5], [True, 0, 1]])
def test_an_invalid_record_of_the_largest_batch_is_ignored(value: object, tmp_path: Path) -> None:
    store = build_store(tmp_path / "run.zarr", DOCUMENTS)
    content = json.loads((store.path / "zarr.json").read_bytes())
    content["attributes"]["flexcache"]["plan"]["largest_batch"] = value
    (store.path / "zarr.json").write_text(json.dumps(content))
    with flexcache.Recorder(store.path) as recorder:
        shape = recorder.largest_batch().shape
    searched = BatchReader(store.path).read_largest().shape
    assert shape[0] * shape[1] == searched[0] * searched[1]


# Parts of a store are read only when they are needed


def test_only_the_chunks_of_coordinates_in_use_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexcache.store.write.skeleton.COORDINATE_CHUNK", 512)
    store = build_store(tmp_path / "run.zarr", DOCUMENTS)
    assert store.n_rows > 2048
    whole = {name: variable.values.copy() for name, variable in store.coordinates.items()}
    for name in whole:
        (store.path / name / "c" / "2").write_bytes(b"not a chunk")
    store = flexcache.open(store.path)
    part = store["resid_post"].isel(layer=0, token=slice(100, 400, 3)).compute()
    for name, values in whole.items():
        assert np.array_equal(part[name].values, values[100:400:3])
    far = store["resid_post"].isel(layer=0, token=[2000, 3, 1600]).compute()
    assert np.array_equal(far["position"].values, whole["position"][[2000, 3, 1600]])
    back = store["resid_post"].isel(layer=0, token=slice(400, 100, -7)).compute()
    assert np.array_equal(back["token_id"].values, whole["token_id"][400:100:-7])
    first = store.documents["id"][0].as_py()
    assert store.rows(document=first, position=-1) == [store.documents["n_rows"][0].as_py() - 1]
    with pytest.raises(flexcache.errors.DamagedError, match="position"):
        store.coordinates["position"].values  # noqa: B018


def test_the_repr_of_a_store_reads_no_table_of_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = build_store(tmp_path / "run.zarr", DOCUMENTS)
    assert store.head(3).equals(store.documents.slice(0, 3))
    assert store.head(0).schema.equals(store.documents.schema)

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("the table was read")

    monkeypatch.setattr("flexcache.store.read.parquet.read_table", refuse)
    assert "labels: label, score" in repr(flexcache.open(store.path))
