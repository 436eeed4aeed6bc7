"""Plain replacements for characters that an output stream cannot encode."""

from __future__ import annotations

import codecs
import io
from typing import Any

PLAIN = {
    "–": "-",
    "—": "-",
    "−": "-",
    "━": "-",
    "─": "-",
    "╺": "-",
    "╸": "-",
    "·": "*",
    "•": "*",
    "×": "x",
    "÷": "/",
    "→": "->",
    "…": "...",
    "±": "+/-",
    "≠": "!=",
    "✗": "x",
    "⏎": "|",
    "‖": "|",
    "²": "2",
    "³": "3",
    "’": "'",
}
HANDLER = "flexcache.plain"


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(PLAIN.get(character, "?") for character in error.object[error.start : error.end]), error.end


codecs.register_error(HANDLER, _plain)


def make_encodable(*streams: Any) -> None:
    """Let text streams replace characters that they cannot encode by plain ones, instead of failing.

    >>> stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    >>> make_encodable(stream)
    >>> stream.write("3 × 4 …"), stream.flush(), stream.buffer.getvalue()
    (7, None, b'3 x 4 ...')
    """
    for stream in streams:
        encoding = str(getattr(stream, "encoding", None) or "utf-8")
        if isinstance(stream, io.TextIOWrapper) and not encoding.lower().replace("-", "").startswith("utf"):
            stream.reconfigure(errors=HANDLER)
