"""Write local files durably: to a temporary name, flushed to the disk, then renamed."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")


def fsync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename or a new file in it outlives a power failure."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_durably(path: Path, content: bytes) -> None:
    """Write a file so that readers see the old content or the new, never a part, also after a power failure."""
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def temporary_name(path: Path) -> Path:
    """Return a unique name in the folder of *path*, for a file that is renamed to *path* when it is complete."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def is_temporary(name: str | Path) -> bool:
    """Return True for a temporary file of an atomic write, also one that an ended process left."""
    return _TEMPORARY.fullmatch(PurePath(name).name) is not None


def temporaries(root: Path) -> list[Path]:
    """Return the temporary files of metadata, tables and records of a store.

    Those of run logs are left out: processes write these after they stopped working on the store.
    """
    return [
        path
        for pattern in (".*.tmp", "*/.*.tmp", "ledger/*/.*.tmp")
        for path in root.glob(pattern)
        if is_temporary(path) and path.parent.name != "runs"
    ]


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, durably; equal values give equal bytes."""
    write_durably(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Return the bytes of a value as the store's JSON files hold it."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def commit_files(root: Path, files: Iterable[tuple[Path, str]]) -> None:
    """Rename flushed files to their names below *root*, then flush the folders: one journal flush for all of them.

    *files* are where each file is, and its name relative to *root*.
    """
    folders: dict[Path, None] = {}
    for temporary, name in files:
        target = root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.replace(target)
        folders.update(dict.fromkeys(parent for parent in target.parents if parent == root or root in parent.parents))
    for folder in folders:
        fsync_folder(folder)


def fsync_tree(root: Path) -> None:
    """Flush every file and folder below *root*, and *root* itself."""
    for folder, _, names in os.walk(root):
        for name in names:
            with (Path(folder) / name).open("rb") as file:
                os.fsync(file.fileno())
        fsync_folder(Path(folder))
