from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import flexcache
from flexcache.errors import UnreachableError
from flexcache.store.manage.copy import copy
from flexcache.store.storage import retry
from flexcache.store.storage.object_path import ObjectPath
from tests.corpora import build_store, lengths, open_recorder, put_batch, token_documents
from tests.object_storage import connect, environment
from tests.recording.test_recorder import shard_hashes
from tests.remote.proxy import DroppingProxy

ROOT = Path(__file__).parents[2]
DOCUMENTS = token_documents(lengths(120))
RECORD = """
import sys, time
from tests.corpora import lengths, open_recorder, put_batch, token_documents
with open_recorder(sys.argv[1], token_documents(lengths(120)), dtype="bfloat16") as recorder:
    for batch in recorder.batches():
        print(batch.unit, flush=True)
        time.sleep(0.02)
        put_batch(recorder, batch)
"""


@pytest.mark.parametrize("units", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_recording_that_is_killed_goes_on_to_the_same_bytes(units: int, s3: Any, server: str, tmp_path: Path) -> None:
    target = f"s3://bucket/killed-{units}/run.zarr"
    process = subprocess.Popen(
        [sys.executable, "-c", RECORD, target],
        cwd=ROOT,
        env={**os.environ, **environment(server)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= units:
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    store = flexcache.open(target)
    kept = store.committed_units.tolist()
    assert kept
    assert not store.complete
    times = {unit: store.ledger.path(unit).stat() for unit in kept}
    begin = s3.create_multipart_upload(Bucket="bucket", Key=f"killed-{units}/run.zarr/resid_post/c/0/2/0")
    assert begin["UploadId"]  # as a process leaves it that is killed while it sends
    resumed = build_store(target, DOCUMENTS, dtype="bfloat16")
    assert resumed.complete
    assert {unit: store.ledger.path(unit).stat() for unit in kept} == times  # not computed again
    here = build_store(tmp_path / "run.zarr", DOCUMENTS, dtype="bfloat16")
    assert list(resumed.ledger) == list(here.ledger)
    back = copy(target, tmp_path / "back.zarr")
    assert shard_hashes(back.path) == shard_hashes(here.path)
    assert not [name for name in resumed.path.sizes() if name.startswith(".")]
    assert not s3.list_multipart_uploads(Bucket="bucket", Prefix=f"killed-{units}/").get("Uploads")


def test_a_planning_that_is_killed_is_done_again(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    put = ObjectPath.write_bytes

    def killed(self: ObjectPath, content: bytes) -> None:
        if self.name == "plan.json":
            raise Killed
        put(self, content)

    with monkeypatch.context() as patch:
        patch.setattr(ObjectPath, "write_bytes", killed)
        with pytest.raises(Killed):
            open_recorder("s3://bucket/planned/run.zarr", DOCUMENTS)
    assert (ObjectPath("s3://bucket/planned/run.zarr") / "documents.parquet").is_file()
    assert build_store("s3://bucket/planned/run.zarr", DOCUMENTS).complete
    assert flexcache.verify("s3://bucket/planned/run.zarr").sound


@pytest.mark.parametrize("every", [9, pytest.param(4, marks=pytest.mark.slow)])
def test_dropped_connections_lose_nothing(
    every: int, s3: Any, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = build_store(tmp_path / "run.zarr", DOCUMENTS, dtype="bfloat16")
    proxy = DroppingProxy(server, every)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
    connect(proxy.address)
    target = f"s3://bucket/dropped-{every}/run.zarr"
    there = build_store(target, DOCUMENTS, dtype="bfloat16")
    assert there.complete
    assert list(there.ledger) == list(here.ledger)
    back = copy(target, tmp_path / "back.zarr")
    assert shard_hashes(back.path) == shard_hashes(here.path)
    assert flexcache.verify(target).sound
    assert proxy.dropped > 5
    proxy.close()
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    connect(server)


def test_a_storage_that_is_gone_is_one_clear_error_and_the_same_call_goes_on(
    s3: Any, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = "s3://bucket/gone/run.zarr"
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.001)
    proxy = DroppingProxy(server, 10**9)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
    connect(proxy.address)
    recorder = open_recorder(target, DOCUMENTS)
    with pytest.raises(UnreachableError, match="run the same command again"), recorder:
        for batch in recorder.batches():
            if batch.unit == 3:
                proxy._every, proxy._after = 1, 0  # from now on, nothing is answered
            put_batch(recorder, batch)
    proxy.close()
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    connect(server)
    begun = flexcache.open(target)
    assert {0, 1} <= set(begun.committed_units.tolist())
    assert not begun.complete
    assert build_store(target, DOCUMENTS, heartbeat_timeout=1.0).complete  # the worker could not say that it has ended
    assert flexcache.verify(target).sound


def test_reading_from_a_storage_that_is_gone_is_one_clear_error(
    s3: Any, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = build_store("s3://bucket/silent/run.zarr", token_documents(lengths(30)))
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.001)
    proxy = DroppingProxy(server, 1, after=0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
    connect(proxy.address)
    for read in (lambda: store.read("model.embed"), lambda: store.tokens, lambda: store.ledger.read_record(0)):
        with pytest.raises(UnreachableError, match="does not answer"):
            read()
    proxy.close()
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    connect(server)
