"""Find which sequences may share a batch, by small forwards of the model before the plan.

A model need not honour the attention mask: FNet has none, convolutions read over the end of a sequence, mixtures of
experts of a fixed capacity drop tokens for those of other sequences. So a padded batch is compared with a batch of
equal lengths, and that with one sequence alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import torch

from flexcache.errors import CaptureError, ConfigError, PlanError
from flexcache.hooks.locate.encoder_decoder import TARGET
from flexcache.hooks.read.measure import EXAMPLE_SHAPE, example_inputs, input_device
from flexcache.plan import Batching
from flexcache.recording.forward.batch import Batch
from flexcache.recording.forward.capture_targets import CaptureTargets
from flexcache.recording.forward.image_inputs import Padding
from flexcache.recording.run.forward_loop import FAILURES, forwards
from flexcache.recording.run.model_parallel_group import ModelParallelGroup
from flexcache.site import PATTERN
from flexcache.spec import Spec
from flexcache.store.format.metadata import stored_batching
from flexcache.store.read.store import Store
from flexcache.store.storage.location import Place

LONGEST = 131
"""Most tokens of the longest sequence of the example; the others have half as many, more than common chunks of 64."""
SHORTS = 3
"""Short sequences of the example."""
SMALLEST = EXAMPLE_SHAPE[1]
FLOAT32_EPS, TF32_EPS = 2.0**-23, 2.0**-10
EXACT = 1e-5
"""Bound in float32, relative to a token's norm: some 80 roundings, far above what the layers of a model add up to."""
GRADIENTS = 10
"""Factor by which bounds are wider for gradients, whose rounding has come through the model twice."""
ROUNDINGS = 4
"""Bound in other dtypes, in units of eps, or of the rounding that a batch of another size shows where that is more.
Of the short sequences the median counts, since rounding may send a single token to another expert."""
NEIGHBOURS = 16
"""As `ROUNDINGS`, for a sequence among others of its length; the median of its tokens counts."""
COPIED = 1 << 28
"""Most parameters of a model of lower precision that is judged by a copy in float32, unless its bits are equal."""
SMALL = 0.01
"""Share of a sequence's mean norm below which a token's own norm is no scale: gradients vanish at some tokens."""

Key = tuple[str, int | None]
Values = dict[Key, torch.Tensor]
"""Activations of the short sequences, shape (sequences, tokens, features)."""
LEVELS: tuple[Batching, ...] = get_args(Batching)
SAID = {
    "equal_lengths": "the model lets padding in, so batches hold sequences of one length only",
    "single": "the model mixes the sequences of a batch, so every batch holds one sequence",
}


@dataclass(frozen=True)
class Verdict:
    """The sequences that may share a batch.

    Attributes
    ----------
    batching : Batching
    because : str
        The site that changes otherwise, and by how much; empty where padded batches are right.
    """

    batching: Batching = "padded"
    because: str = ""

    def describe(self) -> dict[str, Any]:
        """Return what the provenance of a store says."""
        return {"batching": {"batches": self.batching, **({"because": self.because} if self.because else {})}}


def notice(store: Store) -> str:
    """Return what a person is told of a store whose batches are not padded; empty where they are."""
    kind = stored_batching(store.provenance) or "padded"
    return "" if kind == "padded" else f"{store.provenance['batching'].get('because')}: {SAID[kind]}"


def recorded(path: Place) -> bool:
    """Return True if there is a store whose batches were planned after `find_batching`."""
    return (path / "zarr.json").exists() and stored_batching(Store(path).provenance) is not None


def find_batching(
    model: torch.nn.Module, targets: CaptureTargets, pad: Padding, spec: Spec, group: ModelParallelGroup
) -> Verdict:
    """Return which sequences may share a batch, so that each has the activations that it has alone.

    Three small forwards: short sequences with a long one, padded; among themselves; and one of them alone. They are
    compared at every site that is read, before transforms. Images are of one size and need no padding. Collective
    where processes share the model.

    Raises
    ------
    ConfigError
        The model cannot run a sequence with an attention mask.
    """
    if not isinstance(pad, int):
        return Verdict()
    targets = replace(targets, transforms={})
    most = min(LONGEST, spec.max_length or LONGEST, spec.batch_tokens // (SHORTS + 1))
    sizes = [most, SMALLEST] if group.alone and most > SMALLEST else [SMALLEST]
    for size in sizes:  # a model may read less than its configuration says, or have no room for more
        batches = _example(model, size, spec.isolated)
        read = [_read(model, targets, pad, group, batch) for batch in batches]
        if not any(isinstance(values, Exception) for values in read):
            break
    alone, eps = read[0], _eps(model)
    failed = f"{type(alone).__name__}: {alone}" if isinstance(alone, Exception) else ""
    if group.alone and eps > FLOAT32_EPS and not _equal(read):
        finer = _read_in_float32(model, targets, pad, group, batches)
        read, eps = (finer, FLOAT32_EPS) if finer else (read, eps)
    verdict = Verdict() if isinstance(read[0], Exception) else _compared(read[0], read[1], read[2], eps)
    told = group.gathered((LEVELS.index(verdict.batching), verdict.because, failed))
    if failed := next((error for *_, error in told if error), ""):
        raise ConfigError(
            "the model cannot run a small sequence",
            where=type(model).__name__,
            expected=f"a forward of 1 × {(SMALLEST + 1) // 2} tokens, given {' and '.join(batches[0].inputs(pad))}",
            found=failed,
            remedy="give a model whose forward takes these",
        )
    level, because, _ = max(told, key=lambda one: one[0])
    return Verdict(LEVELS[level], because)


def check_batching(store: Store, verdict: Verdict) -> None:
    """Raise PlanError if a store has batches in which its model mixes sequences.

    Raises
    ------
    PlanError
    """
    planned = stored_batching(store.provenance) or "padded"
    if LEVELS.index(verdict.batching) > LEVELS.index(planned):
        raise PlanError(
            "the store has batches in which this model mixes sequences",
            where=str(store.path),
            expected="activations of each sequence as if it were alone",
            found=verdict.because,
            remedy="capture into another path: its batches are planned so that this holds",
        )


def _example(model: torch.nn.Module, long: int, isolated: bool) -> tuple[Batch, Batch, Batch]:
    """Return a short sequence alone, several of equal length, and the same behind a long one."""
    short = (long + 1) // 2
    given = {name: values.cpu().numpy() for name, values in example_inputs(model, shape=(SHORTS + 1, long)).items()}
    context = given["input_ids"] if TARGET in given else None

    def batch(lines: Sequence[int]) -> Batch:
        lengths = [short if line else long for line in lines]

        def cut(ids: np.ndarray) -> tuple[np.ndarray, ...]:
            return tuple(ids[line, :length].astype(np.int32) for line, length in zip(lines, lengths, strict=True))

        return Batch(
            unit=0,
            index=0,
            rows=range(sum(lengths)),
            documents=np.array([max(0, line - 1) for line in lines]),
            tokens=cut(given.get(TARGET, given["input_ids"])),
            keep=tuple((0, length) for length in lengths),
            begins=(np.zeros(1, np.int32),) * len(lines) if isolated else None,
            context=None if context is None else cut(context),
        )

    shorts = range(1, SHORTS + 1)
    return batch([1]), batch([*shorts]), batch([0, *shorts])


def _read(
    model: torch.nn.Module, targets: CaptureTargets, pad: Padding, group: ModelParallelGroup, batch: Batch
) -> Values | Exception:
    """Return the activations of the short sequences of a batch, or the error of its forward."""
    patterns = {point.array for point in targets.points if point.side == PATTERN}
    short = min(len(tokens) for tokens in batch.tokens)
    found: Values = {}

    def keep(array: str, layer: int | None, values: torch.Tensor) -> None:
        part = values[-SHORTS:]
        part = part[:, :, :short, :short].transpose(1, 2) if array in patterns else part[:, :short]
        found[array, layer] = part.flatten(2).to("cpu", torch.float32, copy=True)

    try:
        with forwards(model, targets, pad, keep, group) as forward:
            forward(batch)
    except (*FAILURES, CaptureError) as error:
        return error
    return found


def _read_in_float32(
    model: torch.nn.Module, targets: CaptureTargets, pad: Padding, group: ModelParallelGroup, batches: Sequence[Batch]
) -> list[Values | Exception]:
    """Return the activations of a float32 copy, whose rounding hides nothing; empty if there can be no copy."""
    if sum(parameter.numel() for parameter in model.parameters()) > COPIED or input_device(model).type == "meta":
        return []
    try:
        finer = copy.deepcopy(model).float()
        read = [_read(finer, targets, pad, group, batch) for batch in batches]
    except Exception:  # whatever weights raise that are quantised, offloaded or cannot be copied
        return []
    return [] if any(isinstance(values, Exception) for values in read) else read


def _equal(read: Sequence[Values | Exception]) -> bool:
    """Return True if sequences alone, among equal ones and padded have the same bits."""
    alone, equal, padded = read
    if isinstance(alone, Exception) or isinstance(equal, Exception) or isinstance(padded, Exception):
        return False
    return all(
        torch.equal(equal[key][:1], values) and torch.equal(padded[key], equal[key]) for key, values in alone.items()
    )


def _compared(alone: Values, equal: Values | Exception, padded: Values | Exception, eps: float) -> Verdict:
    exact = eps <= FLOAT32_EPS
    if isinstance(equal, Exception):
        return Verdict("single", f"a batch fails: {type(equal).__name__}: {equal}")
    beside = {key: _apart(equal[key][:1], values) for key, values in alone.items()}
    mixed = {key: float(values.max() if exact else values.median()) for key, values in beside.items()}
    bounds = {key: _wider(key) * (EXACT if exact else NEIGHBOURS * eps) for key in mixed}
    if said := _beyond(mixed, bounds):
        return Verdict("single", said)
    if isinstance(padded, Exception):
        return Verdict("equal_lengths", f"a padded batch fails: {type(padded).__name__}: {padded}")
    moved = {key: _apart(padded[key], values) for key, values in equal.items()}
    leaks = {key: float((values if exact else values.median(dim=0).values).max()) for key, values in moved.items()}
    rounding = {key: max(eps, float(values.max())) for key, values in beside.items()}
    bounds = {key: _wider(key) * (EXACT if exact else ROUNDINGS * rounding[key]) for key in leaks}
    said = _beyond(leaks, bounds)
    return Verdict("equal_lengths", said) if said else Verdict()


def _apart(values: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return the difference of each token's activations relative to their norm: shape (sequences, tokens)."""
    norms = torch.maximum(values.norm(dim=2), others.norm(dim=2))
    scale = torch.maximum(norms, SMALL * norms.mean(dim=1, keepdim=True)).clamp(min=1e-30)
    return ((values - others).norm(dim=2) / scale).nan_to_num(nan=0.0)  # what is not finite is the recorder's to name


def _wider(key: Key) -> int:
    return GRADIENTS if key[0].endswith(".grad") else 1


def _beyond(differences: dict[Key, float], bounds: dict[Key, float]) -> str:
    """Return where activations differ most, and by how much, if they differ beyond the bounds; else nothing."""
    worst = max(differences, key=lambda key: differences[key] / bounds[key], default=None)
    if worst is None or differences[worst] <= bounds[worst]:
        return ""
    site = worst[0] if worst[1] is None else f"{worst[0]} of layer {worst[1]}"
    return f"{site} changes by {differences[worst]:.1e} of its norm with what else is in the batch"


def _eps(model: torch.nn.Module) -> float:
    """Return the rounding of a model's arithmetic: that of its weights' dtype, or of TF32 on a GPU."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if dtype != torch.float32 or input_device(model).type != "cuda":
        return torch.finfo(dtype).eps
    convolves = any(isinstance(module, torch.nn.modules.conv._ConvNd) for module in model.modules())
    try:
        tf32 = torch.backends.cuda.matmul.allow_tf32 or (convolves and torch.backends.cudnn.allow_tf32)
    except RuntimeError:  # set by another of torch's interfaces, which do not mix
        tf32 = True
    return TF32_EPS if tf32 else FLOAT32_EPS
