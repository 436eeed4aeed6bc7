"""Forward inputs from images: checks of a capture, its example, and its provenance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from flexcache.errors import ConfigError
from flexcache.hooks.locate.vision import compute_dtype
from flexcache.hooks.locate.vocabulary import pad_token_id
from flexcache.hooks.read.measure import Example, input_device
from flexcache.images.input import ImageInput
from flexcache.recording.forward.batch import Padding
from flexcache.recording.forward.capture_targets import CaptureTargets
from flexcache.recording.forward.objective import LogitDifference, NextTokenLoss
from flexcache.spec import CaptureSpec


def padding(model: torch.nn.Module, tokenizer: Any) -> Padding:
    """Return the id of the padding token, or the tokenizer itself if it is an `ImageInput`."""
    return tokenizer if isinstance(tokenizer, ImageInput) else pad_token_id(model, tokenizer)


def to_tensors(
    model: torch.nn.Module, arrays: Mapping[str, np.ndarray], device: torch.device | None = None
) -> dict[str, torch.Tensor]:
    """Return the inputs of a forward as tensors, pixel values in the dtype of the weights; *device* is the model's."""
    device = input_device(model) if device is None else device
    held = {name: torch.from_numpy(values) for name, values in arrays.items()}
    return {
        name: values.to(device, compute_dtype(model)) if values.is_floating_point() else values.to(device)
        for name, values in held.items()
    }


def check_images(
    model: torch.nn.Module, spec: CaptureSpec, targets: CaptureTargets, tokenizer: Any, processes: int = 1
) -> Example | None:
    """Return the function that makes small example images for a capture; None for a capture of texts.

    ConfigError if an option or the objective of a capture of images is for texts, or several *processes* share the
    model.
    """
    if not isinstance(tokenizer, ImageInput):
        return None
    spec.check_images()
    if isinstance(targets.objective, NextTokenLoss | LogitDifference):
        raise ConfigError(
            "gradients of a vision transformer need a custom objective",
            expected="a function of the model's output and the batch, as lambda output, batch: output.logits[:, 3]",
            found=type(targets.objective).__name__,
        )
    if processes > 1:
        raise ConfigError(
            "a model that reads images can be captured only by processes that each hold all of it",
            found=f"{processes} processes that share its weights",
            remedy="load the whole model in each process: they compute different units of one store",
        )
    return tokenizer.example(model)


def describe_patches(tokenizer: Any) -> dict[str, Any]:
    """Return the layout of the tokens of an image for the provenance; empty for texts."""
    return {"patches": tokenizer.patches.to_json()} if isinstance(tokenizer, ImageInput) else {}
