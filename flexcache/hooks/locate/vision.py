"""Image models: the number of tokens of an image, and the token of each patch, found by small forwards."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from flexcache.errors import FlexCacheError, SiteError
from flexcache.hooks.locate.blocks import find_blocks
from flexcache.hooks.locate.evaluation_mode import evaluation_mode
from flexcache.hooks.locate.hook_scope import EarlyStop, hook_scope, stopped_by
from flexcache.hooks.locate.names import modules_by_path, unwrap_model, unwrap_module
from flexcache.patches import Patches

PIXEL_VALUES = "pixel_values"
ImageSize = tuple[int, int, int]
"""Channels, height and width of an image as the model reads it."""

SPECIALS = {
    "cls_token": "cls",
    "class_embedding": "cls",
    "distillation_token": "distillation",
    "register_tokens": "register",
    "detection_tokens": "detection",
}
"""Parameters that hold special tokens, and the names of these, in the order in which models place them."""

_known: WeakKeyDictionary[nn.Module, dict[ImageSize, int]] = WeakKeyDictionary()


def reads_images(model: nn.Module) -> bool:
    """Return True if the main input of a transformers model is pixels."""
    return getattr(unwrap_model(model), "main_input_name", None) == PIXEL_VALUES


def default_image_size(model: nn.Module) -> ImageSize:
    """Return the image size in a model's configuration.

    Raises
    ------
    SiteError
        The configuration has none.
    """
    config = getattr(unwrap_model(model), "config", None)
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, list | tuple) else ()
    if len(sides) != 2 or not isinstance(channels, int):
        raise SiteError(
            "the model's configuration states no image size for an example",
            where=type(unwrap_model(model)).__name__,
            expected="image_size",
            found=repr(size),
            remedy="pass example=, a function of (sequences, tokens) that makes the inputs of the model",
        )
    return channels, int(sides[0]), int(sides[1])


def example_pixels(model: nn.Module, images: int, pixels: ImageSize, device: torch.device) -> dict[str, torch.Tensor]:
    """Return the inputs of a small example: noise with a fixed seed."""
    noise = torch.randn((images, *pixels), generator=torch.Generator().manual_seed(0))
    return {PIXEL_VALUES: noise.to(device, compute_dtype(model))}


def compute_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of a model's first floating-point weight, in which it reads pixels."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def count_image_tokens(model: nn.Module, given: torch.Tensor) -> int:
    """Return the number of tokens that the first block reads of each image.

    The images have shape (images, channels, height, width). The model runs on one image, up to that block, once for
    each image size.

    Raises
    ------
    SiteError
        The model cannot run on the images, or its blocks do not read (images, tokens, hidden).
    """
    known = _known.setdefault(unwrap_model(model), {})
    pixels: ImageSize = (int(given.shape[1]), int(given.shape[2]), int(given.shape[3]))
    if pixels not in known:
        known[pixels] = _read_first_block(model, given[:1]).shape[1]
    return known[pixels]


def find_patches(model: nn.Module, pixels: ImageSize, device: torch.device) -> Patches:
    """Return the token of each patch of an image, checked by forwards that change one patch at a time.

    On the meta device, where tensors have no values, special tokens are assumed to come first, as in most models.

    Raises
    ------
    SiteError
        Blocks change the number of tokens, as hierarchies do; tokens are chosen at random; or patches are not tokens.
    """
    noise = example_pixels(model, 1, pixels, device)[PIXEL_VALUES]
    tokens = count_image_tokens(model, noise)
    _check_flat(model, noise, tokens)
    grid = _grid(model, noise)
    count = grid[0] * grid[1]
    if not 0 < count <= tokens:
        raise _no_patches(model, tokens, grid, "fewer tokens than patches")
    first = tokens - count if device.type == "meta" else _first_patch(model, noise, grid, tokens)
    names = _special_names(model, tokens - count)
    return Patches(tuple(names[:first]), *grid, tuple(names[first:]))


def _check_flat(model: nn.Module, noise: torch.Tensor, tokens: int) -> None:
    """Raise SiteError if a block does not read and return one vector for each token."""
    seen: list[tuple[str, Any]] = []
    path, blocks = find_blocks(model)

    def register(number: int, block: nn.Module) -> RemovableHandle:
        return unwrap_module(block).register_forward_hook(
            lambda _, args, output: seen.append((f"{path}.{number}", _tensor_shape(output)))
        )

    with hook_scope(register(number, block) for number, block in enumerate(blocks)):
        _run_model(model, noise)
    for name, shape in seen:
        if shape is None or len(shape) != 3 or shape[1] != tokens:
            raise SiteError(
                "the blocks of the model do not keep one token for each patch",
                where=f"{name} of {type(unwrap_model(model)).__name__}",
                expected=f"(images, {tokens}, hidden) out of every block, as the first reads it",
                found=str(shape),
                remedy="use a plain vision transformer, or hook the model's modules with FlexModel: hierarchies of"
                " patches (Swin, Hiera, PVT) do not have one row for each token in all layers",
            )


def _grid(model: nn.Module, noise: torch.Tensor) -> tuple[int, int]:
    """Return rows and columns of the output of the convolution that reads the pixels."""
    found: list[tuple[int, int]] = []

    def note(_: nn.Module, args: Any, output: torch.Tensor) -> None:
        found.append((int(output.shape[-2]), int(output.shape[-1])))

    convolutions = [
        m for m in modules_by_path(model).values() if isinstance(m, nn.Conv2d) and m.in_channels == noise.shape[1]
    ]
    with hook_scope(module.register_forward_hook(note) for module in convolutions):
        _read_first_block(model, noise)
    if not found:
        raise SiteError(
            "the patches of the model's images are not known",
            where=type(unwrap_model(model)).__name__,
            expected=f"a convolution over {noise.shape[1]} channels before the first block",
        )
    return found[0]


def _first_patch(model: nn.Module, noise: torch.Tensor, grid: tuple[int, int], tokens: int) -> int:
    """Return the position of the first patch, found by changing each corner of the grid."""
    rows, columns = grid
    high, wide = noise.shape[2] // rows, noise.shape[3] // columns
    before = _read_first_block(model, noise)
    if not torch.equal(before, _read_first_block(model, noise)):
        raise SiteError(
            "the tokens of an image are not the same in every forward",
            where=type(unwrap_model(model)).__name__,
            expected="every patch in its place",
            found="patches that are masked or shuffled at random",
            remedy="use the encoder without its masking, such as the checkpoint of ViT MAE as a ViTModel",
        )
    places = []
    for row, column in {(0, 0): 0, (0, columns - 1): 0, (rows - 1, 0): 0, (rows - 1, columns - 1): 0}:
        changed = noise.clone()
        changed[:, :, row * high : (row + 1) * high, column * wide : (column + 1) * wide] += 1
        touched = (_read_first_block(model, changed) != before).any(-1)[0].nonzero().flatten().tolist()
        places.append(touched[0] - row * columns - column if len(touched) == 1 else -1)
    if len(set(places)) != 1 or not 0 <= places[0] <= tokens - rows * columns:
        raise _no_patches(model, tokens, grid, "a change of one patch that changes other tokens, or none")
    return places[0]


def _special_names(model: nn.Module, count: int) -> list[str]:
    """Return names for *count* special tokens, from the parameters that hold them if the numbers agree."""
    found: list[str] = []
    held = {name.rpartition(".")[2]: value for name, value in unwrap_model(model).named_parameters()}
    for parameter, name in SPECIALS.items():
        if parameter in held:
            number = 1 if held[parameter].ndim == 1 else int(held[parameter].shape[-2])
            plural = name in ("register", "detection")
            found += [f"{name}_{index}" for index in range(number)] if plural else [name] * number
    return found if len(found) == count else [f"special_{index}" for index in range(count)]


def _read_first_block(model: nn.Module, given: torch.Tensor) -> torch.Tensor:
    """Return the input of the first block for some images: (images, tokens, hidden)."""
    path, blocks = find_blocks(model)
    read: list[torch.Tensor] = []
    owner = object()

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        read.append(args[0] if args else kwargs["hidden_states"])
        raise EarlyStop(owner)

    with (
        hook_scope([blocks[0].register_forward_pre_hook(keep, prepend=True, with_kwargs=True)]),
        stopped_by(owner),
    ):
        _run_model(model, given)
    if not read or read[0].ndim != 3 or read[0].shape[0] != given.shape[0]:
        raise SiteError(
            "the blocks of the model do not read one vector for each token of an image",
            where=f"{path}.0 of {type(unwrap_model(model)).__name__}",
            expected=f"({given.shape[0]}, tokens, hidden)",
            found=str(tuple(read[0].shape)) if read else "no tensor",
            remedy="models that keep a map of patches, (images, height, width, hidden), cannot be captured",
        )
    return read[0]


def _run_model(model: nn.Module, given: torch.Tensor) -> None:
    try:
        with evaluation_mode(model), torch.no_grad():
            model(**{PIXEL_VALUES: given})
    except FlexCacheError:
        raise
    except Exception as error:
        raise SiteError(
            "the model cannot run on an image",
            where=type(unwrap_model(model)).__name__,
            expected=f"a forward of pixel_values alone, of shape {tuple(given.shape)}",
            found=f"{type(error).__name__}: {str(error)[:300]}",
            remedy="use an image processor that gives images of the size that the model reads; models that need more"
            " than pixels cannot be captured",
        ) from error


def _tensor_shape(output: Any) -> tuple[int, ...] | None:
    """Return the shape of a module's output, or of its first element; None if that is no tensor."""
    value = output[0] if isinstance(output, tuple | list) and output else output
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def _no_patches(model: nn.Module, tokens: int, grid: tuple[int, int], found: str) -> SiteError:
    return SiteError(
        "the tokens of the model are not the patches of an image",
        where=type(unwrap_model(model)).__name__,
        expected=f"{grid[0]} × {grid[1]} patches among {tokens} tokens, row by row",
        found=found,
        remedy="use a plain vision transformer, whose blocks read one token for each patch",
    )
