"""Records that carry a checksum of themselves, so that no byte of them changes unseen."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import xxhash

from flexcache.store.storage.atomic_files import json_bytes

SEAL = "xxh3_128"
"""In a record: the XXH3-128 of the rest of it. Records of the first stores have none."""


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """Return a record with its checksum."""
    return {**content, SEAL: _digest(content)}


def check_seal(data: dict[str, Any], written: bytes, keys: Collection[str]) -> None:
    """Refuse a record, read from the bytes *written*, that is not as it was sealed, or has other than these *keys*.

    Raises
    ------
    ValueError
    """
    if unknown := set(data) - {*keys, SEAL}:
        raise ValueError(f"it has {', '.join(sorted(unknown))}")
    content = {name: value for name, value in data.items() if name != SEAL}
    if written != json_bytes(data) or data.get(SEAL) not in (None, _digest(content)):
        raise ValueError("it has other bytes than were written (checksum)")


def _digest(content: dict[str, Any]) -> str:
    return str(xxhash.xxh3_128_hexdigest(json_bytes(content)))
