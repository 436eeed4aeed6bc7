from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import flexcache
import flexcache.store.format.ledger as ledger
import flexcache.store.manage.layer_change as changing
import flexcache.store.storage.atomic_files as files
import flexcache.store.storage.backend as backend
from flexcache.errors import DamagedError, SiteError, StoreError
from flexcache.store.manage.copy import copy
from flexcache.store.manage.layer_change import NOTE
from flexcache.store.manage.remove import Removal
from flexcache.store.write.claims import Claims
from flexcache.store.write.worker import Worker
from tests.corpora import build_store, lengths, open_recorder, put_batch, token_documents
from tests.recording.test_recorder import shard_hashes


class Killed(BaseException):
    """Simulated SIGKILL: no handler catches it."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> flexcache.Store:
    path = tmp_path_factory.mktemp("source") / "run.zarr"
    return build_store(path, token_documents(lengths(260)), layers=[0, 2, 3])


@pytest.fixture
def path(source: flexcache.Store, tmp_path: Path) -> Path:
    shutil.copytree(source.path, tmp_path / "run.zarr")
    return tmp_path / "run.zarr"


def test_a_removal_leaves_the_same_store_as_a_copy_without_the_removed_sites(
    source: flexcache.Store, path: Path, tmp_path: Path
) -> None:
    freed = Removal(path, ["resid_post"], "0:3").run()
    store = flexcache.open(path)
    assert store.layers("resid_post") == (3,)
    assert flexcache.verify(path).sound
    part = copy(source.path, tmp_path / "part.zarr", layers=[3])
    assert shard_hashes(path) == shard_hashes(part.path)
    assert [*store.ledger] == [*part.ledger]
    assert store.arrays == part.arrays
    assert store.spec == part.spec
    assert store.provenance.history == ({"removed": {"resid_post": [0, 2]}},)
    assert freed == sum(
        file.size
        for record in source.ledger
        for name, file in record.files.items()
        if name.startswith(("resid_post/c/0/", "resid_post/c/2/"))
    )
    with xr.open_zarr(path) as dataset:
        assert dataset["resid_post"].shape[0] == 5
        assert dataset["resid_post"].attrs["layers"] == [3]
        assert json.loads((path / "resid_post" / "zarr.json").read_text())["attributes"]["layers"] == [3]
        assert np.isnan(dataset["resid_post"][0].values.astype(np.float32)).all()
    assert "layers" in (path / "README.md").read_text()


def test_removing_a_site_removes_its_folder(path: Path) -> None:
    Removal(path, ["model.*"]).run()
    store = flexcache.open(path)
    assert store.sites == ("resid_post",)
    assert store.spec.sites == {"resid_post": [0, 2, 3]}
    assert not (path / "model.embed").exists()
    assert flexcache.verify(path).sound
    assert not [entry.name for entry in path.iterdir() if entry.name.startswith(".") or entry.name == NOTE]
    with xr.open_zarr(path) as dataset:
        assert list(dataset.data_vars) == ["resid_post"]


def test_a_capture_resumes_with_the_remaining_sites(tmp_path: Path) -> None:
    documents = token_documents(lengths(260))
    recorder = open_recorder(tmp_path / "run.zarr", documents)
    with pytest.raises(KeyboardInterrupt), recorder:
        for batch in recorder.batches():
            if batch.unit == 2:
                raise KeyboardInterrupt
            put_batch(recorder, batch)
    Removal(tmp_path / "run.zarr", ["resid_post"], 0).run()
    assert not flexcache.open(tmp_path / "run.zarr").complete
    with flexcache.Recorder(tmp_path / "run.zarr") as recorder:
        for batch in recorder.batches():
            put_batch(recorder, batch)
    whole = copy(build_store(tmp_path / "whole.zarr", documents).path, tmp_path / "part.zarr", layers=[3])
    assert shard_hashes(tmp_path / "run.zarr") == shard_hashes(whole.path)
    assert flexcache.verify(tmp_path / "run.zarr").sound


def check_readable(path: Path, source: flexcache.Store) -> None:
    store = flexcache.open(path)
    for name, array in store.arrays.items():
        for layer in array.slices:
            assert np.array_equal(store.read(name, layer), source.read(name, layer)), (name, layer)
    with xr.open_zarr(path) as dataset:
        assert set(dataset.data_vars) == set(store.arrays)


@settings(max_examples=10)
@given(data=st.data(), whole=st.booleans())
def test_a_kill_at_any_step_leaves_a_readable_store_and_the_same_call_finishes(
    source: flexcache.Store, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, whole: bool
) -> None:
    path = tmp_path_factory.mktemp("kills") / "run.zarr"
    shutil.copytree(source.path, path)
    sites, layers = (["resid_post"], "all") if whole else (["resid_post"], "0:3")
    steps = 0

    def dying(call: Any) -> Any:
        def step(*arguments: Any, **options: Any) -> Any:
            nonlocal steps
            if not {".partial", ".claims"} & set(Path(arguments[0]).parts):  # a dead process holds no claims
                steps -= 1
                if steps < 0:
                    raise Killed
            return call(*arguments, **options)

        return step

    kills = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=3), label="steps before each kill")
    for kill in kills:
        steps = kill
        with pytest.MonkeyPatch.context() as patch:
            for module in (files, backend, changing):
                patch.setattr(module, "write_durably", dying(files.write_durably))
            patch.setattr(ledger, "write_json", dying(files.write_json))
            patch.setattr(Path, "unlink", dying(Path.unlink))
            patch.setattr(changing.shutil, "rmtree", dying(shutil.rmtree))
            with contextlib.suppress(Killed, SiteError):  # SiteError if an earlier attempt has finished
                Removal(path, sites, layers).run()
        check_readable(path, source)
        if (path / NOTE).exists():
            assert not flexcache.verify(path).sound
    if (path / NOTE).exists():
        assert Removal(path, sites, layers).unfinished
        Removal(path, sites, layers).run()
    else:
        with contextlib.suppress(SiteError):
            Removal(path, sites, layers).run()
    check_readable(path, source)
    assert flexcache.verify(path).sound
    assert flexcache.open(path).sites == (("model.embed",) if whole else source.sites)
    assert whole or flexcache.open(path).layers("resid_post") == (3,)
    shutil.rmtree(path.parent)


# Errors


def test_an_invalid_removal_raises_an_error_and_changes_nothing(source: flexcache.Store, path: Path) -> None:
    with pytest.raises(SiteError, match="did you mean resid_post"):
        Removal(path, ["resid_pots"])
    with pytest.raises(SiteError, match="layer 1 of resid_post is not in the store"):
        Removal(path, ["resid_post"], 1)
    with pytest.raises(SiteError, match="no site left"):
        Removal(path, ["*"])
    assert backend.relative_files(path) == backend.relative_files(source.path)


def test_a_store_that_another_process_fills_is_not_changed(path: Path) -> None:
    worker = Worker(path)
    claims = Claims(worker)
    assert claims.take_claim([0]) == "0"
    with pytest.raises(StoreError, match="another process fills the store"):
        Removal(path, ["model.embed"]).run()
    assert "model.embed" in flexcache.open(path)
    claims.close()
    worker.close()
    Removal(path, ["model.embed"]).run()
    assert "model.embed" not in flexcache.open(path)


@pytest.mark.parametrize("note", ["{", '{"remove": [["../outside", null]]}', '{"remove": [["..", null]]}', "[]"])
def test_a_malformed_removal_note_raises_an_error(path: Path, note: str) -> None:
    (path / NOTE).write_text(note)
    with pytest.raises(DamagedError, match="cannot be read"):
        Removal(path, ["model.embed"])
