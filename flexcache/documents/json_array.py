"""Documents of a file that is one JSON array, read an element at a time."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from typing import Any

from flexcache.documents.sources import Item, not_utf8
from flexcache.errors import DocumentsError

LONGEST = 256 << 20
"""Characters of an element, after which a file counts as broken."""
_SPACE = " \t\r\n"


def is_array(begin: bytes) -> bool:
    """Return True if a file that begins with these bytes is a JSON array."""
    return begin.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def array_items(name: str, blocks: Iterable[bytes]) -> Iterator[Item]:
    """Yield the elements of a JSON array; memory is about that of the largest, and of a block.

    Raises
    ------
    DocumentsError
        It is no whole JSON array.
    """
    text = _Text(_decoded(name, blocks))
    text.take()  # the bracket
    number = 0
    while text.peek() != "]":
        where = f"{name}, element {number}"
        if number:
            if text.peek() != ",":
                raise _broken(where, text)
            text.take()
        try:
            element = text.element()
        except (ValueError, RecursionError) as error:
            raise _broken(where, text) from error
        yield where, element
        number += 1
    text.take()
    if text.peek():
        raise _broken(f"{name}, after its array", text)


class _Text:
    """Text that is read a block at a time, as far as needed."""

    def __init__(self, blocks: Iterator[str]) -> None:
        self._blocks, self._decoder = blocks, json.JSONDecoder()
        self._text, self._at = "", 0

    def peek(self) -> str:
        """Return the next character that is no space, or an empty string at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _SPACE:
                    return self._text[self._at]
                self._at += 1
            if not self._more():
                return ""

    def take(self) -> None:
        """Go past the character that `peek` returns."""
        self.peek()
        self._at += 1

    def element(self) -> Any:
        """Return the JSON value that is next, or raise ValueError."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except ValueError:
                if len(self._text) - self._at > LONGEST or not self._more():
                    raise
                continue
            if end == len(self._text) and self._more():  # a number may go on there
                continue
            self._at = end
            return value

    def found(self) -> str:
        """Return the beginning of the text that has not been read, for errors."""
        return repr(self._text[self._at : self._at + 60]) if self.peek() else "the end of the file"

    def _more(self) -> bool:
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
        "a file that begins as a JSON array and is none",
        where=where,
        expected="objects, separated by commas, and a closing bracket; or JSON Lines: one document on each line",
        found=text.found(),
        remedy="check that the file is whole",
    )
