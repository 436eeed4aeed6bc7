"""Objects that are written in parts, front to back, and appear when they are complete, or with their only part."""

from __future__ import annotations

import contextlib
import threading
from typing import Any, Protocol

from flexcache.store.storage.object_path import ObjectPath
from flexcache.store.storage.retry import attempt, unreachable

PART_BYTES = 5 << 20
"""The least that S3 takes as a part, the last one aside."""


class Upload(Protocol):
    """An object that is being written. One thread at a time puts a part.

    Attributes
    ----------
    ordered : bool
        Whether a part must have arrived before the next is put.
    """

    ordered: bool

    def put(self, number: int, content: bytes | memoryview) -> None:
        """Send part *number*, counted from 0."""

    def complete(self) -> None:
        """Make the object appear, whole."""

    def abort(self) -> None:
        """Give the parts up; errors are not told."""


def begin_upload(path: ObjectPath) -> Upload:
    """Return the upload of an object: in independent parts on S3, as a file of fsspec's elsewhere."""
    return MultipartUpload(path) if hasattr(path.fs, "call_s3") else FileUpload(path)


class MultipartUpload:
    """A multipart upload of S3: parts may arrive in any order, and each is sent again if its request fails."""

    ordered = False

    def __init__(self, path: ObjectPath) -> None:
        self.path = path
        bucket, _, key = path.key.partition("/")
        self._place = {"Bucket": bucket, "Key": key}
        self._id: str | None = None
        self._tags: dict[int, str] = {}
        self._lock = threading.Lock()

    def put(self, number: int, content: bytes | memoryview) -> None:
        """Send a part of at least 5 MiB, the last one aside.

        Raises
        ------
        UnreachableError
        """
        if number == 0 and len(content) < PART_BYTES:  # the only one: it needs no upload of several requests
            self.path.write_bytes(bytes(content))
            return
        self._begin()
        found = self._call("upload_part", PartNumber=number + 1, Body=bytes(content))
        with self._lock:
            self._tags[number + 1] = found["ETag"]

    def complete(self) -> None:
        """Make the object appear, whole.

        Raises
        ------
        UnreachableError
        """
        if self._id is None:
            return
        parts = [{"PartNumber": number, "ETag": tag} for number, tag in sorted(self._tags.items())]
        try:
            self._call("complete_multipart_upload", MultipartUpload={"Parts": parts})
        except FileNotFoundError:  # the answer to an earlier attempt was lost: it is complete
            self.path.stat()
        self._id = None

    def abort(self) -> None:
        """Drop the parts that are there."""
        if self._id is not None:
            with contextlib.suppress(Exception):
                self._call("abort_multipart_upload")
            self._id = None

    def _begin(self) -> None:
        with self._lock:
            if self._id is None:
                found = attempt(self.path.url, lambda: self.path.fs.call_s3("create_multipart_upload", **self._place))
                self._id = str(found["UploadId"])

    def _call(self, method: str, **arguments: Any) -> Any:
        place = {**self._place, "UploadId": self._id}
        return attempt(self.path.url, lambda: self.path.fs.call_s3(method, **place, **arguments))


class FileUpload:
    """A file of fsspec's that is open for writing; how often a part is sent again is the driver's to say."""

    ordered = True

    def __init__(self, path: ObjectPath) -> None:
        self.path = path
        self._file: Any = None

    def put(self, number: int, content: bytes | memoryview) -> None:
        """Send the next part.

        Raises
        ------
        UnreachableError
        """
        if self._file is None:
            self._file = attempt(self.path.url, lambda: self.path.fs.open(self.path.key, "wb", block_size=PART_BYTES))
        with told(self.path):
            self._file.write(bytes(content))

    def complete(self) -> None:
        """Make the object appear, whole.

        Raises
        ------
        UnreachableError
        """
        with told(self.path):
            self._file.close()

    def abort(self) -> None:
        """Drop what was written: where a driver cannot, an object may stay that belongs to no committed unit."""
        if self._file is not None and not self._file.closed:
            with contextlib.suppress(Exception):
                self._file.discard()
            with contextlib.suppress(Exception):
                self._file.closed = True  # so that nothing that is collected later closes, and completes, it
            self._file = None


@contextlib.contextmanager
def told(path: ObjectPath) -> Any:
    """Turn a driver's errors into that which a user sees."""
    try:
        yield
    except Exception as error:
        raise unreachable(path.url, error) from error


def abort_uploads(root: ObjectPath) -> int:
    """Abort every multipart upload below a place, and return how many there were; elsewhere than on S3, none."""
    if not hasattr(root.fs, "call_s3"):
        return 0
    bucket, _, prefix = root.key.partition("/")
    call = root.fs.call_s3
    found = attempt(root.url, lambda: call("list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/"))
    uploads = found.get("Uploads", [])
    for upload in uploads:
        with contextlib.suppress(FileNotFoundError):
            place = {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
            attempt(root.url, lambda place=place: call("abort_multipart_upload", **place))  # type: ignore[misc]
    return len(uploads)
