"""Shapes and dtypes at hook points, measured before a capture by one forward of a small example."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from flexcache.errors import FlexCacheError, SiteError
from flexcache.hooks.locate.encoder_decoder import example_token_ids, is_encoder_decoder
from flexcache.hooks.locate.hook_point import HookPoint
from flexcache.hooks.locate.names import text_config, unwrap_model
from flexcache.hooks.locate.vision import default_image_size, example_pixels, reads_images
from flexcache.hooks.read.activation_hooks import ActivationHooks, Sink, accepts_keyword
from flexcache.parallel.meta_model import without_values

EXAMPLE_SHAPE = (3, 11)
"""Sequences and tokens of an example: primes, unlikely to equal a number of heads or groups."""

Example = Callable[[int, int], Any]
"""Make inputs of (sequences, tokens): a mapping of keywords, a tuple of positional inputs, or one tensor."""


class Activation(NamedTuple):
    """The shape of one token's activation, without batch and sequence, and its dtype in the forward.

    >>> Activation((768,), torch.float32).shape
    (768,)
    """

    shape: tuple[int, ...]
    dtype: torch.dtype


class ExampleRun(NamedTuple):
    """Inputs and output of one forward, and a copy of the value at each hook point, (batch, sequence, feature…)."""

    inputs: Any
    values: dict[HookPoint, torch.Tensor]
    output: Any


ExampleReader = Callable[[nn.Module, Sequence[HookPoint], Example | None], ExampleRun]
"""Run a small forward and read hook points; in a distributed model every rank receives the whole activations."""


def read_example(model: nn.Module, points: Sequence[HookPoint], example: Example | None = None) -> ExampleRun:
    """Run the model to its end on a small example, and return the activations at *points*.

    Raises
    ------
    SiteError
        See `run_example`.
    """
    values: dict[HookPoint, torch.Tensor] = {}

    def sink(point: HookPoint, tensor: torch.Tensor) -> None:
        values[point] = tensor.clone()

    inputs, output = run_example(model, points, sink, example)
    return ExampleRun(inputs, values, output)


def measure(
    model: nn.Module,
    points: Sequence[HookPoint],
    *,
    example: Example | None = None,
    through: Callable[[HookPoint, torch.Tensor, Any], torch.Tensor] = lambda point, tensor, inputs: tensor,
    reader: ExampleReader = read_example,
) -> dict[HookPoint, Activation]:
    """Return the shape and dtype at each hook point, from one forward of a small example to the model's end.

    The model may be on the meta device, so that no weights are needed.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    >>> point = HookPoint("hidden", None, "0")
    >>> measure(model, [point], example=lambda sequences, tokens: torch.zeros(sequences, tokens, 4))[point].shape
    (8,)

    Parameters
    ----------
    example
        For models that do not read ``input_ids`` of a vocabulary that their configuration states.
    through
        Applied to each tensor, with its hook point and the inputs of the example.
    reader
        Runs the forward and reads the activations.

    Raises
    ------
    SiteError
        A module runs twice or not at all, or does not pass one activation for each token; layers of one array differ in
        shape or dtype; or the model cannot run the example.
    """
    inputs, values, _ = reader(model, points, example)
    found: dict[HookPoint, Activation] = {}
    for point in points:
        tensor = through(point, values[point], inputs)
        found[point] = Activation(tuple(tensor.shape[2:]), tensor.dtype)
        _check_alike(point, next(other for other in points if other.array == point.array), found)
    return found


def example_inputs(model: nn.Module, example: Example | None = None, shape: tuple[int, int] = EXAMPLE_SHAPE) -> Any:
    """Return the inputs of a small example of (sequences, tokens); for images the model sets the number of tokens."""
    if example is not None:
        return example(*shape)
    if reads_images(model):
        return example_pixels(model, shape[0], default_image_size(model), input_device(model))
    return _token_ids(model, shape)


def run_example(
    model: nn.Module, points: Sequence[HookPoint], sink: Sink, example: Example | None = None
) -> tuple[Any, Any]:
    """Run the model to its end on a small example, pass *points* to *sink*, and return inputs and output.

    Raises
    ------
    SiteError
        The model cannot run the example, or see `ActivationHooks.forward`.
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
                where=type(unwrap_model(model)).__name__,
                expected=f"a forward of {EXAMPLE_SHAPE[0]} sequences of {EXAMPLE_SHAPE[1]} tokens",
                found=f"{type(error).__name__}: {error}",
                remedy="pass example=, a function of (sequences, tokens) that makes the inputs of the model",
            ) from error


def _check_alike(point: HookPoint, first: HookPoint, found: dict[HookPoint, Activation]) -> None:
    if found[point] != found[first]:
        raise SiteError(
            f"layers of {point.array} differ, so that they cannot be one array",
            where=f"{first} and {point}",
            expected=f"shape {found[first].shape} of {found[first].dtype} in every layer",
            found=f"shape {found[point].shape} of {found[point].dtype}",
            remedy="choose layers of equal shape and dtype, or give module paths",
        )


def _token_ids(model: nn.Module, shape: tuple[int, int]) -> dict[str, Any]:
    """Return token ids; on the meta device without inputs whose values transformers would inspect.

    It inspects masks and positions, and without a cache also positions that it makes itself, to find packed sequences.
    """
    device = input_device(model)
    cached = {"use_cache": True} if device.type == "meta" and accepts_keyword(model, "use_cache") else {}
    if is_encoder_decoder(model):
        return {name: ids.to(device) for name, ids in example_token_ids(model, shape).items()} | cached
    config = text_config(model)
    vocabulary = getattr(config, "vocab_size", None)
    if not isinstance(vocabulary, int):
        raise SiteError(
            "the model's configuration states no vocabulary for an example",
            where=type(unwrap_model(model)).__name__,
            remedy="pass example=, a function of (sequences, tokens) that makes the inputs of the model",
        )
    ids = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))
    special = _special_ids(unwrap_model(model).config, config)
    plain = next((token for token in range(vocabulary) if token not in special), 0)
    for token in special:  # padding shifts RoBERTa's positions, an image token asks for an image
        ids[ids == token] = plain
    return {"input_ids": ids.to(device), **cached}


def _special_ids(*configs: Any) -> set[int]:
    values = [value for config in configs for name, value in vars(config).items() if name.endswith("token_id")]
    return {value for value in values if isinstance(value, int)}


def input_device(model: nn.Module) -> torch.device:
    """Return the device of the model's inputs; accelerate keeps offloaded weights on meta between forwards."""
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    placed = next((device for device in devices if device is not None), None)
    return next(model.parameters(), torch.empty(0)).device if placed is None else torch.device(placed)
