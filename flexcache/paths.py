"""Paths as people write them: ``~``, relative to the current folder, bytes, ``file://`` URLs."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from flexcache.errors import ConfigError, FlexCacheError

FILE_URLS = ("file", "local")
_URL_AS_PATH = re.compile(r"(s3a?|gs|gcs|az|abfss?|https?|hf|memory|file|local):/(?!/)")
_REASONS = {
    errno.ENAMETOOLONG: "a name in it, or the whole, is longer than the file system allows",
    errno.ELOOP: "its links lead in a circle",
    errno.EACCES: "a folder in it may not be searched",
}
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*")
PROBE_BYTES = 4096


def local_path(path: Any, kind: type[FlexCacheError] = ConfigError, remedy: str | None = None) -> Path:
    """Return a path on the file system as an absolute Path, with ``~`` and ``~user`` expanded; links stay links.

    Parameters
    ----------
    path
        Text, bytes, an `os.PathLike`, or a ``file://`` URL.
    kind, remedy
        The error to raise, and its remedy if the general one does not fit.

    Raises
    ------
    ConfigError, or *kind*
        It is not a path, or no file can have that name.

    >>> local_path("/tmp/../tmp/run.zarr/").name, local_path(b"file:///tmp/run.zarr").parts[1:]
    ('run.zarr', ('tmp', 'run.zarr'))
    """

    def wrong(why: str, found: Any = path, advice: str = "check the path") -> FlexCacheError:
        text = repr(found)
        shown = text if len(text) <= 120 else f"{text[:100]}… ({len(text)} characters)"
        return kind(f"a path cannot be used: {why}", expected="a path", found=shown, remedy=remedy or advice)

    if not isinstance(path, str | bytes | os.PathLike):
        raise wrong("it is neither text nor a pathlib.Path")
    try:
        text = os.fsdecode(path)
        text.encode()
        os.fsencode(text)
    except UnicodeError:
        raise wrong("it is not text in UTF-8, or not in the encoding of this system") from None
    scheme, separator, rest = text.partition("://")
    if separator and scheme in FILE_URLS:
        text = rest.removeprefix("localhost")
    elif separator and _SCHEME.fullmatch(scheme):
        raise wrong("it is a URL, and this is about the file system", advice="give the path of a file or folder")
    elif _URL_AS_PATH.match(text):
        raise wrong("a URL has two slashes, of which pathlib.Path takes one away", advice="give the URL as text")
    if not text.strip():
        raise wrong("it is empty")
    if "\0" in text or "\n" in text:
        raise wrong("it holds a line break or a null character")
    try:
        found = Path(text).expanduser().absolute()
        if ".." in found.parts:
            found = found.resolve()
        found.stat()
    except OSError as error:
        if error.errno in _REASONS:
            raise wrong(_REASONS[error.errno]) from None
    except RuntimeError as error:  # of expanduser and resolve
        raise wrong(str(error).splitlines()[0].lower()) from None
    return found


def shown(path: Any) -> str:
    """Return a path for display: relative if it is below the current folder."""
    try:
        below = Path.cwd()
        relative = isinstance(path, Path) and below != Path(below.anchor) and path.is_relative_to(below)
        return str(path.relative_to(below)) if relative else str(path)
    except OSError:  # the current folder is gone
        return str(path)


def output_folder(path: Any) -> Path:
    """Return a folder to which results can be written; a missing one is not created.

    Raises
    ------
    ConfigError
        A file has that name, or nothing can be written there.
    """
    folder = _output(path)
    if not folder.is_dir() and (folder.exists() or folder.is_symlink()):
        raise _no_output(path, "a file" if folder.exists() else "a link that leads nowhere", "a folder")
    check_writable(folder)
    return folder


def output_file(path: Any) -> Path:
    """Return a file to which results can be written; a missing one is not created.

    Raises
    ------
    ConfigError
        A folder has that name, or nothing can be written there.
    """
    file = _output(path)
    if file.is_dir():
        raise _no_output(path, "a folder", "a file")
    if not file.exists():
        check_writable(file.parent)
    elif not file.is_fifo():  # which would wait for a reader
        try:
            with file.open("ab", buffering=0) as opened:
                if file.is_char_device():
                    opened.write(b"\n")
        except OSError as error:
            raise _no_output(path, f"{error.strerror}", "a file that can be written") from None
    return file


def check_writable(folder: Path) -> None:
    """Raise ConfigError if no file can be written in a folder, or in its nearest existing parent.

    A small file is written and removed, since permissions alone do not reveal a full or read-only disk.
    """
    there = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not there.is_dir():
        raise _no_output(folder, f"{there} is not a folder", "a folder, or a path below one")
    try:
        with tempfile.TemporaryFile(dir=there, prefix=".flexcache-") as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
    except OSError as error:
        raise _no_output(folder, f"{error.strerror} in {there}", "a folder that can be written") from None


def _output(path: Any) -> Path:
    if str(path) == "-":
        raise _no_output(path, "-", "a path; results are not written to the standard output")
    return local_path(path)


def _no_output(path: Any, found: str, expected: str) -> ConfigError:
    return ConfigError(
        "results cannot be written there",
        where=str(path),
        expected=expected,
        found=found,
        remedy="choose another place",
    )
