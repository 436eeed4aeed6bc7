"""Add a checksum to a record, and check it, so that any changed byte is detected."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import xxhash

from flexcache.store.storage.atomic_files import json_bytes

CHECKSUM = "xxh3_128"
"""Key of the XXH3-128 of the rest of a record. Records of the first stores have none."""


def with_checksum(content: dict[str, Any]) -> dict[str, Any]:
    """Return a record with its checksum."""
    return {**content, CHECKSUM: _digest(content)}


def check_checksum(data: dict[str, Any], written: bytes, keys: Collection[str]) -> None:
    """Check a record that was read from the bytes *written*.

    Raises
    ------
    ValueError
        Its checksum does not match, or it has other *keys*.
    """
    if unknown := set(data) - {*keys, CHECKSUM}:
        raise ValueError(f"it has {', '.join(sorted(unknown))}")
    content = {name: value for name, value in data.items() if name != CHECKSUM}
    if written != json_bytes(data) or data.get(CHECKSUM) not in (None, _digest(content)):
        raise ValueError("it has other bytes than were written (checksum)")


def _digest(content: dict[str, Any]) -> str:
    return str(xxhash.xxh3_128_hexdigest(json_bytes(content)))
