"""Images as bytes: files unchanged, arrays and PIL images as lossless PNG."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flexcache.errors import ConfigError, DocumentsError

IMAGE, IMAGE_DIGEST = "image", "image_xxh3_128"
"""Names of the columns of encoded images and of their digests."""
FORMS = "a path, the bytes of a file, a PIL image, or a uint8 array of shape (height, width) or (height, width, 3 or 4)"
DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
"""Modes of more than eight bits; a conversion to eight bits would need a choice of range."""
CHANNELS = {2: "L", 3: "RGB", 4: "RGBA"}
AT_A_TIME = 64
"""Most documents of images in a batch; a batch of texts has about a thousand."""


def encode_image(value: Any, where: str, folder: Path | None = None) -> bytes:
    """Return an image as the bytes of an image file.

    Parameters
    ----------
    value
        A path, whose file is read unchanged; bytes, returned unchanged; a PIL image or a uint8 array, encoded as PNG;
        or a mapping of ``bytes`` and ``path``, as in Hugging Face datasets.
    where
        Place of the document, for errors.
    folder
        Folder that a path is relative to.

    Raises
    ------
    DocumentsError
        The value is none of these, or a file that cannot be read.
    ConfigError
        Pillow is not installed.

    Examples
    --------
    >>> encode_image(np.zeros((2, 3), np.uint8), "document 0")[:8]
    b'\\x89PNG\\r\\n\\x1a\\n'
    """
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, str | os.PathLike):
        return _file(Path(os.path.expanduser(value)), where, folder)
    if isinstance(value, Mapping) and ("bytes" in value or "path" in value):
        given = value.get("bytes")
        return encode_image(value.get("path") if given is None else given, where, folder)
    if isinstance(value, np.ndarray):
        return _png(_array_image(value, where), where)
    if hasattr(value, "save") and hasattr(value, "mode") and hasattr(value, "size"):
        return _png(value, where)
    found = type(value).__name__ if value is not None else "null"
    raise DocumentsError("not an image", where=where, expected=FORMS, found=found)


def decode_image(content: bytes, where: str) -> Any:
    """Return the first frame of an encoded image as a PIL image of RGB, rotated by its EXIF data.

    Transparency is dropped, and grey becomes three equal channels.

    Raises
    ------
    DocumentsError
        The bytes are not an image, are truncated, or have more than eight bits a channel.

    Examples
    --------
    >>> decode_image(encode_image(np.zeros((2, 3), np.uint8), ""), "document 0").size
    (3, 2)
    """
    image = pillow()
    from PIL import ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata; an image that cannot be decoded is an error
            found = image.open(io.BytesIO(content))
            if found.mode in DEEP:
                raise _too_deep(found.mode, where)
            found.load()
            return ImageOps.exif_transpose(found).convert("RGB")
    except DocumentsError:
        raise
    except Exception as error:  # OSError, SyntaxError, ValueError, struct.error and others
        raise DocumentsError(
            "an image that cannot be decoded",
            where=where,
            expected="a complete file of a format that Pillow reads, such as JPEG or PNG",
            found=f"{type(error).__name__}: {_first_line(error)}" if content else "no bytes",
            remedy="leave the document out, or write the image again",
        ) from error


def pillow() -> Any:
    """Return the module ``PIL.Image``; raise ConfigError if Pillow is not installed."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError(
            "images need Pillow", found=str(error), remedy="pip install flexcache-activations[images]"
        ) from error
    return Image


def image_memory(value: Any) -> int:
    """Return about how many bytes an image takes in memory; 0 for a path."""
    if isinstance(value, bytes | bytearray):
        return len(value)
    if isinstance(value, np.ndarray):
        return value.nbytes
    width, height = size if isinstance(size := getattr(value, "size", None), tuple) and len(size) == 2 else (0, 0)
    return int(width) * int(height) * 4


def _file(path: Path, where: str, folder: Path | None) -> bytes:
    place = path if folder is None else folder / path
    try:
        return place.read_bytes()
    except (OSError, ValueError) as error:
        raise DocumentsError(
            "the file of an image cannot be read",
            where=where,
            expected="a path relative to the file that names it" if folder else "a path to an image",
            found=f"{path}: {getattr(error, 'strerror', None) or error}",
            remedy="check the path, or leave the document out",
        ) from error


def _array_image(array: np.ndarray, where: str) -> Any:
    flat = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    mode = CHANNELS.get(2 if flat.ndim == 2 else flat.shape[2] if flat.ndim == 3 else 0)
    if flat.dtype != np.uint8 or mode is None or not flat.size:
        raise DocumentsError(
            "an array that is not an image",
            where=where,
            expected="uint8 of shape (height, width) or (height, width, 3 or 4)",
            found=f"{array.dtype} of shape {array.shape}",
            remedy="put the channels last, and scale values to whole numbers from 0 to 255",
        )
    return pillow().fromarray(np.ascontiguousarray(flat))


def _png(image: Any, where: str) -> bytes:
    pillow()
    if image.mode in DEEP:
        raise _too_deep(image.mode, where)
    sink = io.BytesIO()
    try:
        image.save(sink, "PNG")
    except Exception as error:  # a mode that PNG lacks, such as CMYK; a damaged file that is loaded only now
        raise DocumentsError(
            "an image that cannot be kept as PNG",
            where=where,
            expected="an image in the mode L, P, RGB or RGBA",
            found=f"mode {image.mode}: {_first_line(error)}",
            remedy='give image.convert("RGB"), or the path of its file',
        ) from error
    return sink.getvalue()


def _too_deep(mode: str, where: str) -> DocumentsError:
    return DocumentsError(
        "an image of more than eight bits a channel",
        where=where,
        expected="values from 0 to 255",
        found=f"mode {mode}",
        remedy="scale it to eight bits first, with the range of your choice",
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:120] if str(error) else ""
