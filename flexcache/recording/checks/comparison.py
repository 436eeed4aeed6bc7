"""Compare the activations of the same tokens between small forwards, with and without company in the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from flexcache.recording.forward.batch import Batch, Padding
from flexcache.recording.forward.capture_targets import CaptureTargets
from flexcache.recording.run.batch_forward import open_forward
from flexcache.recording.run.model_parallel_group import ModelParallelGroup

Key = tuple[str, int | None]
Values = dict[Key, torch.Tensor]
"""Activations in float32, by array and layer."""


@dataclass(frozen=True)
class TrialForward:
    """A model, and the targets at which it is read in small forwards."""

    model: torch.nn.Module
    targets: CaptureTargets
    pad: Padding
    group: ModelParallelGroup

    def read_values(self, batch: Batch, select: Callable[[str, torch.Tensor], torch.Tensor | None]) -> Values:
        """Return what *select* takes of the values of each array, on the host; it is left out where that is None."""
        found: Values = {}

        def keep(_: Batch, array: str, layer: int | None, values: torch.Tensor) -> None:
            part = select(array, values)
            if part is not None:
                found[array, layer] = part.to("cpu", torch.float32, copy=True)

        with open_forward(self.model, self.targets, self.pad, keep, self.group) as forward:
            forward(batch)
        return found


def relative_differences(values: torch.Tensor, others: torch.Tensor, floor: float = 0.0) -> torch.Tensor:
    """Return the difference of two activations of each token relative to the larger norm: shape (…, tokens).

    Parameters
    ----------
    values, others
        Shape (…, tokens, features).
    floor
        Share of the mean norm of a sequence below which a token's own norm is no scale.
    """
    norms = torch.maximum(values.norm(dim=-1), others.norm(dim=-1))
    scale = torch.maximum(norms, floor * norms.mean(dim=-1, keepdim=True)).clamp(min=1e-30)
    return (values - others).norm(dim=-1) / scale


def name_key(key: Key) -> str:
    """Return an array and its layer for an error message."""
    return key[0] if key[1] is None else f"{key[0]} of layer {key[1]}"
