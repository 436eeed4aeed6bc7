"""A location on object storage, with the part of pathlib's Path that stores need."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar
from zlib import crc32

from flexcache.store.storage.object_client import SCHEMES, ObjectClient, check_scheme, open_client
from flexcache.store.storage.retry import attempt

PIECE_BYTES = 4 << 20
"""Bytes of one request of a long read."""
PIECES = 8
"""Requests of a long read that are on their way at a time."""
SMALL_READ = 1 << 20
Result = TypeVar("Result")
Span = tuple[int, int]
"""First byte, and the byte after the last."""


@dataclass(frozen=True)
class Status:
    """Size in bytes and identity of an object, under the names of a file's status.

    *st_ino* and *st_mtime_ns* change when it is replaced: CRC-32 of its ETag, and of its time of modification.
    """

    st_size: int
    st_ino: int
    st_mtime_ns: int


class ObjectPath:
    """One object, or all objects whose names begin with its name and a slash, such as ``s3://bucket/run.zarr``.

    There are no folders: `mkdir` does nothing, and a name exists while an object has it or begins with it. Requests
    that fail for a while are repeated, see `flexcache.store.storage.retry`. Listings are never cached.
    Options and credentials come from the environment. It pickles as its URL. ConfigError if there is no client for this
    kind of URL, or it is not installed.

    >>> ObjectPath("memory://bucket/run.zarr") / "zarr.json"
    ObjectPath('memory://bucket/run.zarr/zarr.json')
    """

    __slots__ = ("bucket", "key", "url")

    def __init__(self, url: str) -> None:
        scheme, _, rest = url.partition("://")
        check_scheme(scheme)
        rest = rest.rstrip("/")
        self.url = f"{scheme}://{rest}"
        self.bucket, _, self.key = ("", "", rest.lstrip("/")) if scheme == "memory" else rest.partition("/")

    @property
    def scheme(self) -> str:
        """The part of the URL before ``://``."""
        return self.url.partition("://")[0]

    @property
    def client(self) -> ObjectClient:
        """The clients of its bucket, in this process."""
        return open_client(self.scheme, self.bucket)

    # Names

    @property
    def name(self) -> str:
        """The part of the URL after the last slash."""
        return self.url.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The name without its last suffix."""
        return Path(self.name).stem

    @property
    def suffix(self) -> str:
        """The last suffix of the name, with its dot."""
        return Path(self.name).suffix

    @property
    def parent(self) -> ObjectPath:
        """The location one level up."""
        kind, _, rest = self.url.partition("://")
        return ObjectPath(f"{kind}://{rest.rpartition('/')[0]}")

    def with_name(self, name: str) -> ObjectPath:
        """Return the location with another last part."""
        return self.parent / name

    def absolute(self) -> ObjectPath:
        """Return itself: a URL is absolute."""
        return self

    def resolve(self) -> ObjectPath:
        """Return itself: there are no links."""
        return self

    def is_relative_to(self, other: ObjectPath) -> bool:
        """Return True if it is *other*, or lies below it."""
        return f"{self.url}/".startswith(f"{other.url}/")

    def __truediv__(self, name: object) -> ObjectPath:
        return ObjectPath(f"{self.url}{'' if self.url.endswith('://') else '/'}{name}")

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"ObjectPath({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectPath) and other.url == self.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __reduce__(self) -> tuple[type[ObjectPath], tuple[str]]:
        return ObjectPath, (self.url,)

    # What is there

    def stat(self) -> Status:
        """Return the size of the object, and numbers that differ from those of another object of the same name."""
        info = self._do(lambda objects: _obstore().head(objects, self.key))
        tag, changed = info.get("e_tag") or "", info["last_modified"].isoformat()
        return Status(int(info["size"]), crc32(tag.encode()), crc32(changed.encode()))

    def is_file(self) -> bool:
        """Return True if an object has this name."""
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    def exists(self) -> bool:
        """Return True if an object has this name, or a name that begins with it and a slash."""
        return self.is_file() or self.is_dir()

    def is_dir(self) -> bool:
        """Return True if there are objects below it."""
        return any(True for _ in self.iterdir())

    def iterdir(self) -> Iterator[ObjectPath]:
        """Yield the objects and common prefixes directly below it, in no order."""
        found = self._listed(lambda objects: _obstore().list_with_delimiter(objects, self.key or None))
        names = {entry["path"] for entry in found["objects"]} | set(found["common_prefixes"]) if found else set()
        return (self / name.rpartition("/")[2] for name in names if name != self.key)

    def glob(self, pattern: str) -> Iterator[ObjectPath]:
        """Yield the objects and common prefixes directly below it whose names match."""
        return (path for path in self.iterdir() if fnmatchcase(path.name, pattern))

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every object below it, by relative name."""
        start = len(self.key) + 1 if self.key else 0
        found = self._listed(lambda objects: _obstore().list(objects, self.key or None).collect())
        sizes = {entry["path"][start:]: int(entry["size"]) for entry in found if entry["path"] != self.key}
        folders = {name.rpartition("/")[0] for name in sizes}  # some tools put an empty object for a folder
        return {name: size for name, size in sizes.items() if size or name not in folders}

    # Reading

    def read_bytes(self) -> bytes:
        """Return the whole object."""
        return self._do(lambda objects: bytes(_obstore().get(objects, self.key).bytes()))

    def read_from(self, start: int) -> bytes:
        """Return the object from byte *start* to its end; its last bytes where *start* is negative."""
        if start < 0 and SCHEMES[self.scheme] == "az":  # which cannot read from the end
            start = max(0, start + self.stat().st_size)
        part = {"offset": start} if start >= 0 else {"suffix": -start}
        return self._do(lambda objects: bytes(_obstore().get(objects, self.key, options={"range": part}).bytes()))

    def read_text(self, encoding: str = "utf-8") -> str:
        """Return the whole object as text."""
        return self.read_bytes().decode(encoding)

    def read_spans(self, spans: Sequence[Span]) -> list[bytes]:
        """Return several parts of the object, fetched at the same time.

        UnreachableError is also raised if every attempt returns fewer bytes than requested.
        """

        def read_span(span: Span) -> bytes:
            return bytes(_obstore().get_range(self.client.objects, self.key, start=span[0], end=span[1]))

        def request(objects: Any) -> list[bytes]:
            found = list(map(read_span, spans) if len(spans) == 1 else self.client.threads.map(read_span, spans))
            short = [span for span, part in zip(spans, found, strict=True) if len(part) != span[1] - span[0]]
            if short:
                raise EOFError(f"bytes {short[0][0]} to {short[0][1]} came in part only")
            return found

        return self._do(request) if spans else []

    def blocks(self) -> Iterator[bytes]:
        """Yield the bytes of the object in order, in pieces of 4 MiB, 8 of which are requested at a time."""
        size = self.stat().st_size
        cuts = [(start, min(start + PIECE_BYTES, size)) for start in range(0, size, PIECE_BYTES)]
        for number in range(0, len(cuts), PIECES):
            yield from self.read_spans(cuts[number : number + PIECES])

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """Open the object as a buffered file for reading, with seeking."""
        if mode != "rb":
            raise ValueError(f"objects are opened for reading only, not with mode {mode!r}")
        return io.BufferedReader(_Object(self), SMALL_READ)

    # Writing

    def write_bytes(self, content: bytes) -> None:
        """Put an object in one request; replace the one that exists."""
        self._put(content, "overwrite")

    def create(self, content: bytes) -> bool:
        """Put an object that does not exist; return True if this call created it.

        The storage decides which of many simultaneous calls creates it.
        """
        try:
            self._put(content, "create")
        except FileExistsError:
            return self.read_bytes() == content  # True where the answer to an earlier attempt was lost
        return True

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object."""
        try:
            self._do(lambda objects: _obstore().delete(objects, self.key))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: there are no folders."""

    def remove_all(self) -> None:
        """Remove every object below it."""
        for name in self.sizes():
            (self / name).unlink(missing_ok=True)

    # Private

    def _put(self, content: bytes, mode: str) -> None:
        self._do(lambda objects: _obstore().put(objects, self.key, content, mode=mode, use_multipart=False))

    def _listed(self, request: Callable[[Any], Any]) -> Any:
        try:
            return self._do(request)
        except FileNotFoundError:  # there is no such bucket
            return ()

    def _do(self, request: Callable[[Any], Result]) -> Result:
        return attempt(self.url, lambda: request(self.client.objects))


def _obstore() -> Any:
    """Return obstore, which is installed for object storage only."""
    import obstore

    return obstore


class _Object(io.RawIOBase):
    """A raw file over an object; each read is one request."""

    def __init__(self, path: ObjectPath) -> None:
        self._remote, self._size, self._at = path, path.stat().st_size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        stop = min(self._at + len(view), self._size)
        if stop <= self._at:
            return 0
        count = stop - self._at
        view[:count] = self._remote.read_spans([(self._at, stop)])[0]
        self._at = stop
        return count
