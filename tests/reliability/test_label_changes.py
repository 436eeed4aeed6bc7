"""Joins of labels that are killed or fail at every step, run at once, or meet a store that cannot be written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp

import pytest

import flexcache
from tests.corpora import build_store, lengths, open_recorder, put_batch, token_documents
from tests.recording.test_recorder import shard_hashes
from tests.reliability.forked import fork
from tests.reliability.steps import BROKEN, FULL, killed

COUNT = 12
OLD = {"id": [f"doc-{i}" for i in range(COUNT)], "stars": list(range(COUNT))}
NEW = {"id": [f"doc-{i}" for i in range(COUNT)], "stars": list(range(COUNT))[::-1]}


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def made(folder: Path) -> Path:
    path = folder / "made.zarr"
    build_store(path, token_documents(lengths(COUNT, longest=5))).join(OLD)
    return path


def stars(path: Path) -> list[int]:
    table = flexcache.open(path).documents
    found = dict(zip(table["id"].to_pylist(), table["stars"].to_pylist(), strict=True))
    return [found[name] for name in OLD["id"]]


def join_new(path: Path) -> None:
    flexcache.open(path).join(NEW, replace=True)


@pytest.mark.parametrize("act", [killed, FULL, BROKEN], ids=["killed", "disk full", "disk broken"])
def test_a_join_that_ends_at_any_step_leaves_the_old_labels_or_the_new(made: Path, folder: Path, act: object) -> None:
    path = folder / "run.zarr"
    shutil.copytree(made, path)
    steps = fork(lambda: join_new(path), path).steps
    assert stars(path) == NEW["stars"]
    assert len(steps) > 10
    seen = set()
    for at in range(len(steps)):
        shutil.rmtree(path)
        shutil.copytree(made, path)
        outcome = fork(lambda: join_new(path), path, at, act)  # type: ignore[arg-type]
        assert not outcome.failure
        assert stars(path) in (OLD["stars"], NEW["stars"]), steps[at]
        seen.add(tuple(stars(path)))
        assert all(finding.stray for finding in flexcache.verify(path).findings), steps[at]
        join_new(path)
        assert stars(path) == NEW["stars"]
        assert flexcache.verify(path).sound, steps[at]
    assert len(seen) == 2


def test_a_removal_that_is_killed_at_any_step_leaves_the_labels_or_none(made: Path, folder: Path) -> None:
    path = folder / "run.zarr"
    shutil.copytree(made, path)
    steps = fork(lambda: flexcache.open(path).remove_labels("labels"), path).steps
    for at in range(len(steps)):
        shutil.rmtree(path)
        shutil.copytree(made, path)
        fork(lambda: flexcache.open(path).remove_labels("labels"), path, at, killed)
        if flexcache.open(path).label_tables:
            assert stars(path) == OLD["stars"]
        assert all(finding.stray for finding in flexcache.verify(path).findings)
        join_new(path)
        assert flexcache.verify(path).sound


def test_processes_that_join_at_once_all_succeed_and_one_label_has_one_table(made: Path) -> None:
    children = []
    for number in range(6):
        pid = os.fork()
        if pid == 0:
            try:
                shared = {"id": OLD["id"], "shared": OLD["stars"], f"own_{number}": OLD["stars"]}
                flexcache.open(made).join({"id": OLD["id"], f"label_{number}": OLD["stars"]}, name=f"table_{number}")
                flexcache.open(made).join(shared, name=f"shared_{number}")
            except flexcache.errors.DocumentsError:
                os._exit(3)
            except BaseException:
                os._exit(1)
            os._exit(0)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert sorted(codes) == [0, 3, 3, 3, 3, 3]
    store = flexcache.open(made)
    assert {f"table_{number}" for number in range(6)} <= set(store.label_tables)
    assert store.documents["shared"].to_pylist() == store.documents["stars"].to_pylist()
    assert flexcache.verify(made).sound


def test_labels_are_joined_while_a_capture_fills_the_store(folder: Path) -> None:
    documents = token_documents(lengths(COUNT, longest=5))
    whole = build_store(folder / "whole.zarr", documents)
    path = folder / "run.zarr"
    with open_recorder(path, documents) as recorder:
        for number, batch in enumerate(recorder.batches()):
            if number == 0:
                recorder.store.join(OLD)
            put_batch(recorder, batch)
    assert shard_hashes(path) == shard_hashes(whole.path)
    assert stars(path) == OLD["stars"]
    assert flexcache.verify(path).sound


def test_a_store_that_cannot_be_written_refuses_with_a_remedy(made: Path) -> None:
    folders = [made, *(path for path in made.rglob("*") if path.is_dir())]
    for path in folders:
        path.chmod(0o555)

    def join() -> None:
        if os.geteuid() == 0:
            os.setuid(65534)
        flexcache.open(made).join(NEW, replace=True)

    try:
        outcome = fork(join, made)
    finally:
        for path in folders:
            path.chmod(0o755)
    assert "the store cannot be written, so its labels cannot change" in outcome.error
    assert "flexcache copy" in outcome.error
    assert stars(made) == OLD["stars"]
