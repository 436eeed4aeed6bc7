"""Format names and numbers of a store as text for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from flexcache.array_spec import ArraySpec

TABLE_COLUMNS = frozenset(
    {"id", "source_index", "n_tokens", "text", "text_xxh3_128", "messages_xxh3_128"}
    | {"image_xxh3_128", "row_start", "n_rows"}
)
"""Columns of the documents that are not labels."""


def layer_text(layers: tuple[int, ...] | None) -> str:
    """Format layer numbers: ``0–29``, or ``0, 8, 16``."""
    if layers is None:
        return "–"
    if len(layers) > 2 and layers == tuple(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}–{layers[-1]}"
    return ", ".join(map(str, layers))


def layers_text(array: ArraySpec) -> str:
    """Format the captured layers of an array: ``0–29``, or ``0–29 (5 on disk, 25 virtual)``."""
    if not array.virtual:
        return layer_text(array.layers)
    on_disk, virtual = len(array.layers or ()), len(array.virtual)
    held = f"{on_disk} on disk, {virtual} virtual" if on_disk else "virtual"
    return f"{layer_text(tuple(sorted((*(array.layers or ()), *array.virtual))))} ({held})"


def shorten(value: Any, length: int = 160) -> str:
    """Return a value as text of at most *length* characters; None is ``nothing``.

    >>> shorten({"rows": "all"}), shorten("abcdef", 4), shorten(None)
    ('{"rows": "all"}', 'abc…', 'nothing')
    """
    if isinstance(value, Mapping):
        value = json.dumps(value, ensure_ascii=False)
    text = "nothing" if value is None else str(value)
    return text if len(text) <= length else text[: length - 1] + "…"


def join_lines(lines: Sequence[str], most: int = 12) -> str:
    """Return at most *most* lines as an indented list for an error text, with an ellipsis for the others.

    >>> join_lines(["a", "b", "c"], 2)
    '\\n    a\\n    b\\n    …'
    """
    return "\n    ".join(["", *lines[:most], *(["…"] if len(lines) > most else [])])


def size(count: float) -> str:
    """Format a number of bytes.

    >>> size(999), size(1_500_000), size(2.5e12)
    ('999 B', '1.5 MB', '2.5 TB')
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError
