"""The files of a corpus, found from paths, folders and globs."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from flexcache.documents.sources.source import CorpusFile
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
COMPRESSED = (".gz", ".zst", ".bz2")
"""Suffixes of compressed files, of the formats jsonl and csv."""


def find_files(paths: Sequence[FileName], format: str | None) -> tuple[str, list[CorpusFile]]:
    """Return the format and the files of *paths*, with names relative to the folder that holds them all.

    A folder stands for the files below it with the suffix of a format, except hidden ones; for images only if there is
    nothing else, since a table of paths may lie next to them. A glob stands for its matches. Both are sorted by name; a
    list of paths keeps its order.

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
                "no files of documents were found",
                where=os.fsdecode(given),
                expected=f"files that end in {_suffixes(format)}, possibly compressed",
                found=_listing(where),
                remedy="name the files themselves; if the suffix does not tell the format,"
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
    """Return the format of a file by its suffixes, or None.

    >>> format_of(Path("corpus.JSONL.gz")), format_of(Path("corpus.parquet.gz"))
    ('jsonl', None)
    """
    kind = next((kind for kind, suffixes in FORMATS.items() if plain_suffix(path) in suffixes), None)
    return None if path.suffix.lower() in COMPRESSED and kind in ("parquet", "txt", "image") else kind


def plain_suffix(path: Path) -> str:
    """Return the suffix of a file, without that of its compression."""
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
    if glob.has_magic(given):  # in the given path, not in the name of the current folder
        pattern = str(path) if "://" in given else os.path.expanduser(given)
        matches = map(local_path, sorted(glob.glob(pattern, recursive=True)))
        return [match for match in matches if match.is_file()]
    names = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
    remedy = nearest(path.name, names) if names and path.suffix else "check the path; to give texts, give dicts"
    raise DocumentsError("no such file", where=str(path), remedy=remedy)


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
