"""Open objects with zarr-python for reading.

zarr's own `ObjectStore` takes no prefix within a bucket, and a request that fails or breaks off midway ends its read;
here every request is repeated as all others are.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype

from flexcache.store.storage.object_path import ObjectPath


class ObjectStore(Store):
    """A read-only zarr store of the objects below a URL."""

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    def __init__(self, root: ObjectPath) -> None:
        super().__init__(read_only=True)
        self.root = root

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectStore) and other.root == self.root

    def __str__(self) -> str:
        return str(self.root)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Return an object or a part of it; None if it does not exist."""
        try:
            content = await asyncio.to_thread(self._read, key, byte_range)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None
        return prototype.buffer.from_bytes(content)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Return parts of objects, fetched at the same time."""
        return list(await asyncio.gather(*(self.get(key, prototype, part) for key, part in key_ranges)))

    async def exists(self, key: str) -> bool:
        """Return True if an object exists."""
        return await asyncio.to_thread((self.root / key).is_file)

    async def set(self, key: str, value: Buffer) -> None:
        """Raise ValueError: the store is read-only."""
        raise ValueError("the store was opened for reading")

    async def delete(self, key: str) -> None:
        """Raise ValueError: the store is read-only."""
        raise ValueError("the store was opened for reading")

    async def list(self) -> AsyncIterator[str]:
        """Yield the names of all objects."""
        for name in await asyncio.to_thread(self.root.sizes):
            yield name

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Yield the names of the objects that begin with *prefix*."""
        async for name in self.list():
            if name.startswith(prefix):
                yield name

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Yield the names directly below *prefix*."""
        for path in await asyncio.to_thread(lambda: list((self.root / prefix).iterdir())):
            yield path.name

    def _read(self, key: str, part: ByteRequest | None) -> bytes:
        path = self.root / key
        if isinstance(part, RangeByteRequest):
            return path.read_spans([(part.start, part.end)])[0]
        if isinstance(part, OffsetByteRequest):
            return path.read_from(part.offset)
        if isinstance(part, SuffixByteRequest):
            return path.read_from(-part.suffix)
        return path.read_bytes()
