"""Documents of JSON Lines, text and image files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import PurePosixPath

import pyarrow as pa

from flexcache.documents.sources.file_errors import not_utf8, reading_file
from flexcache.documents.sources.files import plain_suffix
from flexcache.documents.sources.json_array import array_items, is_array
from flexcache.documents.sources.source import CorpusFile, Item
from flexcache.errors import DocumentsError


def jsonl_items(files: list[CorpusFile]) -> Iterator[Item]:
    """Yield the objects of JSON Lines files, compressed or not; blank lines are skipped.

    A file that ends in .json may hold one JSON array of objects instead.
    """
    for file in files:
        if plain_suffix(file.path) == ".json" and is_array(next(_blocks(file), b"")):
            yield from array_items(file.name, _blocks(file))
            continue
        for number, line in enumerate(_lines(file), start=1):
            if not line.strip():
                continue
            where = f"{file.name}, line {number}"
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise not_utf8(where, error) from error
            except (ValueError, RecursionError) as error:
                array = line.lstrip()[:1] == b"["
                raise DocumentsError(
                    "a line that is not JSON",
                    where=where,
                    expected="one JSON object on each line",
                    found="the start of a JSON array" if array else f"{error}: {line[:60]!r}",
                    remedy="write JSON Lines, one document on each line; or call a file with one array .json"
                    if array
                    else "fix or remove the line",
                ) from error
            yield where, record


def text_items(files: list[CorpusFile]) -> Iterator[Item]:
    """Yield one document for each text file: its name relative to the corpus is the id."""
    for file in files:
        with reading_file(file, "text"):
            content = file.path.read_bytes()
        try:
            yield file.name, {"id": file.name, "text": content.decode("utf-8-sig")}
        except UnicodeDecodeError as error:
            raise not_utf8(file.name, error) from error


def image_items(files: list[CorpusFile]) -> Iterator[Item]:
    """Yield one document for each image file: its name relative to the corpus is the id, its folder a label."""
    for file in files:
        folder = PurePosixPath(file.name).parent
        yield (
            file.name,
            {"id": file.name, "image": file.path.absolute(), "folder": "" if folder.name == "" else str(folder)},
        )


def _lines(file: CorpusFile) -> Iterator[bytes]:
    rest: list[bytes] = []
    for block in _blocks(file):
        *lines, last = block.split(b"\n")
        if lines:
            yield b"".join([*rest, lines[0]])
            yield from lines[1:]
            rest = []
        rest.append(last)
    yield b"".join(rest)


def _blocks(file: CorpusFile) -> Iterator[bytes]:
    """Yield the bytes of a file, compressed or not, a MiB at a time."""
    with reading_file(file, "JSON Lines"), pa.input_stream(str(file.path), compression="detect") as stream:
        while block := stream.read(1 << 20):
            yield block
