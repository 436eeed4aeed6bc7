"""Several models that share their lower blocks, run over the same batches into a store each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.utils import _pytree as pytree

from flexcache.hooks import find_blocks
from flexcache.hooks.locate.names import unwrap_module
from flexcache.hooks.read.replaced_forward import replaced_forwards
from flexcache.recording.forward.batch import Batch, Padding
from flexcache.recording.forward.capture_targets import CaptureTargets
from flexcache.recording.run.batch_forward import Sink, open_forward
from flexcache.recording.run.model_parallel_group import ModelParallelGroup
from flexcache.recording.run.recorder import Recorder
from flexcache.recording.run.run_stats import RunStats
from flexcache.store.read.selection import ArrayKey


@dataclass(frozen=True)
class Variant:
    """One of the models, with the sites that are captured from it.

    Attributes
    ----------
    shared : int
        Blocks that compute what the blocks of the first variant compute; of the first variant, all of its blocks.
    """

    model: nn.Module
    targets: CaptureTargets
    shared: int

    @cached_property
    def blocks(self) -> list[nn.Module]:
        """The blocks that the variant shares with the first."""
        return [unwrap_module(block) for block in find_blocks(self.model)[1][: self.shared]] if self.shared else []

    @cached_property
    def block_numbers(self) -> dict[ArrayKey, int]:
        """The shared block in which each hook point lies; others are left out."""
        if not self.shared:
            return {}
        path = find_blocks(self.model)[0]
        places = {(point.array, point.layer): point.module.removeprefix(f"{path}.") for point in self.targets.points}
        inside = {key: int(place.partition(".")[0]) for key, place in places.items() if place[:1].isdecimal()}
        return {key: number for key, number in inside.items() if number < self.shared}

    def above(self, depth: int) -> CaptureTargets:
        """Return the targets without the hook points inside the first *depth* blocks."""
        below = {key for key, number in self.block_numbers.items() if number < depth}
        sources = {
            text: tuple(point for point in points if (point.array, point.layer) not in below)
            for text, points in self.targets.sources.items()
        }
        return replace(self.targets, sources={text: points for text, points in sources.items() if points})


class VariantRecorders:
    """The recorders of several stores with one plan, used as one `Recorder` by the loop that fills them.

    A unit is claimed in each store that lacks it, so a run that was stopped is completed in whichever stores it left
    units pending. Each store has its own claims and ledger, as if it were captured alone.

    Attributes
    ----------
    working : list of int
        Numbers of the recorders that take the unit in hand; all of them before the first unit.
    receivers : sequence of int
        Numbers of the recorders that take the next rows.
    """

    growing = False  # the plans of variants are made as a whole

    def __init__(self, recorders: Sequence[Recorder]) -> None:
        self._recorders = list(recorders)
        self.working = list(range(len(self._recorders)))
        self.receivers: Sequence[int] = ()
        self.store, self.keys = self._recorders[0].store, self._recorders[0].keys
        self.unit_writer = self

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for recorder in self._recorders:
                stack.enter_context(recorder)
            self._opened = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.__exit__(kind, error, trace)

    @property
    def stats(self) -> RunStats:
        """Sums of rows, bytes and seconds; tokens, forwards and units are those of the store that has the most."""
        every = [recorder.stats for recorder in self._recorders]
        shared = ("began", "units", "tokens", "forward")
        return RunStats(
            **{
                one.name: (max if one.name in shared else sum)(getattr(stats, one.name) for stats in every)
                for one in fields(RunStats)
            }
        )

    @property
    def rows_done(self) -> int:
        """Rows that every store has."""
        return min(recorder.rows_done for recorder in self._recorders)

    @property
    def bytes_put(self) -> int:
        """Bytes of rows that this process has put into all stores."""
        return sum(recorder.bytes_put for recorder in self._recorders)

    @property
    def seconds_stalled(self) -> float:
        """Seconds for which the disk has held up the forward."""
        return sum(recorder.seconds_stalled for recorder in self._recorders)

    @property
    def batch_tokens(self) -> int:
        """Most tokens of a forward, padding included."""
        return self._recorders[0].batch_tokens

    def lower_batch_tokens(self, batch_tokens: int) -> None:
        """Bound the batches of the next units by fewer tokens, in all stores."""
        for recorder in self._recorders:
            recorder.lower_batch_tokens(batch_tokens)

    def largest_batch(self) -> Batch:
        """Return the largest batch of the plan."""
        return self._recorders[0].largest_batch()

    def pending(self) -> list[int]:
        """Return the units that any store lacks."""
        return sorted({unit for recorder in self._recorders for unit in recorder.pending()})

    def claim_unit(self) -> int | None:
        """Claim a unit in each store that lacks it; return None if there is none to claim."""
        for number, recorder in enumerate(self._recorders):
            unit = recorder.claim_unit()
            if unit is not None:
                later = range(number + 1, len(self._recorders))
                self.working = [number, *(n for n in later if self._recorders[n].claim_unit(unit) is not None)]
                return unit
        return None

    def begin_unit(self, unit: int) -> list[Batch]:
        """Open the shards of a unit in the stores that take it, and return its batches."""
        begun = [self._recorders[number].begin_unit(unit) for number in self.working]
        return begun[0]

    @contextmanager
    def fill_batch(self, batch: Batch) -> Iterator[None]:
        """Accept the rows of a batch in the stores that take the unit."""
        with ExitStack() as stack:
            for number in self.working:
                stack.enter_context(self._recorders[number].unit_writer.fill_batch(batch))
            yield

    def put_padded(self, site: str, layer: int | None, values: Any) -> None:
        """Store the kept rows of padded activations in the stores of the receivers."""
        for number in self.receivers:
            self._recorders[number].unit_writer.put_padded(site, layer, values)

    def commit_unit(self) -> None:
        """Commit the unit in each store that takes it."""
        for number in self.working:
            self._recorders[number].commit_unit()

    def abandon_unit(self) -> None:
        """Discard what was written of the unit in each store that takes it."""
        for number in self.working:
            self._recorders[number].abandon_unit()


@contextmanager
def open_variants(
    variants: Sequence[Variant],
    recorders: VariantRecorders,
    pad: Padding,
    sink: Sink,
    group: ModelParallelGroup,
) -> Iterator[Callable[[Batch | None], None]]:
    """Yield a function that runs all variants over a batch whose unit their stores take, as `open_forward` for one.

    The first of them runs whole. The others begin with the output of the last block that they share with it, and the
    rows of the blocks below go to their stores, too.
    """
    opened: dict[tuple[int, int], Callable[[Batch | None], None]] = {}

    def depth(one: int, other: int) -> int:
        return min(variants[one].shared, variants[other].shared)

    def read(number: int, batch: Batch, array: str, layer: int | None, values: torch.Tensor) -> None:
        block = variants[number].block_numbers.get((array, layer)) if number == recorders.working[0] else None
        later = recorders.working[1:] if block is not None else []
        recorders.receivers = [number, *(other for other in later if (block or 0) < depth(number, other))]
        sink(batch, array, layer, values)

    def run(number: int, start: int, batch: Batch | None) -> None:
        if (number, start) not in opened:
            variant, targets = variants[number], variants[number].above(start)

            def keep(batch: Batch, array: str, layer: int | None, values: torch.Tensor) -> None:
                read(number, batch, array, layer, values)

            nothing = not targets.points
            one = open_forward(variant.model, targets, pad, keep, group)
            opened[number, start] = (lambda batch: None) if nothing else stack.enter_context(one)
        opened[number, start](batch)

    def forward(batch: Batch | None) -> None:
        first, *others = recorders.working
        starts = {other: depth(first, other) for other in others}
        with _kept_outputs(variants[first], {start - 1 for start in starts.values() if start}) as outputs:
            run(first, 0, batch)
        for other, start in starts.items():
            with _begin_after(variants[other].blocks[:start], outputs.get(start - 1)):
                run(other, start, batch)

    with ExitStack() as stack:
        yield forward


@contextmanager
def _kept_outputs(variant: Variant, wanted: set[int]) -> Iterator[dict[int, Any]]:
    """Yield copies of the outputs of some blocks, by number, as the forwards in this context compute them."""
    found: dict[int, Any] = {}

    def keep(number: int) -> Callable[..., None]:
        return lambda module, args, output: found.update({number: _copied(output)})

    handles = [variant.blocks[number].register_forward_hook(keep(number), prepend=True) for number in wanted]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _begin_after(blocks: list[nn.Module], output: Any) -> AbstractContextManager[None]:
    """Return a context in which each of some blocks returns a copy of *output*."""
    return replaced_forwards(blocks, lambda number, forward: lambda *args, **kwargs: _copied(output))


def _copied(output: Any) -> Any:
    """Return a copy of an output, since later blocks of some models change it in place."""
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, output)
