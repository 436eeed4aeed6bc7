"""Images as bytes: files as they are found, arrays and pictures in memory as lossless PNG; and back to pixels."""

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
"""Columns of encoded images, and of their digests."""
FORMS = "a path, the bytes of a file, a PIL image, or a uint8 array of shape (height, width) or (height, width, 3 or 4)"
DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
"""Modes of more than eight bits, which nobody can turn into eight without choosing a range."""
CHANNELS = {2: "L", 3: "RGB", 4: "RGBA"}
AT_A_TIME = 64
"""Documents of images in memory at a time, where texts come by the thousand."""


def encode(value: Any, where: str, folder: Path | None = None) -> bytes:
    """Return an image as bytes that stand on their own.

    Parameters
    ----------
    value
        A path, of which the file's bytes are taken as they are; bytes; a PIL image or a uint8 array, which become PNG;
        or a mapping of ``bytes`` and ``path``, as Hugging Face datasets have it.
    where
        Of the document, for errors.
    folder
        What a path is relative to.

    Raises
    ------
    DocumentsError
        None of these, or a file that cannot be read.
    ConfigError
        Pillow is not installed.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, str | os.PathLike):
        return _file(Path(os.path.expanduser(value)), where, folder)
    if isinstance(value, Mapping) and ("bytes" in value or "path" in value):
        given = value.get("bytes")
        return encode(value.get("path") if given is None else given, where, folder)
    if isinstance(value, np.ndarray):
        return _png(_of_array(value, where), where)
    if hasattr(value, "save") and hasattr(value, "mode") and hasattr(value, "size"):
        return _png(value, where)
    found = type(value).__name__ if value is not None else "null"
    raise DocumentsError("an image that is none", where=where, expected=FORMS, found=found)


def decode(content: bytes, where: str) -> Any:
    """Return the image as a PIL image of RGB, turned as its EXIF data says; of several frames, the first.

    Transparency is left out, and grey becomes three equal channels.

    Raises
    ------
    DocumentsError
        The bytes are no image, are cut short, or have more than eight bits a channel.
    """
    image = pillow()
    from PIL import ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of oddities in metadata; what cannot be decoded is an error
            found = image.open(io.BytesIO(content))
            if found.mode in DEEP:
                raise _deep(found.mode, where)
            found.load()
            return ImageOps.exif_transpose(found).convert("RGB")
    except DocumentsError:
        raise
    except Exception as error:  # decoders raise many kinds: OSError, SyntaxError, ValueError, struct.error
        raise DocumentsError(
            "an image that cannot be decoded",
            where=where,
            expected="a whole file of a format that Pillow reads, such as JPEG or PNG",
            found=f"{type(error).__name__}: {_first_line(error)}" if content else "no bytes",
            remedy="leave the document out, or write the image anew",
        ) from error


def pillow() -> Any:
    """Return the module ``PIL.Image``.

    Raises
    ------
    ConfigError
        It is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError(
            "images need Pillow", found=str(error), remedy="pip install flexcache-activations[images]"
        ) from error
    return Image


def memory(value: Any) -> int:
    """Return the bytes that an image takes in memory, about; a path takes next to none."""
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


def _of_array(array: np.ndarray, where: str) -> Any:
    flat = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    mode = CHANNELS.get(2 if flat.ndim == 2 else flat.shape[2] if flat.ndim == 3 else 0)
    if flat.dtype != np.uint8 or mode is None or not flat.size:
        raise DocumentsError(
            "an array that is no image",
            where=where,
            expected="uint8 of shape (height, width) or (height, width, 3 or 4)",
            found=f"{array.dtype} of shape {array.shape}",
            remedy="put the channels last, and scale values to whole numbers from 0 to 255",
        )
    return pillow().fromarray(np.ascontiguousarray(flat))


def _png(picture: Any, where: str) -> bytes:
    pillow()
    if picture.mode in DEEP:
        raise _deep(picture.mode, where)
    sink = io.BytesIO()
    try:
        picture.save(sink, "PNG")
    except Exception as error:  # modes that PNG has not, such as CMYK; files that are only now read, and damaged
        raise DocumentsError(
            "an image that cannot be kept as PNG",
            where=where,
            expected="a picture in the mode L, P, RGB or RGBA",
            found=f"mode {picture.mode}: {_first_line(error)}",
            remedy='give image.convert("RGB"), or the path of its file',
        ) from error
    return sink.getvalue()


def _deep(mode: str, where: str) -> DocumentsError:
    return DocumentsError(
        "an image of more than eight bits a channel",
        where=where,
        expected="values from 0 to 255",
        found=f"mode {mode}",
        remedy="scale it to eight bits first: how much of the range to keep is for you to say",
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:120] if str(error) else ""
