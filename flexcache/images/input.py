"""What stands in the place of a tokenizer where documents are images: a processor, and how a model reads an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flexcache.errors import ConfigError, DocumentsError, MismatchError
from flexcache.hooks.locate.vision import PIXELS, Pixels, compute_dtype, example_pixels, reads_images, token_layout
from flexcache.hooks.read.measure import input_device
from flexcache.images.encoded import decode, pillow
from flexcache.images.processor import ImageProcessor, stored_processor
from flexcache.patches import Patches

if TYPE_CHECKING:
    from flexcache.store.read.store import Store

TRIED = ((48, 64), (96, 40))
"""Width and height of blank pictures, of which a processor must make pixels of one size."""
THREADS = 4
"""That decode the images of a batch."""
NO_TOKEN = -1
"""The id of a token that is no entry of a vocabulary."""


@dataclass(frozen=True)
class ImageInput:
    """How a model reads images.

    Attributes
    ----------
    processor : ImageProcessor
    pixels : (int, int, int)
        Channels, height and width of what it gives.
    patches : Patches
        The tokens of every image.
    dtype : torch.dtype
        In which the model takes pixels.
    """

    processor: ImageProcessor
    pixels: Pixels
    patches: Patches
    dtype: torch.dtype

    def inputs(self, images: Sequence[bytes], names: Sequence[str]) -> dict[str, np.ndarray]:
        """Return what a forward takes of encoded images: ``pixel_values``, float32, (images, channels, height, width).

        Raises
        ------
        DocumentsError
            One of *names* cannot be decoded, or becomes pixels of another size.
        """

        def one(image: bytes, name: str) -> np.ndarray:
            return self.check(self.processor([decode(image, name)]), name)

        if len(images) == 1:
            return {PIXELS: one(images[0], names[0])}
        with ThreadPoolExecutor(THREADS) as pool:  # decoders let go of the interpreter
            return {PIXELS: np.concatenate(list(pool.map(one, images, names)))}

    def check(self, pixels: np.ndarray, name: str) -> np.ndarray:
        """Return the pixels of a document, if they are of the size that the model was tried with.

        Raises
        ------
        DocumentsError
        """
        if pixels.shape[1:] != self.pixels:
            raise DocumentsError(
                "an image becomes pixels of another size than the others",
                where=name,
                expected=f"{self.pixels}: channels, height, width",
                found=str(pixels.shape[1:]),
                remedy="take an image processor that crops or resizes to one size",
            )
        return pixels

    def tokens_of(self, count: int) -> np.ndarray:
        """Return the token ids of so many images: -1 throughout, int32."""
        return np.full(count * self.patches.tokens, NO_TOKEN, np.int32)

    def example(self, model: torch.nn.Module) -> Any:
        """Return a function that makes the inputs of a small example, of so many images."""
        return lambda images, tokens: example_pixels(model, images, self.pixels, input_device(model))

    def describe(self) -> dict[str, Any]:
        """Return what is compared when a store is gone on with: the processor, and the size of its images."""
        return {**self.processor.describe(), "pixels": list(self.pixels)}


def image_input(model: torch.nn.Module, processor: Any) -> ImageInput:
    """Return how *model* reads what *processor* makes of images, found by small forwards.

    Raises
    ------
    ConfigError
        The processor is none, or does not give one size of pixels.
    SiteError
        The model reads no images, or its tokens are not their patches.
    """
    if isinstance(processor, ImageInput):
        return processor
    made = ImageProcessor(processor)
    image = pillow()
    sizes = [made([image.new("RGB", size, (90, 120, 150))]).shape[1:] for size in TRIED]
    if len(set(sizes)) > 1:
        raise ConfigError(
            "the image processor gives pixels of several sizes",
            expected="one size, whatever the picture",
            found=", ".join(f"{size} of {width} × {height}" for (width, height), size in zip(TRIED, sizes)),
            remedy="let it crop, or resize to a height and a width: do_center_crop, size={'height': …, 'width': …}",
        )
    pixels: Pixels = (int(sizes[0][0]), int(sizes[0][1]), int(sizes[0][2]))
    patches = token_layout(model, pixels, input_device(model))
    return ImageInput(made, pixels, patches, compute_dtype(model))


def reader_of(model: torch.nn.Module, tokenizer: Any, content: str) -> Any:
    """Return what turns documents of this `Documents.content` into what a model reads: the tokenizer or `ImageInput`.

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
            remedy="give documents with an image each"
            if reads == "images"
            else "take a vision transformer, or of a"
            " model of texts and images its part that sees: model.vision_model (side: vision in a configuration)",
        )
    return image_input(model, tokenizer) if images else tokenizer


def stored_input(store: Store, model: torch.nn.Module, processor: Any = None) -> ImageInput:
    """Return how *model* reads the images of a store: by *processor*, or by that which the store describes.

    Raises
    ------
    MismatchError
        The processor is not that of the capture, or cannot be made anew.
    """
    said: Mapping[str, Any] = store.provenance.get("tokenizer") or {}
    plain = {name: value for name, value in said.items() if name != "pixels"}
    made = stored_processor(plain, str(store.path)) if processor is None else ImageProcessor(processor)
    found = image_input(model, made)
    if found.describe() != said:
        raise MismatchError(
            "the image processor is not the one that filled the store",
            where=str(store.path),
            expected=str(said),
            found=str(found.describe()),
        )
    return found
