"""Errors of files that cannot be read."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from flexcache.documents.sources.source import CorpusFile
from flexcache.errors import DocumentsError


@contextmanager
def reading_file(file: CorpusFile, kind: str) -> Iterator[None]:
    """Raise `unreadable_file` for an error of Arrow or the system."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise unreadable_file(file, kind, error) from error


def unreadable_file(file: CorpusFile, kind: str, error: Exception) -> DocumentsError:
    """Return the error for a file of this *kind* that cannot be read; *error* is that of its reader."""
    found = str(error).splitlines()[0] if str(error) else type(error).__name__
    remedy, encoding = "check that the file is complete, and of the format that its name says", ""
    if isinstance(error, UnicodeDecodeError) or "UTF8" in found:
        name = _encoding(error.object) if isinstance(error, UnicodeDecodeError) else "latin1"
        encoding, remedy = f": its encoding is not UTF-8 but perhaps {name}", _conversion(name)
    return DocumentsError(f"a {kind} file that cannot be read{encoding}", where=file.name, found=found, remedy=remedy)


def not_utf8(where: str, error: UnicodeDecodeError) -> DocumentsError:
    """Return the error for text that is not UTF-8."""
    return DocumentsError(
        "text that is not UTF-8",
        where=where,
        expected="the encoding UTF-8",
        found=f"byte 0x{error.object[error.start]:02x} at offset {error.start}",
        remedy=_conversion(_encoding(error.object)),
    )


def _encoding(start: bytes) -> str:
    """Return the likely encoding of a file that is not UTF-8, by its first bytes."""
    wide = start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or b"\0" in start[:4]
    return "UTF-16" if wide else "latin1"


def _conversion(encoding: str) -> str:
    return f"convert the file, as with iconv -f {encoding} -t utf-8"
