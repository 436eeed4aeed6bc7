"""Storage of a store's files: one protocol, over a local folder or over object storage."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import xxhash

from flexcache.store.storage.atomic_files import fsync_folder, fsync_tree, write_durably
from flexcache.store.storage.location import StoreLocation
from flexcache.store.storage.multipart_upload import PART_BYTES, begin_upload
from flexcache.store.storage.object_path import ObjectPath, Span
from flexcache.store.storage.object_zarr import ObjectStore

BLOCK_BYTES = 1 << 20


class Storage(ABC):
    """The files below one location. Names are relative to it, with slashes.

    Any number of threads and processes may use one location. Reading a missing file raises FileNotFoundError; object
    storage that goes on failing raises UnreachableError.

    Attributes
    ----------
    root : Path or ObjectPath
        The location.
    folder : Path or None
        The location as a local folder; None on object storage, where only these methods apply.
    """

    root: Any
    folder: Path | None

    def size(self, name: str) -> int:
        """Return the bytes of a file."""
        return int((self.root / name).stat().st_size)

    def read_bytes(self, name: str) -> bytes:
        """Return a whole file."""
        return bytes((self.root / name).read_bytes())

    def open_file(self, name: str) -> BinaryIO:
        """Open a file for reading, with seeking."""
        return cast(BinaryIO, (self.root / name).open("rb"))

    @abstractmethod
    def read_ranges(self, name: str, spans: Sequence[Span]) -> list[bytes]:
        """Return parts of a file in the order asked for; a span is its first byte and the one after its last."""

    @abstractmethod
    def read_blocks(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of a file in order; a block is valid until the next one."""

    @abstractmethod
    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file in one step: a reader, or a power failure, finds the old content or the new, never a part."""

    @abstractmethod
    def create_bytes(self, name: str, content: bytes) -> bool:
        """Write a file that does not exist; return True in the one caller, of many at once, that did.

        In a folder, a reader may see a part of it while it is written.
        """

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete a file, durably; a missing one is no error."""

    @abstractmethod
    def list_names(self) -> list[str]:
        """Return the names directly below the location, in no order; none where nothing is there."""

    @abstractmethod
    def file_sizes(self) -> dict[str, int]:
        """Return the bytes of all files at any depth, by name."""

    def list_files(self) -> list[str]:
        """Return the names of all files at any depth, in no order."""
        return list(self.file_sizes())

    @abstractmethod
    def publish(self, folder: Path, last: Sequence[str]) -> None:
        """Make a folder that was prepared on the local disk appear at the location, as one step for readers.

        *last* are names of the files that object storage gets after all others. The last of them decides which of
        several processes has published: nothing is done where it exists.
        """

    @abstractmethod
    def zarr_store(self) -> Any:
        """Return the location as zarr-python opens it for reading."""


@dataclass(frozen=True)
class LocalStorage(Storage):
    """Files below a folder."""

    root: Path

    @property
    def folder(self) -> Path:  # type: ignore[override]
        """The folder."""
        return self.root

    def read_ranges(self, name: str, spans: Sequence[Span]) -> list[bytes]:
        """Return parts of a file, read one after the other."""
        with (self.root / name).open("rb", buffering=0) as file:
            parts = [os.pread(file.fileno(), stop - start, start) for start, stop in spans]
        for (start, stop), part in zip(spans, parts, strict=True):
            if len(part) != stop - start:
                raise EOFError(f"{self.root / name} ends before byte {stop}")
        return parts

    def read_blocks(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of a file in blocks of 1 MiB, all in one buffer."""
        buffer = bytearray(BLOCK_BYTES)
        with (self.root / name).open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                yield memoryview(buffer)[:count]

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file under a temporary name, flush it, and rename it."""
        write_durably(self.root / name, content)

    def create_bytes(self, name: str, content: bytes) -> bool:
        """Write a file that does not exist, by an exclusive open."""
        try:
            with (self.root / name).open("xb") as file:
                file.write(content)
        except FileExistsError:
            return False
        return True

    def delete(self, name: str) -> None:
        """Delete a file and flush its folder."""
        path = self.root / name
        path.unlink(missing_ok=True)
        fsync_folder(path.parent)

    def list_names(self) -> list[str]:
        """Return the names in the folder."""
        try:
            return os.listdir(self.root)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def list_files(self) -> list[str]:
        """Return the names of all files, without looking at them."""
        walked = ((Path(folder), names) for folder, _, names in os.walk(self.root))
        return [(folder / name).relative_to(self.root).as_posix() for folder, names in walked for name in names]

    def file_sizes(self) -> dict[str, int]:
        """Return the bytes of all files, by name."""
        return {name: self.size(name) for name in self.list_files()}

    def publish(self, folder: Path, last: Sequence[str]) -> None:
        """Flush all files of *folder*, and rename it."""
        fsync_tree(folder)
        target = self.root.resolve()
        try:
            folder.rename(target)
        except OSError:
            if not (target / last[-1]).exists():  # else another process, which took this one for dead, was faster
                raise
        fsync_folder(target.parent)

    def zarr_store(self) -> Any:
        """Return the folder."""
        return self.root


@dataclass(frozen=True)
class ObjectStorage(Storage):
    """Objects below a URL. An object appears whole, so that every write is one step."""

    root: ObjectPath
    folder = None

    def read_ranges(self, name: str, spans: Sequence[Span]) -> list[bytes]:
        """Return parts of an object, fetched at the same time."""
        return (self.root / name).read_spans(spans)

    def read_blocks(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of an object in blocks of 4 MiB, 8 of which are fetched at a time."""
        return map(memoryview, (self.root / name).blocks())

    def write_bytes(self, name: str, content: bytes) -> None:
        """Put an object in one request."""
        (self.root / name).write_bytes(content)

    def create_bytes(self, name: str, content: bytes) -> bool:
        """Put an object that does not exist, by ``If-None-Match: *``."""
        return (self.root / name).create(content)

    def delete(self, name: str) -> None:
        """Delete an object."""
        (self.root / name).unlink(missing_ok=True)

    def list_names(self) -> list[str]:
        """Return the names of objects and common prefixes."""
        return [path.name for path in self.root.iterdir()]

    def file_sizes(self) -> dict[str, int]:
        """Return the bytes of all objects, by one listing."""
        return self.root.sizes()

    def publish(self, folder: Path, last: Sequence[str]) -> None:
        """Upload all files of *folder*, and those of *last* after the others."""
        if (self.root / last[-1]).exists():  # another process, which took this one for dead, was faster
            return
        for name in [name for name in relative_files(folder) if name not in last]:
            upload = begin_upload(self.root / name)
            with (folder / name).open("rb") as file:
                for number, part in enumerate(iter(partial(file.read, PART_BYTES), b"")):
                    upload.put(number, part)
            upload.complete()
        for name in last[:-1]:
            self.write_bytes(name, (folder / name).read_bytes())
        self.create_bytes(last[-1], (folder / last[-1]).read_bytes())

    def zarr_store(self) -> Any:
        """Return a read-only store of zarr-python's."""
        return ObjectStore(self.root)


def storage_of(location: StoreLocation) -> Storage:
    """Return the storage at a location.

    >>> from flexcache.store.storage.location import parse_location
    >>> storage = storage_of(parse_location("memory://example"))
    >>> storage.write_bytes("a/b.json", b"{}")
    >>> storage.list_files(), storage.create_bytes("a/b.json", b"[]")
    (['a/b.json'], False)
    """
    return ObjectStorage(location) if isinstance(location, ObjectPath) else LocalStorage(location)


def disk_path(location: StoreLocation) -> Path | None:
    """Return a location as a path on the local disk; None on object storage."""
    return storage_of(location).folder


def digest(path: StoreLocation) -> str:
    """Return the XXH3-128 of a file's bytes as 32 hex digits, in 1 MiB of memory, or 32 on object storage."""
    hasher = xxhash.xxh3_128()
    for block in storage_of(path.parent).read_blocks(path.name):
        hasher.update(block)
    return hasher.hexdigest()


def relative_files(root: StoreLocation, skip: Iterable[str] = ()) -> list[str]:
    """Return the files below *root* as sorted relative POSIX paths, without the top-level names in *skip*."""
    left_out = set(skip)
    return sorted(name for name in storage_of(root).list_files() if name.partition("/")[0] not in left_out)
