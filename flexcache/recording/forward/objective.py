"""Objectives: scalars of a model's output whose gradients at sites are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from flexcache.errors import CaptureError
from flexcache.provenance import callable_fingerprint, recorded_as, select_fingerprint

if TYPE_CHECKING:
    from flexcache.recording.forward.batch import Batch

OBJECTIVE = "objective"
"""Name of the array that holds an objective's values."""
TOKENS = "tokens"
"""Entry of a record that holds the token ids of a `LogitDifference`."""


class Objective(Protocol):
    """A function of a model's output, the sum of whose values is differentiated.

    Values of shape (sequences, longest) or (sequences,) are also stored, on the rows of their tokens or sequences, as
    the array ``objective``; a scalar is not. Each sequence should contribute a term of its own, as in a sum but not in
    a mean over the batch, so that a row does not depend on its batch.

    >>> def first_logit(output, batch):
    ...     return output.logits[:, 0, 0]
    """

    def __call__(self, output: Any, batch: Batch) -> torch.Tensor:
        """Return the objective for a batch, from the right-padded output of a model."""
        ...


@recorded_as("flexcache.recorder.objective.NextTokenLoss", "638153c438bc9ae74b77e41d10075a82")
@dataclass(frozen=True)
class NextTokenLoss:
    """The cross-entropy of the next token at each position, in nats, in float32; 0 at the last token of a sequence.

    If packed documents are isolated, it is 0 at the last token of each document.

    >>> NextTokenLoss()
    NextTokenLoss()
    """

    def __call__(self, output: Any, batch: Batch) -> torch.Tensor:
        """Return losses of shape (sequences, longest)."""
        logits = logits_of(output)
        labels = torch.from_numpy(batch.input_ids(IGNORED)).to(logits.device)
        for line, begins in zip(labels, batch.begins or (), strict=False):
            line[torch.from_numpy(begins.astype("int64"))] = IGNORED
        mask = torch.from_numpy(batch.attention_mask()).to(logits.device)
        following = torch.where(mask[:, 1:].bool(), labels[:, 1:], IGNORED)
        losses = torch.nn.functional.cross_entropy(
            logits[:, : following.shape[1]].float().flatten(0, 1),
            following.flatten(),
            ignore_index=IGNORED,
            reduction="none",
        )
        return torch.nn.functional.pad(losses.view_as(following), (0, 1))


IGNORED = -100


@recorded_as("flexcache.recorder.objective.LogitDifference", "4592dafbe6b71b5c06327c6ec0696801")
@dataclass(frozen=True)
class LogitDifference:
    """The logit of one token minus that of another, at the last token of each sequence, in float32.

    Tokens are ids, or texts of one token each, which `flexcache.capture` looks up in its tokenizer.

    >>> LogitDifference(" Paris", " Rome")
    LogitDifference(token=' Paris', other=' Rome')
    """

    token: int | str
    other: int | str

    def __call__(self, output: Any, batch: Batch) -> torch.Tensor:
        """Return differences of shape (sequences,)."""
        logits = logits_of(output)
        last = torch.tensor([len(tokens) - 1 for tokens in batch.tokens], device=logits.device)
        if isinstance(self.token, str) or isinstance(self.other, str):
            raise CaptureError(
                "tokens that are given as texts have no ids here",
                found=repr(self),
                remedy="pass the objective to flexcache.capture with a tokenizer, or give token ids",
            )
        ends = logits[torch.arange(len(last), device=logits.device), last].float()
        if not all(-ends.shape[1] <= token < ends.shape[1] for token in (self.token, self.other)):
            raise CaptureError(
                "the objective names a token for which the model has no logit",
                expected=f"ids from 0 to {ends.shape[1] - 1}",
                found=f"{self.token} and {self.other}",
            )
        return ends[:, self.token] - ends[:, self.other]


def logits_of(output: Any) -> torch.Tensor:
    """Return the logits of a model's output, shape (sequences, longest, vocabulary).

    Raises
    ------
    CaptureError
        It has none.
    """
    logits = getattr(output, "logits", None)
    if not isinstance(logits, torch.Tensor) or logits.ndim != 3:
        raise CaptureError(
            "the model's output has no logits for the objective",
            expected="output.logits of shape (sequences, longest, vocabulary)",
            found=type(output).__name__,
            remedy="load the model with its head (AutoModelForCausalLM), or give a custom objective",
        )
    return logits


def describe_objective(objective: Objective) -> dict[str, Any]:
    """Return the record of an objective for a store: its fingerprint, and the token ids of a `LogitDifference`."""
    ids = {TOKENS: [objective.token, objective.other]} if isinstance(objective, LogitDifference) else {}
    return {**callable_fingerprint(objective), **ids}


def recorded_objective(description: Mapping[str, Any] | None) -> Objective | None:
    """Return the objective of a store's record; None if it cannot be rebuilt, such as a user's function.

    A `LogitDifference` can be rebuilt since its token ids are recorded; earlier stores lack them.

    >>> recorded_objective(describe_objective(LogitDifference(7, 9)))
    LogitDifference(token=7, other=9)

    Parameters
    ----------
    description
        What `describe_objective` returned; None for the default, `NextTokenLoss`.
    """
    if description is None:
        return NextTokenLoss()
    ids = description.get(TOKENS)
    rebuilt: tuple[Objective, ...] = (NextTokenLoss(), *([] if ids is None else [LogitDifference(*ids)]))
    recorded = select_fingerprint(description)
    return next((one for one in rebuilt if callable_fingerprint(one) == recorded), None)


def check_value(value: Any, batch: Batch) -> torch.Tensor:
    """Return the value of an objective; raise CaptureError if it cannot be differentiated."""
    shapes = ((), (batch.shape[0],), batch.shape)
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or tuple(value.shape) not in shapes:
        raise CaptureError(
            "the objective returned nothing that can be differentiated",
            expected=f"a tensor of shape {batch.shape}, ({batch.shape[0]},) or ()",
            found=f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__,
        )
    return value


def spread_by_token(value: torch.Tensor, batch: Batch) -> torch.Tensor | None:
    """Return the values of an objective by token, shape (sequences, longest, 1); None for a scalar."""
    if value.ndim == 0:
        return None
    spread = value if value.ndim == 2 else value[:, None].expand(batch.shape)
    return spread.float().unsqueeze(2).contiguous()
