"""Preshuffled stores have every row once, in a random recorded order, even after interruptions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import flexcache
from flexcache.errors import ConfigError, MismatchError, StoreError
from flexcache.store.manage.copy import copy
from flexcache.training import stream
from flexcache.training.preshuffle import SOURCE_ROW, preshuffle
from tests.corpora import build_store, lengths, open_recorder, token_documents
from tests.pipelines.test_cli import run
from tests.recording.test_recorder import shard_hashes


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> flexcache.Store:
    return build_store(tmp_path_factory.mktemp("ordered") / "run.zarr", token_documents(lengths(300)))


def check(found: flexcache.Store, store: flexcache.Store) -> np.ndarray:
    rows = found.token_label(SOURCE_ROW).to_numpy()
    assert np.array_equal(np.sort(rows), np.arange(store.n_rows))
    for name in found.sites:
        for layer in found.arrays[name].slices:
            assert np.array_equal(found.read(name, layer), store.read(name, layer)[rows])
    assert np.array_equal(found.coordinates["token_id"].values, np.asarray(store.coordinates["token_id"].values)[rows])
    return rows


def test_every_row_appears_once_with_its_original_row(store: flexcache.Store, tmp_path: Path) -> None:
    found = preshuffle(store.path, tmp_path / "a.zarr")
    rows = check(found, store)
    assert flexcache.verify(found.path).sound
    neighbours = np.abs(np.diff(rows)).mean() / store.n_rows
    assert 0.3 < neighbours < 0.37, "a third, of a random order"
    assert not found.replayable
    again = preshuffle(store.path, tmp_path / "b.zarr", sites=["resid_*"], layers=[3])
    assert np.array_equal(again.token_label(SOURCE_ROW).to_numpy(), rows), "the order depends on the seed alone"
    other = preshuffle(store.path, tmp_path / "c.zarr", seed=1)
    assert (check(other, store) != rows).mean() > 0.9
    seen = torch.cat(list(stream(found, "resid_post", 3, batch_size=100)))
    assert len(seen) == store.n_rows


def test_an_interrupted_shuffle_resumes(
    store: flexcache.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = preshuffle(store.path, tmp_path / "whole.zarr")
    calls: list[int] = []

    def stop(done: int, total: int) -> None:
        calls.append(done)
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        preshuffle(store.path, tmp_path / "part.zarr", progress=stop)
    preshuffle(store.path, tmp_path / "part.zarr")
    assert shard_hashes(tmp_path / "part.zarr") == shard_hashes(whole.path)
    with pytest.raises(MismatchError):
        preshuffle(store.path, tmp_path / "part.zarr", seed=1)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_every_dtype_can_be_shuffled(store: flexcache.Store, dtype: str, tmp_path: Path) -> None:
    origin = copy(store.path, tmp_path / "origin.zarr", dtype=dtype)
    found = preshuffle(origin.path, tmp_path / "found.zarr")
    rows = found.token_label(SOURCE_ROW).to_numpy()
    assert np.allclose(found.read("resid_post", 3), origin.read("resid_post", 3)[rows], rtol=1e-6)


def test_stores_that_cannot_be_shuffled_are_refused(
    store: flexcache.Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_recorder(tmp_path / "part.zarr", token_documents([5] * 20)):
        pass
    with pytest.raises(StoreError, match="not complete"):
        preshuffle(tmp_path / "part.zarr", tmp_path / "out.zarr")
    recorder = open_recorder(tmp_path / "two.zarr", token_documents([5] * 20), sites={"resid_post": (5, 4)}, layers=[1])
    with recorder:
        for batch in recorder.batches():
            recorder.put("resid_post", np.zeros((len(batch.rows), 4)), rows=batch.rows, layer=1)
    more = open_recorder(
        tmp_path / "two.zarr", token_documents([5] * 20), sites={"mlp_out": (5, 4)}, layers=[2], extend=True
    )
    with more:
        for batch in more.batches():
            more.put("mlp_out", np.zeros((len(batch.rows), 4)), rows=batch.rows, layer=2)
    with pytest.raises(ConfigError, match="the same layers"):
        preshuffle(tmp_path / "two.zarr", tmp_path / "out.zarr")
    text = run(capsys, "preshuffle", store.path, tmp_path / "cli.zarr", "--layers", "3", "--seed", "4")
    assert "complete" in text
    check(flexcache.open(tmp_path / "cli.zarr"), store)
