"""What the activations at a hook point look like, before any are captured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from flexcache.errors import FlexCacheError, SiteError
from flexcache.hooks.locate.encoder_decoder import example_of_both, is_encoder_decoder
from flexcache.hooks.locate.hook_point import HookPoint
from flexcache.hooks.locate.names import text_config, unwrap
from flexcache.hooks.locate.vision import default_pixels, example_pixels, reads_images
from flexcache.hooks.read.activation_hooks import ActivationHooks, Sink, accepts
from flexcache.parallel.meta_model import without_values

EXAMPLE_SHAPE = (3, 11)
"""Sequences and tokens of an example: primes that no number of heads or groups is likely to equal."""

Example = Callable[[int, int], Any]
"""Makes inputs of (sequences, tokens): a mapping of keywords, a tuple of positional inputs, or one tensor."""


class Activation(NamedTuple):
    """Shape of one token's activation, without batch and sequence, and its dtype as computed."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Read(NamedTuple):
    """Inputs, output and a copy of the value at each hook point, shape (batch, sequence, feature…), of one forward."""

    inputs: Any
    values: dict[HookPoint, torch.Tensor]
    output: Any


Reader = Callable[[nn.Module, Sequence[HookPoint], Example | None], Read]
"""Runs a small forward and reads it at points; on several processes, the same whole activations on each."""


def read_example(model: nn.Module, points: Sequence[HookPoint], example: Example | None = None) -> Read:
    """Run the model to its end on a small example, and read it at *points*.

    Raises
    ------
    SiteError
    """
    values: dict[HookPoint, torch.Tensor] = {}

    def sink(point: HookPoint, tensor: torch.Tensor) -> None:
        values[point] = tensor.clone()

    inputs, output = run_example(model, points, sink, example)
    return Read(inputs, values, output)


def measure(
    model: nn.Module,
    points: Sequence[HookPoint],
    *,
    example: Example | None = None,
    through: Callable[[HookPoint, torch.Tensor, Any], torch.Tensor] = lambda point, tensor, inputs: tensor,
    reader: Reader = read_example,
) -> dict[HookPoint, Activation]:
    """Return what each hook point reads, found by one forward of a small example to the model's end.

    The model may be on the meta device: then no weights are needed.

    Parameters
    ----------
    example
        For models that do not take ``input_ids`` of a vocabulary that their configuration states.
    through
        A function that each tensor passes on its way, with the hook point and the example's inputs.
    reader
        How the forward is run and read.

    Raises
    ------
    SiteError
        A module runs twice or not at all or passes no activation per token; layers of one array differ in shape or
        dtype; the model cannot run the example.
    """
    inputs, values, _ = reader(model, points, example)
    found: dict[HookPoint, Activation] = {}
    for point in points:
        tensor = through(point, values[point], inputs)
        found[point] = Activation(tuple(tensor.shape[2:]), tensor.dtype)
        _check_alike(point, next(other for other in points if other.array == point.array), found)
    return found


def example_inputs(model: nn.Module, example: Example | None = None, shape: tuple[int, int] = EXAMPLE_SHAPE) -> Any:
    """Return the inputs of a small example of (sequences, tokens); of images, which have tokens of their own number."""
    if example is not None:
        return example(*shape)
    if reads_images(model):
        return example_pixels(model, shape[0], default_pixels(model), input_device(model))
    return _token_ids(model, shape)


def run_example(
    model: nn.Module, points: Sequence[HookPoint], sink: Sink, example: Example | None = None
) -> tuple[Any, Any]:
    """Run the model to its end on a small example, with *points* feeding *sink*; return the inputs and the output.

    Raises
    ------
    SiteError
    """
    inputs = example_inputs(model, example)
    valueless = without_values(model) if input_device(model).type == "meta" else nullcontext()
    with ActivationHooks(model, points, sink, stop=False) as opened, valueless:
        try:
            if isinstance(inputs, Mapping):
                return inputs, opened.forward(**inputs)
            return inputs, opened.forward(*(inputs if isinstance(inputs, tuple) else (inputs,)))
        except FlexCacheError:
            raise
        except Exception as error:
            raise SiteError(
                "the model cannot run a small example",
                where=type(unwrap(model)).__name__,
                expected=f"a forward of {EXAMPLE_SHAPE[0]} sequences of {EXAMPLE_SHAPE[1]} tokens",
                found=f"{type(error).__name__}: {error}",
                remedy="pass example=, a function of (sequences, tokens) that makes the inputs of the model",
            ) from error


def _check_alike(point: HookPoint, first: HookPoint, found: dict[HookPoint, Activation]) -> None:
    if found[point] != found[first]:
        raise SiteError(
            f"layers of {point.array} differ, so they cannot be one array",
            where=f"{first} and {point}",
            expected=f"shape {found[first].shape} of {found[first].dtype} in every layer",
            found=f"shape {found[point].shape} of {found[point].dtype}",
            remedy="ask for layers that are alike, or give module paths",
        )


def _token_ids(model: nn.Module, shape: tuple[int, int]) -> dict[str, Any]:
    """Return token ids; on the meta device, whose tensors have no values, nothing that transformers would look into.

    It looks into a mask and into positions, and without a cache into those that it makes itself, for packed sequences.
    """
    device = input_device(model)
    cached = {"use_cache": True} if device.type == "meta" and accepts(model, "use_cache") else {}
    if is_encoder_decoder(model):
        return {name: ids.to(device) for name, ids in example_of_both(model, shape).items()} | cached
    config = text_config(model)
    vocabulary = getattr(config, "vocab_size", None)
    if not isinstance(vocabulary, int):
        raise SiteError(
            "the model's configuration states no vocabulary to make an example of",
            where=type(unwrap(model)).__name__,
            remedy="pass example=, a function of (sequences, tokens) that makes the inputs of the model",
        )
    ids = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))
    special = _special_ids(unwrap(model).config, config)
    plain = next((token for token in range(vocabulary) if token not in special), 0)
    for token in special:  # padding shifts RoBERTa's positions, an image token asks for an image
        ids[ids == token] = plain
    return {"input_ids": ids.to(device), **cached}


def _special_ids(*configs: Any) -> set[int]:
    values = [value for config in configs for name, value in vars(config).items() if name.endswith("token_id")]
    return {value for value in values if isinstance(value, int)}


def input_device(model: nn.Module) -> torch.device:
    """Return where *model* wants its inputs; accelerate keeps offloaded weights on meta between forwards."""
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    placed = next((device for device in devices if device is not None), None)
    return next(model.parameters(), torch.empty(0)).device if placed is None else torch.device(placed)
