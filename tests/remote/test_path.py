from __future__ import annotations

import pickle
import socket
import threading
from typing import Any

import obstore
import pytest

from flexcache.errors import UnreachableError
from flexcache.store.storage import object_client, retry
from flexcache.store.storage.location import parse_location
from flexcache.store.storage.multipart_upload import abort_uploads, begin_upload
from flexcache.store.storage.object_path import PIECE_BYTES, PIECES, ObjectPath
from flexcache.store.write.object_worker import ObjectClaims, ObjectWorker
from tests.object_storage import connect


def test_names_are_those_of_paths() -> None:
    path = ObjectPath("memory://bucket/run.zarr/")
    assert str(path) == "memory://bucket/run.zarr"
    assert (path.name, path.stem, path.suffix) == ("run.zarr", "run", ".zarr")
    assert path / "ledger" / "0.json" == ObjectPath("memory://bucket/run.zarr/ledger/0.json")
    assert path.with_name("b") == path.parent / "b"
    assert (path / "x").is_relative_to(path)
    assert not ObjectPath("memory://bucket/run.zarr2").is_relative_to(path)
    assert str(ObjectPath("memory://run.zarr").with_name("b")) == "memory://b"
    assert pickle.loads(pickle.dumps(path)) == path
    assert {path: 1}[ObjectPath("memory://bucket/run.zarr")] == 1


def test_objects_are_put_read_listed_and_removed(everywhere: str) -> None:
    root = parse_location(everywhere)
    assert isinstance(root, ObjectPath)
    assert not root.exists()
    for name in ("a.json", "b/c.json", "b/d/e"):
        (root / name).write_bytes(name.encode() * 3)
    assert root.sizes() == {"a.json": 18, "b/c.json": 24, "b/d/e": 15}
    assert sorted(path.name for path in root.iterdir()) == ["a.json", "b"]
    assert [path.name for path in root.glob("*.json")] == ["a.json"]
    assert (root / "b").exists()
    assert not (root / "b").is_file()
    assert (root / "a.json").read_text() == "a.json" * 3
    assert (root / "a.json").read_spans([(1, 4), (16, 18)]) == [b".js", b"on"]
    assert (root / "a.json").stat().st_size == 18
    with pytest.raises(FileNotFoundError):
        (root / "none").read_bytes()
    with pytest.raises(FileNotFoundError):
        (root / "none").stat()
    (root / "none").unlink(missing_ok=True)
    (root / "b").remove_all()
    assert list(root.sizes()) == ["a.json"]


def test_a_replaced_object_has_another_status(everywhere: str) -> None:
    path = parse_location(everywhere) / "zarr.json"
    assert isinstance(path, ObjectPath)
    path.write_bytes(b"one")
    before = path.stat()
    assert path.stat() == before
    path.write_bytes(b"two")
    assert path.stat() != before


def test_a_file_seeks_and_long_objects_come_in_order(everywhere: str) -> None:
    path = parse_location(everywhere) / "long"
    content = bytes(range(256)) * ((PIECES + 1) * PIECE_BYTES // 256) + b"end"
    upload = begin_upload(path)  # type: ignore[arg-type]
    for number, start in enumerate(range(0, len(content), 7 << 20)):
        upload.put(number, content[start : start + (7 << 20)])
    assert not path.is_file() or str(path).startswith("memory")
    upload.complete()
    assert b"".join(path.blocks()) == content  # type: ignore[union-attr]
    with path.open() as file:
        file.seek(-3, 2)
        assert file.read() == b"end"
        file.seek(1000)
        assert file.read(5000) == content[1000:6000]


def test_an_answer_that_is_cut_short_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    path = ObjectPath("memory://cut/object")
    path.write_bytes(bytes(range(100)))
    whole, asked = obstore.get_range, []

    def cut(*arguments: Any, **options: Any) -> bytes:
        asked.append(1)
        found = bytes(whole(*arguments, **options))
        return found[:-1] if len(asked) < 5 else found

    monkeypatch.setattr(retry.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(obstore, "get_range", cut)
    assert path.read_spans([(10, 20), (90, 100)]) == [bytes(range(10, 20)), bytes(range(90, 100))]
    assert len(asked) == 6


def test_an_upload_that_is_aborted_never_appears(s3: Any) -> None:
    root = ObjectPath("s3://bucket/aborted")
    upload = begin_upload(root / "one")
    upload.put(0, b"x" * (5 << 20))
    upload.abort()
    assert not (root / "one").exists()
    begin_upload(root / "two").put(0, bytes(5 << 20))  # and left, as by a process that is killed
    begin_upload(ObjectPath("s3://bucket/aborted-not") / "three").put(0, bytes(5 << 20))
    assert abort_uploads(root) == 1
    assert abort_uploads(root) == 0
    assert abort_uploads(ObjectPath("s3://bucket/aborted-not")) == 1


def test_of_many_that_create_at_once_one_does(s3: Any) -> None:
    path, found = ObjectPath("s3://bucket/created/once"), []
    barrier = threading.Barrier(8)

    def run(number: int) -> None:
        barrier.wait()
        found.append(path.create(f"by {number}".encode()))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(found) == 1
    assert not path.create(b"later")


def test_a_claim_is_one_workers_until_it_ends(everywhere: str) -> None:
    root = parse_location(everywhere)
    assert isinstance(root, ObjectPath)
    first, second = ObjectWorker(root, {"threads": 3}), ObjectWorker(root)
    claims, others = ObjectClaims(first), ObjectClaims(second)
    assert claims.take_claim([0, 1]) == "0"
    assert others.take_claim([0, 1]) == "1"
    assert others.take_claim([0, 1]) is None
    assert [told["conditions"] for told in others.others()] == [{"threads": 3}]
    assert claims.holds(0)
    first.alive.unlink()  # as others do with a worker that they take for gone
    assert first.lost
    assert others.take_claim([0]) == "0"
    assert not claims.holds(0)
    assert others.holds(0)
    first.close()
    others.close(finished=True)
    second.close()
    assert root.sizes() == {}


def test_a_worker_that_stands_still_is_gone_after_a_while(everywhere: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = parse_location(everywhere)
    assert isinstance(root, ObjectPath)
    sleeping, watcher = ObjectWorker(root), ObjectWorker(root, heartbeat_timeout=100)
    assert ObjectClaims(sleeping).take_claim([5]) == "5"
    claims, now = ObjectClaims(watcher), 1000.0
    monkeypatch.setattr("flexcache.store.write.worker.time.monotonic", lambda: now)
    assert claims.take_claim([5]) is None
    now += 99
    assert claims.take_claim([5]) is None
    sleeping._announce()  # a sign of life
    assert claims.take_claim([5]) is None
    now += 99
    assert claims.take_claim([5]) is None
    now += 2
    assert claims.take_claim([5]) == "5"
    watcher.sweep()
    assert sleeping.lost
    sleeping.close()
    watcher.close()


def test_what_fails_for_a_while_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", waits.append)
    asked = []

    def request() -> str:
        asked.append(1)
        if len(asked) < 4:
            raise ConnectionResetError("by peer")
        return "answer"

    assert retry.attempt("s3://bucket/x", request) == "answer"
    assert len(waits) == 3
    assert all(0.1 * 2**number <= wait <= 0.2 * 2**number for number, wait in enumerate(waits))


def test_what_goes_on_failing_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", waits.append)

    def fail(error: Exception) -> None:
        raise error

    with pytest.raises(UnreachableError, match="run the same command again"):
        retry.attempt("s3://bucket/x", lambda: fail(TimeoutError("no answer")))
    assert len(waits) == retry.ATTEMPTS - 1
    waits.clear()
    with pytest.raises(UnreachableError, match="denies access"):
        retry.attempt("s3://bucket/x", lambda: fail(PermissionError("403")))
    assert not waits
    with pytest.raises(FileNotFoundError):
        retry.attempt("s3://bucket/x", lambda: fail(FileNotFoundError()))


@pytest.mark.parametrize("ours", [True, False])
def test_a_created_object_whose_answer_was_lost_is_ours(
    ours: bool, everywhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, put, puts = ObjectPath(f"{everywhere}/claim"), obstore.put, []
    if not ours:
        path.write_bytes(b"of another process")

    def lost(*arguments: Any, **options: Any) -> Any:
        puts.append(1)
        found = put(*arguments, **options)
        if len(puts) == 1:
            raise obstore.exceptions.GenericError("connection closed before the answer")
        return found

    monkeypatch.setattr(retry.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(obstore, "put", lost)
    assert path.create(b"mine") == ours
    assert len(puts) == (2 if ours else 1)


def test_a_silent_server_is_one_clear_error(s3: Any, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections, and answers none
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(object_client, "_READ_SECONDS", 0.05)
        monkeypatch.setattr(retry.time, "sleep", lambda seconds: None)
        connect(server)
        path = ObjectPath("s3://bucket/x")
        for request in (path.read_bytes, lambda: begin_upload(path).put(1, b"")):
            with pytest.raises(UnreachableError, match="does not answer"):
                request()
    monkeypatch.undo()
    connect(server)


def test_a_stream_that_is_aborted_never_appears() -> None:
    path = ObjectPath("memory://aborted/stream")
    upload = begin_upload(path)
    for number in range(3):
        upload.put(number, bytes(6 << 20))
    upload.abort()
    upload.abort()
    assert not path.exists()


def test_what_the_clients_raise_becomes_a_built_in_exception(s3: Any) -> None:
    missing = ObjectPath("s3://no-such-bucket/x")
    with pytest.raises(FileNotFoundError):
        missing.read_bytes()
    assert list(missing.iterdir()) == []
    assert missing.sizes() == {}
    assert not missing.exists()
    with pytest.raises(FileNotFoundError):
        begin_upload(missing).put(0, bytes(5 << 20))
    denied = obstore.exceptions.GenericError("list request: Server returned non-2xx status code: 403 Forbidden")
    assert isinstance(retry.translated(denied), PermissionError)


def test_an_empty_object_for_a_folder_is_no_file(s3: Any) -> None:
    for key in ("marked/", "marked/run.zarr/", "marked/run.zarr/ledger/", "marked/run.zarr/ledger/0.json"):
        s3.put_object(Bucket="bucket", Key=key, Body=b"")
    assert ObjectPath("s3://bucket/marked").sizes() == {"run.zarr/ledger/0.json": 0}
    assert [path.name for path in ObjectPath("s3://bucket/marked/run.zarr").iterdir()] == ["ledger"]
