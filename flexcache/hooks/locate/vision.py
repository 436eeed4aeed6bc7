"""Models that read images: how many tokens an image has, and which of them is which patch, found by small forwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from flexcache.errors import FlexCacheError, SiteError
from flexcache.hooks.locate.blocks import find_blocks
from flexcache.hooks.locate.names import inner, modules, unwrap
from flexcache.patches import Patches

PIXELS = "pixel_values"
Pixels = tuple[int, int, int]
"""Channels, height and width of an image as the model reads it."""

SPECIALS = {
    "cls_token": "cls",
    "class_embedding": "cls",
    "distillation_token": "distillation",
    "register_tokens": "register",
    "detection_tokens": "detection",
}
"""Parameters that hold special tokens, and what these are called, in the order in which models put them."""

_known: WeakKeyDictionary[nn.Module, dict[Pixels, int]] = WeakKeyDictionary()


def reads_images(model: nn.Module) -> bool:
    """Whether the forward of a model of transformers begins with pixels."""
    return getattr(unwrap(model), "main_input_name", None) == PIXELS


def default_pixels(model: nn.Module) -> Pixels:
    """Return the size of image that a model's configuration states.

    Raises
    ------
    SiteError
        It states none.
    """
    config = getattr(unwrap(model), "config", None)
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, list | tuple) else ()
    if len(sides) != 2 or not isinstance(channels, int):
        raise SiteError(
            "the model's configuration states no size of images to make an example of",
            where=type(unwrap(model)).__name__,
            expected="image_size",
            found=repr(size),
            remedy="pass example=, a function of (sequences, tokens) that makes the inputs of the model",
        )
    return channels, int(sides[0]), int(sides[1])


def example_pixels(model: nn.Module, images: int, pixels: Pixels, device: torch.device) -> dict[str, torch.Tensor]:
    """Return the inputs of a small example: noise, always the same."""
    noise = torch.randn((images, *pixels), generator=torch.Generator().manual_seed(0))
    return {PIXELS: noise.to(device, compute_dtype(model))}


def compute_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of a model's first floating-point weight, in which it takes pixels."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def image_tokens(model: nn.Module, given: torch.Tensor) -> int:
    """Return how many tokens the model's first block reads of each image of *given*, (images, channels, height, width).

    The model runs on one image up to that block, once for each size of image.

    Raises
    ------
    SiteError
        The model does not run on them, or its blocks do not read (images, tokens, hidden).
    """
    known = _known.setdefault(unwrap(model), {})
    pixels: Pixels = (int(given.shape[1]), int(given.shape[2]), int(given.shape[3]))
    if pixels not in known:
        known[pixels] = _first(model, given[:1]).shape[1]
    return known[pixels]


def token_layout(model: nn.Module, pixels: Pixels, device: torch.device) -> Patches:
    """Return which token is which patch of images of *pixels*, checked by forwards that change one patch at a time.

    On the meta device, where nothing has values, the special tokens are taken to come first, as most models have them.

    Raises
    ------
    SiteError
        Blocks change the number of tokens, as hierarchies do; tokens are drawn at random; or a patch is no token.
    """
    noise = example_pixels(model, 1, pixels, device)[PIXELS]
    tokens = image_tokens(model, noise)
    _check_flat(model, noise, tokens)
    grid = _grid(model, noise)
    count = grid[0] * grid[1]
    if not 0 < count <= tokens:
        raise _unlike(model, tokens, grid, "fewer tokens than patches")
    first = tokens - count if device.type == "meta" else _first_patch(model, noise, grid, tokens)
    names = _special_names(model, tokens - count)
    return Patches(tuple(names[:first]), *grid, tuple(names[first:]))


def _check_flat(model: nn.Module, noise: torch.Tensor, tokens: int) -> None:
    """Refuse a model whose blocks do not all read and give one vector for each token of an image."""
    seen: list[tuple[str, Any]] = []
    path, blocks = find_blocks(model)
    handles = []
    for number, block in enumerate(blocks):
        name = f"{path}.{number}"
        handles.append(
            inner(block).register_forward_hook(
                lambda _, args, output, name=name: seen.append((name, _shape(_leaf(output))))
            )
        )
    with _removing(*handles):
        _run(model, noise)
    for name, shape in seen:
        if shape is None or len(shape) != 3 or shape[1] != tokens:
            raise SiteError(
                "the blocks of the model do not keep one token for each patch",
                where=f"{name} of {type(unwrap(model)).__name__}",
                expected=f"(images, {tokens}, hidden) out of every block, as the first reads it",
                found=str(shape),
                remedy="hierarchies of patches (Swin, Hiera, PVT) have no one row for each token in all layers: take a"
                " plain vision transformer, or hook the model's modules with FlexModel",
            )


def _grid(model: nn.Module, noise: torch.Tensor) -> tuple[int, int]:
    """Return rows and columns of patches: what the convolution gives that reads the pixels."""
    found: list[tuple[int, int]] = []

    def note(_: nn.Module, args: Any, output: torch.Tensor) -> None:
        found.append((int(output.shape[-2]), int(output.shape[-1])))

    convolutions = [m for m in modules(model).values() if isinstance(m, nn.Conv2d) and m.in_channels == noise.shape[1]]
    handles = [module.register_forward_hook(note) for module in convolutions]
    with _removing(*handles):
        _first(model, noise)
    if not found:
        raise SiteError(
            "how the model cuts images into patches is not known",
            where=type(unwrap(model)).__name__,
            expected=f"a convolution over {noise.shape[1]} channels before the first block",
        )
    return found[0]


def _first_patch(model: nn.Module, noise: torch.Tensor, grid: tuple[int, int], tokens: int) -> int:
    """Return the position of the first patch, by changing each corner of the grid, and seeing which token follows."""
    rows, columns = grid
    high, wide = noise.shape[2] // rows, noise.shape[3] // columns
    before = _first(model, noise)
    if not torch.equal(before, _first(model, noise)):
        raise SiteError(
            "the tokens of an image are not the same in every forward",
            where=type(unwrap(model)).__name__,
            expected="every patch in its place",
            found="patches that are masked or shuffled at random",
            remedy="take the encoder without its masking: the checkpoint of ViT MAE as a ViTModel, for one",
        )
    places = []
    for row, column in {(0, 0): 0, (0, columns - 1): 0, (rows - 1, 0): 0, (rows - 1, columns - 1): 0}:
        changed = noise.clone()
        changed[:, :, row * high : (row + 1) * high, column * wide : (column + 1) * wide] += 1
        touched = (_first(model, changed) != before).any(-1)[0].nonzero().flatten().tolist()
        places.append(touched[0] - row * columns - column if len(touched) == 1 else -1)
    if len(set(places)) != 1 or not 0 <= places[0] <= tokens - rows * columns:
        raise _unlike(model, tokens, grid, "a change of one patch that shows in other tokens, or in none")
    return places[0]


def _special_names(model: nn.Module, count: int) -> list[str]:
    """Return names for so many special tokens, by the parameters that hold them where those add up."""
    found: list[str] = []
    held = {name.rpartition(".")[2]: value for name, value in unwrap(model).named_parameters()}
    for parameter, name in SPECIALS.items():
        if parameter in held:
            number = 1 if held[parameter].ndim == 1 else int(held[parameter].shape[-2])
            plural = name in ("register", "detection")
            found += [f"{name}_{index}" for index in range(number)] if plural else [name] * number
    return found if len(found) == count else [f"special_{index}" for index in range(count)]


def _first(model: nn.Module, given: torch.Tensor) -> torch.Tensor:
    """Return what the first block reads of some images: (images, tokens, hidden)."""
    path, blocks = find_blocks(model)
    read: list[torch.Tensor] = []

    def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        read.append(args[0] if args else kwargs["hidden_states"])
        raise _Enough

    handle = blocks[0].register_forward_pre_hook(take, prepend=True, with_kwargs=True)
    with _removing(handle), suppress(_Enough):
        _run(model, given)
    if not read or read[0].ndim != 3 or read[0].shape[0] != given.shape[0]:
        raise SiteError(
            "the blocks of the model do not read one vector for each token of an image",
            where=f"{path}.0 of {type(unwrap(model)).__name__}",
            expected=f"({given.shape[0]}, tokens, hidden)",
            found=str(tuple(read[0].shape)) if read else "no tensor",
            remedy="models that keep a map of patches, (images, height, width, hidden), cannot be captured",
        )
    return read[0]


def _run(model: nn.Module, given: torch.Tensor) -> None:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            model(**{PIXELS: given})
    except FlexCacheError:
        raise
    except Exception as error:
        raise SiteError(
            "the model cannot run on an image",
            where=type(unwrap(model)).__name__,
            expected=f"a forward of pixel_values alone, of shape {tuple(given.shape)}",
            found=f"{type(error).__name__}: {str(error)[:300]}",
            remedy="take an image processor that gives the size of image the model reads; models that need more than"
            " pixels cannot be captured",
        ) from error
    finally:
        for module in training:
            module.training = True


@contextmanager
def _removing(*handles: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Enough(BaseException):
    """Ends a forward; not an Exception, lest the model's own code catch it."""


def _leaf(output: Any) -> Any:
    return output[0] if isinstance(output, tuple | list) and output else output


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def _unlike(model: nn.Module, tokens: int, grid: tuple[int, int], found: str) -> SiteError:
    return SiteError(
        "the tokens of the model are not the patches of an image",
        where=type(unwrap(model)).__name__,
        expected=f"{grid[0]} × {grid[1]} patches among {tokens} tokens, row by row",
        found=found,
        remedy="take a plain vision transformer, whose blocks read one token for each patch",
    )
