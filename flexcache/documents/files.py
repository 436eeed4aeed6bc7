"""The files of a corpus: what a path, a folder, a glob or a list of them means, and the documents of text files."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import pyarrow as pa

from flexcache.documents.json_array import array_items, is_array
from flexcache.documents.sources import CorpusFile, Item, not_utf8, unreadable
from flexcache.errors import DocumentsError, nearest
from flexcache.paths import local_path

FileName = str | bytes | os.PathLike
FORMATS = {
    "parquet": (".parquet", ".pq"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "csv": (".csv",),
    "txt": (".txt",),
    "image": (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
}
COMPRESSED = (".gz", ".zst", ".bz2")  # of jsonl and csv


def find_files(paths: Sequence[FileName], format: str | None) -> tuple[str, list[CorpusFile]]:
    """Return the format and the files that *paths* mean, with names relative to the folder that holds them all.

    A folder means the files below it that have the suffix of a format, hidden ones left out; images only where there is
    nothing else, so that a table of paths may lie beside them. A glob means its matches. Both are in the order of their
    names; a list of paths keeps its order.

    Raises
    ------
    DocumentsError
        No such file, no file of a known format, or files of several formats.
    """
    found: dict[Path, str] = {}
    for given in paths:
        where = local_path(given, DocumentsError, "give the path of a file; to give texts, give dicts")
        matches = _matches(where, os.fsdecode(given), format)
        for path in matches:
            found.setdefault(path, format or format_of(path) or "")
        if not matches:
            raise DocumentsError(
                "no file there has documents",
                where=os.fsdecode(given),
                expected=f"files that end in {_suffixes(format)}, possibly compressed",
                found=_listing(where),
                remedy="name the files themselves; where the suffix does not tell the format,"
                " flexcache.open_documents(…, format='jsonl')",
            )
    unknown = [path for path, kind in found.items() if not kind]
    if unknown:
        raise DocumentsError(
            "a file of an unknown format",
            where=unknown[0].name,
            expected=f"a file that ends in {_suffixes(None)}",
            found=unknown[0].suffix or "no suffix",
            remedy="give flexcache.open_documents(…, format='jsonl'), for example; "
            + nearest(unknown[0].suffix.lstrip("."), tuple(FORMATS)),
        )
    kinds = sorted(set(found.values()))
    if len(kinds) > 1:
        raise DocumentsError(
            "the files have several formats",
            where=", ".join(map(os.fsdecode, paths)),
            expected="one format",
            found=", ".join(kinds),
            remedy=f"give flexcache.open_documents(…, format={kinds[0]!r}), or a glob",
        )
    base = _base(paths, list(found))
    return kinds[0], [CorpusFile(path, Path(os.path.relpath(path, base)).as_posix()) for path in found]


def format_of(path: Path) -> str | None:
    """Return the format that a file's suffixes tell, or None."""
    kind = next((kind for kind, suffixes in FORMATS.items() if _suffix(path) in suffixes), None)
    return None if path.suffix.lower() in COMPRESSED and kind in ("parquet", "txt", "image") else kind


def _suffix(path: Path) -> str:
    """Return the suffix of a file, of a compressed one that before the last."""
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSED else path).suffix.lower()


def _matches(path: Path, given: str, format: str | None) -> list[Path]:
    if path.is_dir():
        below = sorted(
            (file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path))),
            key=lambda file: file.relative_to(path).as_posix(),
        )
        kinds = {file: kind for file in below if (kind := format_of(file)) and kind == (format or kind)}
        pictures = format == "image" or set(kinds.values()) == {"image"}
        return [file for file, kind in kinds.items() if pictures or kind != "image"]
    if path.exists():
        return [path]
    if glob.has_magic(given):  # in what is given, not in the name of the current folder
        pattern = str(path) if "://" in given else os.path.expanduser(given)
        matches = map(local_path, sorted(glob.glob(pattern, recursive=True)))
        return [match for match in matches if match.is_file()]
    names = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
    remedy = nearest(path.name, names) if names and path.suffix else "check the path; to give texts, give dicts"
    raise DocumentsError("there is no such file", where=str(path), remedy=remedy)


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _base(paths: Sequence[FileName], found: list[Path]) -> Path:
    given = local_path(paths[0])
    if len(paths) == 1 and given.is_dir():
        return given
    return Path(os.path.commonpath([path.parent.absolute() for path in found]))


def _suffixes(format: str | None) -> str:
    return ", ".join(FORMATS[format] if format else sum(FORMATS.values(), ()))


def _listing(path: Path) -> str | None:
    if not path.is_dir():
        return None
    names = sorted(entry.name for entry in path.iterdir())
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "") if names else "an empty folder"


def jsonl_items(files: list[CorpusFile]) -> Iterator[Item]:
    """Yield the objects of JSON Lines files, compressed or not; blank lines are skipped.

    A file that ends in .json may hold one JSON array of objects instead.
    """
    for file in files:
        if _suffix(file.path) == ".json" and is_array(next(_blocks(file), b"")):
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
                    remedy="write JSON Lines: one document on each line; or call a file of one array .json"
                    if array
                    else "mend or remove the line",
                ) from error
            yield where, record


def text_items(files: list[CorpusFile]) -> Iterator[Item]:
    """Yield one document for each text file: its name relative to the corpus is the id."""
    for file in files:
        try:
            yield file.name, {"id": file.name, "text": file.path.read_bytes().decode("utf-8-sig")}
        except UnicodeDecodeError as error:
            raise not_utf8(file.name, error) from error
        except OSError as error:
            raise unreadable(file, "text", error) from error


def image_items(files: list[CorpusFile]) -> Iterator[Item]:
    """Yield one document for each image file: its name relative to the corpus is the id, that of its folder a label."""
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
    try:
        with pa.input_stream(str(file.path), compression="detect") as stream:
            while block := stream.read(1 << 20):
                yield block
    except (pa.ArrowException, OSError) as error:
        raise unreadable(file, "JSON Lines", error) from error
