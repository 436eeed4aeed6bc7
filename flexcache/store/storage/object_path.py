"""A place on object storage, with that part of pathlib's Path which stores need."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from zlib import crc32

from flexcache.errors import ConfigError
from flexcache.store.storage.retry import attempt

PIECE_BYTES = 4 << 20
"""Of a long read: so much is asked for at a time…"""
PIECES = 8
"""…and so many of these at once."""
SMALL_READ = 1 << 20

_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}

Result = TypeVar("Result")
Span = tuple[int, int]
"""First byte, and the byte after the last."""


@dataclass(frozen=True)
class Status:
    """What is known of an object, by the names that a file's status has.

    Attributes
    ----------
    st_size : int
        Its bytes.
    st_ino, st_mtime_ns : int
        Numbers that change when it is replaced, made of what the storage tells: a tag, or a time.
    """

    st_size: int
    st_ino: int
    st_mtime_ns: int


class ObjectPath:
    """One object, or all that begin with its name and a slash, at a URL such as ``s3://bucket/run.zarr``.

    There are no folders: `mkdir` does nothing, and a name exists while an object has it or begins with it. Requests
    that fail for a while are made again, see `flexcache.store.storage.retry`. Nothing that was listed is remembered.
    Options and credentials are fsspec's: its configuration and the environment.

    Raises
    ------
    ConfigError
        There is no driver for this kind of URL, or it is not installed.
    """

    __slots__ = ("_path", "url")

    def __init__(self, url: str) -> None:
        kind, _, rest = url.partition("://")
        self.url = f"{kind}://{rest.rstrip('/')}"
        self._path = filesystem(self.protocol)._strip_protocol(self.url)

    @property
    def protocol(self) -> str:
        """What stands before the ``://``."""
        return self.url.partition("://")[0]

    @property
    def fs(self) -> Any:
        """The fsspec file system."""
        return filesystem(self.protocol)

    @property
    def key(self) -> str:
        """The name by which the file system knows it: bucket and key, for S3."""
        return str(self._path)

    # Names

    @property
    def name(self) -> str:
        """What comes after the last slash."""
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
        """What comes before the last slash."""
        kind, _, rest = self.url.partition("://")
        return ObjectPath(f"{kind}://{rest.rpartition('/')[0]}")

    def with_name(self, name: str) -> ObjectPath:
        """Return another name at the same place."""
        return self.parent / name

    def absolute(self) -> ObjectPath:
        """Return itself: a URL is absolute."""
        return self

    def resolve(self) -> ObjectPath:
        """Return itself: there are no links."""
        return self

    def is_relative_to(self, other: ObjectPath) -> bool:
        """Whether it lies below another place."""
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
        """Return the size of the object, and what tells it from another of the same name.

        Raises
        ------
        FileNotFoundError
        """
        info = self._do(lambda: self.fs.info(self.key))
        if info["type"] != "file":
            raise FileNotFoundError(2, "no such object", self.url)
        tag, changed = (str(info.get(key, "")) for key in ("ETag", "LastModified"))
        changed = changed or str(info.get("created", ""))
        return Status(int(info["size"]), crc32(tag.encode()), crc32(changed.encode()))

    def is_file(self) -> bool:
        """Whether there is an object of this name."""
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    def exists(self) -> bool:
        """Whether an object has this name, or begins with it and a slash."""
        return self.is_file() or self.is_dir()

    def is_dir(self) -> bool:
        """Whether there are objects below it."""
        return any(True for _ in self.iterdir())

    def iterdir(self) -> Iterator[ObjectPath]:
        """Yield what is directly below it, in no order."""
        for entry in self._listed(lambda: self.fs.ls(self.key, detail=False)):
            name = entry.rstrip("/").rpartition("/")[2]
            if entry.strip("/") != self.key.strip("/"):
                yield self / name

    def glob(self, pattern: str) -> Iterator[ObjectPath]:
        """Yield what is directly below it, with a name that matches."""
        return (path for path in self.iterdir() if fnmatchcase(path.name, pattern))

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every object below it, by relative name."""
        found = self._listed(lambda: self.fs.find(self.key, detail=True))
        start = len(self.key.rstrip("/")) + 1
        return {name[start:]: int(info["size"]) for name, info in dict(found).items()}

    # Reading

    def read_bytes(self) -> bytes:
        """Return the whole object.

        Raises
        ------
        FileNotFoundError
        """
        options = {"max_concurrency": 1} if hasattr(self.fs, "call_s3") else {}  # else it asks for the size first
        return self._do(lambda: bytes(self.fs.cat_file(self.key, **options)))

    def read_from(self, start: int) -> bytes:
        """Return the object from a byte on, or its last bytes where that is negative."""
        return self._do(lambda: bytes(self.fs.cat_file(self.key, start=start)))

    def read_text(self, encoding: str = "utf-8") -> str:
        """Return the whole object as text."""
        return self.read_bytes().decode(encoding)

    def read_spans(self, spans: Sequence[Span]) -> list[bytes]:
        """Return several parts of the object, fetched at the same time.

        Raises
        ------
        FileNotFoundError
        UnreachableError
            Also where fewer bytes come than were asked for, again and again.
        """
        starts, stops = [start for start, _ in spans], [stop for _, stop in spans]

        def request() -> list[bytes]:
            found = self.fs.cat_ranges([self.key] * len(spans), starts, stops, on_error="raise")
            short = [span for span, part in zip(spans, found, strict=True) if len(part) != span[1] - span[0]]
            if short:
                raise EOFError(f"bytes {short[0][0]} to {short[0][1]} came in part only")
            return list(found)

        return self._do(request) if spans else []

    def blocks(self) -> Iterator[bytes]:
        """Yield the bytes of the object in order, in pieces of 4 MiB, 8 of which are on their way at once."""
        size = self.stat().st_size
        cuts = [(start, min(start + PIECE_BYTES, size)) for start in range(0, size, PIECE_BYTES)]
        for number in range(0, len(cuts), PIECES):
            yield from self.read_spans(cuts[number : number + PIECES])

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """Return a file to read, which seeks."""
        if mode != "rb":
            raise ValueError(f"objects are opened to be read, not {mode!r}")
        return io.BufferedReader(_Object(self), SMALL_READ)

    # Writing

    def write_bytes(self, content: bytes) -> None:
        """Put an object in one step, in the place of any that is there."""
        self._do(lambda: self._put(content, "overwrite"))

    def create(self, content: bytes) -> bool:
        """Put an object that is not there, in one step; return whether this call did.

        S3 and Google's storage decide that for one of many that ask at once. Others only look whether it is there
        first, so that two may believe to be the one.
        """
        try:
            self._do(lambda: self._put(content, "create"))
        except FileExistsError:
            return self._do(lambda: self.read_bytes()) == content  # the answer to an earlier attempt was lost
        return True

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object."""
        try:
            self._do(lambda: self.fs.rm_file(self.key))
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
        try:
            self.fs.pipe_file(self.key, content, mode=mode)
        except FileNotFoundError:  # a file system with folders
            self.fs.makedirs(self.fs._parent(self.key), exist_ok=True)
            self.fs.pipe_file(self.key, content, mode=mode)

    def _listed(self, request: Callable[[], Any]) -> Any:
        try:
            return self._do(request)
        except (FileNotFoundError, NotADirectoryError):
            return ()

    def _do(self, request: Callable[[], Result]) -> Result:
        return attempt(self.url, request)


class _Object(io.RawIOBase):
    """An object as a raw file; a read is a request."""

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


def filesystem(protocol: str) -> Any:
    """Return fsspec's file system for a kind of URL; it remembers no listing, since others write too.

    Raises
    ------
    ConfigError
    """
    return _filesystem(protocol, os.getpid())


@lru_cache(maxsize=16)
def _filesystem(protocol: str, process: int) -> Any:
    """Return the file system of this process: connections do not outlive a fork."""
    try:
        import fsspec

        return fsspec.filesystem(protocol, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        package = _PACKAGES.get(protocol, f"fsspec's driver for {protocol}")
        known = isinstance(error, ImportError)
        raise ConfigError(
            f"{protocol}:// cannot be opened",
            found=" ".join(str(error).split())[:300],
            remedy=f"pip install {package}" if known else "use a kind of URL that fsspec knows, or a path",
        ) from error
