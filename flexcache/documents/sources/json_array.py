"""Documents of a file with one JSON array, parsed one element at a time."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from typing import Any

from flexcache.documents.sources.file_errors import not_utf8
from flexcache.documents.sources.source import Item
from flexcache.errors import DocumentsError

LONGEST = 256 << 20
"""Characters of an element above which a file counts as broken."""
_SPACE = " \t\r\n"


def is_array(begin: bytes) -> bool:
    """Return True if a file that begins with these bytes is a JSON array."""
    return begin.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def array_items(name: str, blocks: Iterable[bytes]) -> Iterator[Item]:
    """Yield the elements of a JSON array; memory is that of the largest element and one block.

    Raises
    ------
    DocumentsError
        The file is not a complete JSON array.
    """
    text = _Text(_decoded(name, blocks))
    text.skip_character()  # the bracket
    number = 0
    while text.next_character() != "]":
        where = f"{name}, element {number}"
        if number:
            if text.next_character() != ",":
                raise _broken(where, text)
            text.skip_character()
        try:
            element = text.read_element()
        except (ValueError, RecursionError) as error:
            raise _broken(where, text) from error
        yield where, element
        number += 1
    text.skip_character()
    if text.next_character():
        raise _broken(f"{name}, after its array", text)


class _Text:
    """Text of which only the blocks that are needed are read."""

    def __init__(self, blocks: Iterator[str]) -> None:
        self._blocks, self._decoder = blocks, json.JSONDecoder()
        self._text, self._at = "", 0

    def next_character(self) -> str:
        """Return the next character that is not a space, or an empty string at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _SPACE:
                    return self._text[self._at]
                self._at += 1
            if not self._read_block():
                return ""

    def skip_character(self) -> None:
        """Skip the character that `next_character` returns."""
        self.next_character()
        self._at += 1

    def read_element(self) -> Any:
        """Return the next JSON value, or raise ValueError."""
        self.next_character()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except ValueError:
                if len(self._text) - self._at > LONGEST or not self._read_block():
                    raise
                continue
            if end == len(self._text) and self._read_block():  # a number may continue there
                continue
            self._at = end
            return value

    def unread_start(self) -> str:
        """Return the start of the unread text, for errors."""
        return repr(self._text[self._at : self._at + 60]) if self.next_character() else "the end of the file"

    def _read_block(self) -> bool:
        block = next(self._blocks, None)
        if block is not None:
            self._text, self._at = self._text[self._at :] + block, 0
        return block is not None


def _decoded(name: str, blocks: Iterable[bytes]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    done = 0
    for block in blocks:
        try:
            yield decoder.decode(block)
        except UnicodeDecodeError as error:
            raise not_utf8(f"{name}, after byte {done:,}", error) from error
        done += len(block)


def _broken(where: str, text: _Text) -> DocumentsError:
    return DocumentsError(
        "a JSON array that cannot be read",
        where=where,
        expected="objects, separated by commas, and a closing bracket; or JSON Lines: one document on each line",
        found=text.unread_start(),
        remedy="check that the file is complete",
    )
