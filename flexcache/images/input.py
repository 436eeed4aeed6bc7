"""The input of a vision transformer: an image processor, and the tokens of an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flexcache.errors import ConfigError, DocumentsError, MismatchError
from flexcache.hooks.locate.vision import (
    PIXEL_VALUES,
    ImageSize,
    compute_dtype,
    example_pixels,
    find_patches,
    reads_images,
)
from flexcache.hooks.read.measure import input_device
from flexcache.images.encoded import decode_image, pillow
from flexcache.images.processor import ImageProcessor, stored_processor
from flexcache.patches import Patches

TRIED_SIZES = ((48, 64), (96, 40))
"""Width and height of blank images, for which a processor must return pixels of one size."""
THREADS = 4
"""Threads that decode the images of a batch."""
NO_TOKEN = -1
"""The id of a token without entry in a vocabulary."""


@dataclass(frozen=True)
class ImageInput:
    """The image processor of a model and the layout of its tokens; used in place of a tokenizer.

    Attributes
    ----------
    processor : ImageProcessor
    pixels : (int, int, int)
        Channels, height and width of the processor's output.
    patches : Patches
        The tokens of every image.
    dtype : torch.dtype
        The type of the pixels that the model reads.
    """

    processor: ImageProcessor
    pixels: ImageSize
    patches: Patches
    dtype: torch.dtype

    def inputs(self, images: Sequence[bytes], names: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the model inputs of encoded images: ``pixel_values``, float32, (images, channels, height, width).

        Raises
        ------
        DocumentsError
            An image, named by *names*, cannot be decoded, or its pixels have another size.
        """

        def read_pixels(image: bytes, name: str) -> np.ndarray:
            return self._check_size(self.processor([decode_image(image, name)]), name)

        if len(images) == 1:
            return {PIXEL_VALUES: read_pixels(images[0], names[0])}
        with ThreadPoolExecutor(THREADS) as pool:  # decoders release the GIL
            return {PIXEL_VALUES: np.concatenate(list(pool.map(read_pixels, images, names)))}

    def _check_size(self, pixels: np.ndarray, name: str) -> np.ndarray:
        """Return *pixels*; raise DocumentsError if they have another size than the model was tried with."""
        if pixels.shape[1:] != self.pixels:
            raise DocumentsError(
                "the pixels of an image have another size than those of the others",
                where=name,
                expected=f"{self.pixels}: channels, height, width",
                found=str(pixels.shape[1:]),
                remedy="use an image processor that crops or resizes to one size",
            )
        return pixels

    def tokens_of(self, count: int) -> np.ndarray:
        """Return the token ids of *count* images: -1 for each token, int32."""
        return np.full(count * self.patches.tokens, NO_TOKEN, np.int32)

    def example(self, model: torch.nn.Module) -> Any:
        """Return a function from a number of images to the model inputs of a small example."""
        return lambda images, tokens: example_pixels(model, images, self.pixels, input_device(model))

    def describe(self) -> dict[str, Any]:
        """Return the processor and the size of its pixels, which are compared when a capture is resumed."""
        return {**self.processor.describe(), "pixels": list(self.pixels)}


def image_input(model: torch.nn.Module, processor: Any) -> ImageInput:
    """Return the `ImageInput` of a model and its image processor, found by small forwards.

    Raises
    ------
    ConfigError
        *processor* is not an image processor, or does not return pixels of one size.
    SiteError
        The model reads no images, or its tokens are not their patches.
    """
    if isinstance(processor, ImageInput):
        return processor
    made = ImageProcessor(processor)
    image = pillow()
    sizes = [made([image.new("RGB", size, (90, 120, 150))]).shape[1:] for size in TRIED_SIZES]
    if len(set(sizes)) > 1:
        raise ConfigError(
            "the image processor returns pixels of several sizes",
            expected="one size for all images",
            found=", ".join(f"{size} of {width} × {height}" for (width, height), size in zip(TRIED_SIZES, sizes)),
            remedy="let it crop, or resize to a height and a width: do_center_crop, size={'height': …, 'width': …}",
        )
    pixels: ImageSize = (int(sizes[0][0]), int(sizes[0][1]), int(sizes[0][2]))
    patches = find_patches(model, pixels, input_device(model))
    return ImageInput(made, pixels, patches, compute_dtype(model))


def model_input(model: torch.nn.Module, tokenizer: Any, content: str) -> Any:
    """Return the `ImageInput` for documents of images, or the tokenizer for other documents.

    Parameters
    ----------
    tokenizer
        The model's tokenizer or image processor.
    content
        See `Documents.content`.

    Raises
    ------
    ConfigError
        The documents are images, and the model reads text, or the other way round.
    """
    images = content == "image"
    if images != reads_images(model):
        reads, are = ("images", "not") if reads_images(model) else ("text", "images")
        raise ConfigError(
            f"the model reads {reads}, and the documents are {are}",
            where=type(model).__name__,
            found=content,
            remedy="give documents with images"
            if reads == "images"
            else "use a vision transformer, or the vision tower of a model of texts and images: model.vision_model"
            " (side: vision in a configuration)",
        )
    return image_input(model, tokenizer) if images else tokenizer


def stored_image_input(
    recorded: Mapping[str, Any] | None, model: torch.nn.Module, processor: Any = None, *, where: str
) -> ImageInput:
    """Return the `ImageInput` for the images of a store, with *processor* or the one that the store describes.

    Parameters
    ----------
    recorded
        ``store.provenance.tokenizer``.
    where
        The store, for errors.

    Raises
    ------
    MismatchError
        The processor is not that of the capture, or cannot be rebuilt.
    """
    stored = recorded or {}
    plain = {name: value for name, value in stored.items() if name != "pixels"}
    made = stored_processor(plain, where) if processor is None else ImageProcessor(processor)
    found = image_input(model, made)
    if found.describe() != stored:
        raise MismatchError(
            "the image processor is not the one that filled the store",
            where=where,
            expected=str(stored),
            found=str(found.describe()),
        )
    return found
