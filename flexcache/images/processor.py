"""Image processors: from PIL images to the pixels that a model reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xxhash

from flexcache.errors import ConfigError, MismatchError

VARIABLE = ("pixel_attention_mask", "spatial_shapes", "image_grid_thw", "image_sizes", "num_patches")
"""Further outputs of processors that keep the sizes of images."""


class ImageProcessor:
    """An image processor of transformers, or any callable from a list of PIL images to their pixels.

    The result is an array of float pixels, of shape (images, channels, height, width), or a mapping with it as
    ``pixel_values``. For a processor of texts and images, such as CLIP's, its image processor is used.

    Raises
    ------
    ConfigError
        *processor* is neither.

    >>> processor = ImageProcessor(lambda images: np.ones((len(images), 3, 8, 8)))
    >>> processor(["an image", "another image"]).shape
    (2, 3, 8, 8)
    """

    def __init__(self, processor: Any) -> None:
        inner: Any = processor._inner if isinstance(processor, ImageProcessor) else processor
        inner = getattr(inner, "image_processor", inner)
        if not callable(inner) or hasattr(inner, "convert_tokens_to_ids"):
            raise ConfigError(
                "the documents are images, and no image processor is given",
                expected="AutoImageProcessor.from_pretrained(…), or a function from PIL images to pixels",
                found="None" if inner is None else type(inner).__name__,
                remedy="pass the model's image processor in place of the tokenizer",
            )
        self._inner: Any = inner
        self._from_transformers = hasattr(inner, "to_dict") and hasattr(inner, "model_input_names")

    def __call__(self, images: Sequence[Any]) -> np.ndarray:
        """Return the pixels of PIL images: float32, shape (images, channels, height, width).

        Raises
        ------
        ConfigError
            The processor fails, or returns something else.
        """
        try:
            found = (
                self._inner(images=list(images), return_tensors="np")
                if self._from_transformers
                else self._inner(images)
            )
        except Exception as error:  # a processor can raise any error
            raise ConfigError(
                "the image processor fails",
                where=type(self._inner).__name__,
                found=f"{type(error).__name__}: {str(error)[:200]}",
            ) from error
        more: list[str] = []
        if isinstance(found, Mapping):
            more = [name for name in VARIABLE if name in found]
            found = found.get("pixel_values")
        pixels = np.asarray(found.detach().cpu() if hasattr(found, "detach") else found, np.float32)
        if more or pixels.ndim != 4 or len(pixels) != len(images):
            raise ConfigError(
                "the image processor does not return pixels of one size",
                where=type(self._inner).__name__,
                expected=f"shape ({len(images)}, channels, height, width)",
                found=f"shape {pixels.shape}" + (f", and {', '.join(more)}" if more else ""),
                remedy="models that read images of any size, patch by patch, cannot be captured: use one that resizes",
            )
        return pixels

    def describe(self) -> dict[str, Any]:
        """Return its class, its settings and their digest; for a function, digests of its code."""
        if not self._from_transformers:
            from flexcache.provenance import callable_fingerprint

            return {"class": type(self._inner).__name__, **callable_fingerprint(self._inner)}
        settings = json.loads(json.dumps(self._inner.to_dict(), default=str))
        settings.pop("_processor_class", None)
        name = type(self._inner).__name__
        text = json.dumps([name, settings], sort_keys=True)
        return {"class": name, "settings": settings, "xxh3_128": xxhash.xxh3_128_hexdigest(text.encode())}


def stored_processor(description: Mapping[str, Any], where: str) -> ImageProcessor:
    """Return the image processor of a capture, rebuilt from its `ImageProcessor.describe`.

    Raises
    ------
    MismatchError
        The processor was a function, or the installed transformers has no such class, or rebuilds another processor.
    """
    import transformers
    from transformers.image_processing_utils import BaseImageProcessor

    name, settings = str(description.get("class")), description.get("settings")
    found = getattr(transformers, name, None) if settings else None
    if not (isinstance(found, type) and issubclass(found, BaseImageProcessor)):
        raise MismatchError(
            "the image processor cannot be rebuilt from the settings in the store",
            where=where,
            expected="an image processor of the installed transformers",
            found=name if settings else f"a function, {description.get('function', name)}",
            remedy="pass the processor in place of the tokenizer",
        )
    processor = ImageProcessor(found.from_dict(dict(settings or {})))
    if processor.describe().get("xxh3_128") != description.get("xxh3_128"):
        raise MismatchError(
            "the image processor is not the one that filled the store",
            where=where,
            expected=str(settings),
            found=str(processor.describe().get("settings")),
            remedy="install the version of transformers that the store names, or pass the processor yourself",
        )
    return processor
