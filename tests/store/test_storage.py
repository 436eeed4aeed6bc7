"""One contract over every kind of storage: what holds in a folder holds on object storage."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import zarr

from flexcache.store.storage.backend import ObjectStorage, Storage, digest, disk_path, relative_files, storage_of
from flexcache.store.storage.location import parse_location
from flexcache.store.storage.object_path import PIECE_BYTES, PIECES


@pytest.fixture(params=["folder", "memory", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """A storage in which there is nothing yet."""
    if request.param == "folder":
        (tmp_path / "files").mkdir()
        return storage_of(tmp_path / "files")
    if request.param == "s3":
        request.getfixturevalue("s3")
        return storage_of(parse_location(f"s3://bucket/contract{tmp_path}"))
    return storage_of(parse_location(f"memory://contract{tmp_path}"))


def below(storage: Storage, name: str) -> Storage:
    """The storage one folder down; folders are made first, which only a file system needs."""
    (storage.root / name).mkdir(exist_ok=True)
    return storage_of(storage.root / name)


def test_a_file_is_read_back_whole_and_in_parts(storage: Storage) -> None:
    content = bytes(range(256)) * 5
    storage.write_bytes("one.bin", content)
    assert storage.size("one.bin") == len(content)
    assert storage.read_bytes("one.bin") == content
    assert storage.read_ranges("one.bin", [(1000, 1280), (0, 1), (7, 7 + 256)]) == [
        content[1000:1280],
        content[:1],
        content[7 : 7 + 256],
    ]
    assert storage.read_ranges("one.bin", []) == []
    with storage.open_file("one.bin") as file:
        file.seek(-3, 2)
        assert file.read() == content[-3:]
        file.seek(100)
        assert file.read(50) == content[100:150]


def test_an_empty_file_is_a_file(storage: Storage) -> None:
    storage.write_bytes("empty", b"")
    assert storage.size("empty") == 0
    assert storage.read_bytes("empty") == b""
    assert list(storage.read_blocks("empty")) == []
    assert storage.list_names() == ["empty"]


def test_names_may_hold_any_character_that_files_do(storage: Storage) -> None:
    names = ["a b.json", "c#d", "e%41f", "grüße", "h[1]", "i?j", "k~l+m=n"]
    for name in names:
        storage.write_bytes(name, name.encode())
    assert sorted(storage.list_names()) == sorted(names)
    assert [storage.read_bytes(name).decode() for name in names] == names


def test_blocks_come_in_order_and_have_the_digest_of_the_file(storage: Storage, tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes((PIECES + 1) * PIECE_BYTES + 17)
    storage.write_bytes("long", content)
    assert b"".join(bytes(block) for block in storage.read_blocks("long")) == content
    (tmp_path / "same").write_bytes(content)
    assert digest(storage.root / "long") == digest(tmp_path / "same")


def test_writing_again_replaces_the_file(storage: Storage) -> None:
    storage.write_bytes("a", b"long content")
    storage.write_bytes("a", b"new")
    assert storage.read_bytes("a") == b"new"
    assert storage.list_files() == ["a"]


def test_of_many_that_create_at_once_one_does(storage: Storage) -> None:
    barrier, created = threading.Barrier(8), []

    def create(number: int) -> None:
        barrier.wait()
        if storage.create_bytes("claim", b"%d" % number):
            created.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(created) == 1
    assert storage.read_bytes("claim") == b"%d" % created[0]
    assert not storage.create_bytes("claim", b"later")
    storage.delete("claim")
    assert storage.create_bytes("claim", b"later")


def test_a_missing_file_is_not_found_and_is_deleted_without_an_error(storage: Storage) -> None:
    for read in (storage.size, storage.read_bytes, storage.open_file, lambda name: list(storage.read_blocks(name))):
        with pytest.raises(FileNotFoundError):
            read("none")
    with pytest.raises(FileNotFoundError):
        storage.read_ranges("none", [(0, 1), (1, 2)])
    storage.delete("none")


def test_listings_name_what_is_there(storage: Storage) -> None:
    assert storage_of(storage.root / "nowhere").list_names() == []
    assert storage_of(storage.root / "nowhere").list_files() == []
    storage.write_bytes("zarr.json", b"{}")
    below(storage, "ledger").write_bytes("0.json", b"12345")
    below(storage, "ledger.old").write_bytes("1.json", b"")
    assert sorted(storage.list_names()) == ["ledger", "ledger.old", "zarr.json"]
    assert below(storage, "ledger").list_names() == ["0.json"]
    assert storage.file_sizes() == {"zarr.json": 2, "ledger/0.json": 5, "ledger.old/1.json": 0}
    assert sorted(storage.list_files()) == sorted(storage.file_sizes())
    assert relative_files(storage.root, skip=["ledger"]) == ["ledger.old/1.json", "zarr.json"]
    below(storage, "ledger").delete("0.json")
    assert below(storage, "ledger").list_names() == []


@pytest.mark.parametrize("size", [100, 11 << 20])
def test_a_prepared_folder_appears_once(size: int, storage: Storage, tmp_path: Path) -> None:
    target = storage_of(storage.root / "run.zarr")
    for number in range(2):
        made = tmp_path / f"made-{number}"
        (made / "c").mkdir(parents=True)
        (made / "c" / "0").write_bytes(bytes([number]) * size)
        (made / "plan.json").write_bytes(b"plan")
        (made / "zarr.json").write_bytes(b"%d" % number)
        target.publish(made, ("plan.json", "zarr.json"))
    assert target.file_sizes() == {"c/0": size, "plan.json": 4, "zarr.json": 1}
    assert target.read_bytes("c/0") == bytes(size)
    assert target.read_bytes("zarr.json") == b"0"


def test_zarr_opens_it(storage: Storage, tmp_path: Path) -> None:
    made = tmp_path / "array"
    values = np.arange(35).reshape(5, 7)
    array = zarr.create_array(zarr.storage.LocalStore(made), shape=(5, 7), chunks=(1, 7), shards=(2, 7), dtype="int64")
    array[:] = values
    target = storage_of(storage.root / "array")
    target.publish(made, ("zarr.json",))
    np.testing.assert_array_equal(zarr.open_array(target.zarr_store(), mode="r")[1:4], values[1:4])


def test_it_pickles_as_its_location(storage: Storage) -> None:
    storage.write_bytes("a", b"1")
    content = pickle.dumps(storage)
    assert len(content) < 400
    again = pickle.loads(content)
    assert again == storage
    assert again.read_bytes("a") == b"1"


def test_a_folder_alone_is_a_local_path(storage: Storage) -> None:
    assert storage.folder == disk_path(storage.root)
    assert (storage.folder is None) == isinstance(storage, ObjectStorage)
