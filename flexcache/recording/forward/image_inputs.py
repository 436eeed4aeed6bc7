"""What a capture of images needs beside that of texts: what is refused, its example, and what a store says of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flexcache.errors import ConfigError
from flexcache.hooks.locate.vision import compute_dtype
from flexcache.hooks.read.measure import Example, input_device
from flexcache.images.input import ImageInput
from flexcache.model import pad_id
from flexcache.recording.forward.capture_targets import CaptureTargets
from flexcache.recording.forward.objective import LogitDifference, NextTokenLoss
from flexcache.spec import Spec

if TYPE_CHECKING:
    from flexcache.recording.run.model_parallel_group import ModelParallelGroup

Padding = int | ImageInput
"""What makes the inputs of a forward whole: the id of the token for padding; of images, what makes pixels of them."""


def padding(model: torch.nn.Module, tokenizer: Any) -> Padding:
    """Return the id of padding, or, where the tokenizer is an `ImageInput`, that."""
    return tokenizer if isinstance(tokenizer, ImageInput) else pad_id(model, tokenizer)


def tensors(model: torch.nn.Module, arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Return the inputs of a forward on the model's device; pixels in the dtype of its weights."""
    device = input_device(model)
    held = {name: torch.from_numpy(values) for name, values in arrays.items()}
    return {
        name: values.to(device, compute_dtype(model)) if values.is_floating_point() else values.to(device)
        for name, values in held.items()
    }


def check_images(
    model: torch.nn.Module, spec: Spec, targets: CaptureTargets, tokenizer: Any, group: ModelParallelGroup | None = None
) -> Example | None:
    """Return what makes small examples of the images of a capture; None where it is of texts.

    Raises
    ------
    ConfigError
        Images are read, and options are for texts, the objective is of next tokens, or processes share the model.
    """
    if not isinstance(tokenizer, ImageInput):
        return None
    spec.check_images()
    if isinstance(targets.objective, NextTokenLoss | LogitDifference):
        raise ConfigError(
            "gradients of a vision transformer need an objective of your own",
            expected="a function of the model's output and the batch, as lambda output, batch: output.logits[:, 3]",
            found=type(targets.objective).__name__,
        )
    if group is not None and not group.alone:
        raise ConfigError(
            "a model that reads images is run by one process",
            found=f"{group.sizes.tp * group.sizes.pp * group.sizes.dp} processes that share its weights",
            remedy="give each process the whole model: they compute different units of one store",
        )
    return tokenizer.example(model)


def described_patches(tokenizer: Any) -> dict[str, Any]:
    """Return the layout of an image's tokens for the provenance; nothing of texts."""
    return {"patches": tokenizer.patches.to_json()} if isinstance(tokenizer, ImageInput) else {}
