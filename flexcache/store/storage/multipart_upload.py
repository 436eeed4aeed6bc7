"""Upload objects in parts. An object appears when its upload is complete, or with its only part."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from flexcache.errors import FlexCacheError
from flexcache.store.storage.object_path import ObjectPath
from flexcache.store.storage.retry import attempt, translated, unreachable

PART_BYTES = 5 << 20
"""Bytes of the smallest part that S3 accepts, except for the last part."""


def begin_upload(path: ObjectPath) -> Upload:
    """Return the upload of an object: independent parts on S3, one stream elsewhere."""
    return MultipartUpload(path) if path.client.multipart is not None else StreamUpload(path)


class MultipartUpload:
    """A multipart upload to S3: parts may arrive in any order, and each is sent again if its request fails.

    *ordered* is True where a part must have arrived before the next one is sent. One thread at a time sends a part.
    """

    ordered = False

    def __init__(self, path: ObjectPath) -> None:
        self.path = path
        self._id: str | None = None
        self._tags: dict[int, str] = {}
        self._lock = threading.Lock()

    def put(self, number: int, content: bytes | memoryview) -> None:
        """Send part *number*, counted from 0, of at least 5 MiB; the last part may be shorter."""
        if number == 0 and len(content) < PART_BYTES:  # the only one: it needs no upload of several requests
            self.path.write_bytes(bytes(content))
            return
        self._begin()
        found = self._call("upload_part", UploadId=self._id, PartNumber=number + 1, Body=bytes(content))
        with self._lock:
            self._tags[number + 1] = found["ETag"]

    def complete(self) -> None:
        """Make the whole object appear."""
        if self._id is None:
            return
        parts = [{"PartNumber": number, "ETag": tag} for number, tag in sorted(self._tags.items())]
        try:
            self._call("complete_multipart_upload", UploadId=self._id, MultipartUpload={"Parts": parts})
        except FileNotFoundError:  # the answer to an earlier attempt was lost: it is complete
            self.path.stat()
        self._id = None

    def abort(self) -> None:
        """Delete the parts that were sent; raise nothing."""
        if self._id is not None:
            with contextlib.suppress(Exception):
                self._call("abort_multipart_upload", UploadId=self._id)
            self._id = None

    def _begin(self) -> None:
        with self._lock:
            if self._id is None:
                self._id = str(self._call("create_multipart_upload")["UploadId"])

    def _call(self, method: str, **arguments: Any) -> Any:
        path = self.path

        def request() -> Any:
            return getattr(path.client.multipart, method)(Bucket=path.bucket, Key=path.key, **arguments)

        return attempt(path.url, request)


class StreamUpload:
    """An object that obstore writes front to back; its client repeats requests for parts."""

    ordered = True

    def __init__(self, path: ObjectPath) -> None:
        self.path = path
        self._writer: Any = None

    def put(self, number: int, content: bytes | memoryview) -> None:
        """Send the next part."""
        with _clear_errors(self.path):
            if self._writer is None:
                self._writer = _open_writer(self.path)
            self._writer.write(bytes(content))

    def complete(self) -> None:
        """Make the whole object appear."""
        with _clear_errors(self.path):
            self._writer.close()
        self._writer = None

    def abort(self) -> None:
        """Delete the parts that were sent."""
        if self._writer is not None:
            with contextlib.suppress(Exception):
                self._writer.__exit__(InterruptedError, InterruptedError(), None)
            self._writer = None


def _open_writer(path: ObjectPath) -> Any:
    import obstore

    return obstore.open_writer(path.client.objects, path.key, buffer_size=PART_BYTES, max_concurrency=1)


@contextlib.contextmanager
def _clear_errors(path: ObjectPath) -> Iterator[None]:
    """Turn a client's errors into the one that a user sees."""
    try:
        yield
    except FlexCacheError:
        raise
    except Exception as error:
        raise unreachable(path.url, translated(error)) from error


Upload = MultipartUpload | StreamUpload


def abort_uploads(root: ObjectPath) -> int:
    """Abort every multipart upload below *root*, and return their number; 0 elsewhere than on S3."""
    client = root.client.multipart
    if client is None:
        return 0
    place = {"Bucket": root.bucket, "Prefix": f"{root.key}/"}
    uploads = attempt(root.url, lambda: client.list_multipart_uploads(**place)).get("Uploads", [])
    for upload in uploads:
        with contextlib.suppress(FileNotFoundError):
            one = {"Bucket": root.bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
            attempt(root.url, lambda one=one: client.abort_multipart_upload(**one))  # type: ignore[misc]
    return len(uploads)
