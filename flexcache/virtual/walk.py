"""Walk up the blocks of a model: from stored residual streams, or from the tokens, to the sites that are wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from flexcache import hooks
from flexcache.array_spec import DTYPES, ArraySpec
from flexcache.errors import ConfigError, FlexCacheError
from flexcache.hooks.locate.evaluation_mode import evaluation_mode
from flexcache.hooks.locate.hook_scope import hook_scope
from flexcache.hooks.locate.names import unwrap_copies, unwrap_module
from flexcache.hooks.read.block_skipping import Container, container_of, skip_blocks, tensor_output
from flexcache.hooks.read.measure import input_device, run_example
from flexcache.identity import check_model, comparable_record
from flexcache.images.input import stored_image_input
from flexcache.recording.forward.batch import Batch
from flexcache.recording.forward.capture_targets import CaptureTargets
from flexcache.recording.forward.image_inputs import padding
from flexcache.recording.run.batch_forward import FAILURES, open_forward
from flexcache.recording.run.fingerprint import fingerprint
from flexcache.recording.run.model_parallel_group import ModelParallelGroup
from flexcache.recording.run.row_transfer import rows_of
from flexcache.site import Site
from flexcache.store.read.selection import ArrayKey
from flexcache.store.read.store import Store
from flexcache.store.write.row_encoding import Unstorable
from flexcache.virtual.plan import ReplayError, Segment, Start

Pieces = list[memoryview]
"""Bytes of the rows of a batch, in order, in the stored dtype; valid until the call that gets them returns."""
RowSink = Callable[[Batch, ArrayKey, Pieces], None]
ReadRows = Callable[[Start, Batch], np.ndarray]
"""Return the rows of a start for all tokens of a batch, in their stored dtype, shape (tokens, features)."""


class Walk:
    """A model that runs the batches of a store's plan as the capture did, or only some of its blocks.

    The model is called as always, with token ids, so masks, positions and windows are its own; blocks before a start
    return the stored rows, and a forward ends at the last site that is read. The model is restored afterwards. Not
    thread-safe.

    Parameters
    ----------
    arrays
        All stacked arrays that may be read, with all of their layers.
    processor
        For stores of images: the image processor of the capture, needed if it was a function.

    Raises
    ------
    MismatchError
        The model is not the one that the store was captured from.
    ConfigError
        The model is on several processes.
    """

    def __init__(self, store: Store, model: nn.Module, arrays: Iterable[ArraySpec], processor: Any = None) -> None:
        self.model = unwrap_copies(model)
        self.arrays = {array.name: array for array in arrays}
        images = None
        if store.images:
            images = stored_image_input(store.provenance.tokenizer, self.model, processor, where=str(store.path))
        example = None if images is None else images.example(self.model)
        self._group = ModelParallelGroup(self.model)
        if not self._group.alone:
            with closing(self._group):
                raise ConfigError(
                    "virtual layers cannot be recomputed by a model on several processes",
                    where=str(store.path),
                    expected="the whole model in this process",
                    found=f"{self._group.processes} processes that share its weights",
                    remedy="attach the whole model in each process; or write the layers to disk with flexcache extend,"
                    " which runs distributed models",
                )
        given = self._group.describe_model(self.model, example)
        check_model(
            comparable_record(store.provenance.model),
            given,
            str(store.path),
            remedy="load the model as it was captured",
        )
        self.conditions = fingerprint(self.model)
        self._pad = padding(self.model, images)
        self._blocks = [unwrap_module(block) for block in hooks.find_blocks(self.model)[1]]
        self._points = {
            (point.array, point.layer): point
            for array in self.arrays.values()
            for point in hooks.find_hook_points(self.model, Site.parse(array.site), list(array.layers or ()))
        }
        self._container: Container = tensor_output
        self._dtype = next(self.model.parameters()).dtype
        self._observe_blocks(example)

    def run(
        self, segment: Segment, batches: Iterable[Batch], read: ReadRows, sink: RowSink, conditions: Mapping[str, Any]
    ) -> None:
        """Run the blocks of a segment on some batches, and pass the rows of each of its sites and layers on.

        On a CPU it runs with as many threads as the batches were captured with, since bits depend on their number.

        Parameters
        ----------
        read
            Reads the rows that the segment starts from.
        sink
            Called with a batch, a site and layer, and the bytes of the rows of the batch.
        conditions
            The fingerprint of the capture of these batches.

        Raises
        ------
        ReplayError
            The model fails when blocks are skipped.
        """
        start, device = segment.start, input_device(self.model)
        targets = CaptureTargets({str(key): (self._points[key],) for key in segment.keys}, {})

        def keep(batch: Batch, name: str, layer: int | None, values: torch.Tensor) -> None:
            pieces = rows_of(batch, values, DTYPES[self.arrays[name].dtype])
            content, spans = pieces[0]
            view = content.data
            sink(batch, (name, layer), [view[first : first + count] for first, count in spans])

        with (
            threads_of(conditions),
            evaluation_mode(self.model),
            open_forward(self.model, targets, self._pad, keep, self._group) as forward,
        ):
            for batch in batches:
                skipping = nullcontext()
                if start.skipped:
                    residual = self._padded(batch, read(start, batch)).to(device)
                    starts = [start.skipped] * batch.shape[0]
                    skipping = skip_blocks(self._blocks, starts, residual, self._container)  # type: ignore[assignment]
                try:
                    with skipping:
                        forward(batch)
                except (FlexCacheError, torch.OutOfMemoryError):
                    raise
                except Unstorable as error:
                    raise ReplayError("a recomputed value cannot be stored", found=str(error.value)) from error
                except FAILURES as error:
                    raise ReplayError(
                        "the model fails when its rows are recomputed",
                        where=f"{type(self.model).__name__}, from {start}",
                        found=f"{type(error).__name__}: {str(error)[:300]}",
                    ) from error

    def _padded(self, batch: Batch, rows: np.ndarray) -> torch.Tensor:
        """Return the residual stream of a batch, padded with zeros: shape (sequences, longest, hidden)."""
        given = as_tensor(rows).to(self._dtype)
        lengths = [len(tokens) for tokens in batch.tokens]
        if min(lengths) == batch.shape[1]:
            padded = given.reshape(*batch.shape, -1)
        else:
            padded = torch.zeros((*batch.shape, given.shape[1]), dtype=self._dtype)
            for line, part in zip(padded, given.split(lengths), strict=True):
                line[: len(part)] = part
        return padded

    def _observe_blocks(self, example: Any) -> None:
        """Run a small example to see how blocks pack the residual stream, and its dtype."""
        seen: list[Any] = []
        handle = self._blocks[0].register_forward_hook(lambda _, args, output: seen.append(output))
        with torch.no_grad(), evaluation_mode(self.model), hook_scope([handle]):
            run_example(self.model, (), lambda point, tensor: None, example)
        first = seen[0]
        self._container = container_of(first)
        self._dtype = (first if isinstance(first, torch.Tensor) else first[0]).dtype


@contextmanager
def threads_of(conditions: Mapping[str, Any]) -> Iterator[None]:
    """Compute with the number of threads in the conditions of a capture on a CPU, in this thread."""
    before, wanted = torch.get_num_threads(), conditions.get("threads") or 0
    torch.set_num_threads(wanted or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def as_tensor(values: np.ndarray) -> torch.Tensor:
    """Return stored values as a tensor of the same dtype, including bfloat16."""
    values = values if values.flags.writeable else values.copy()
    if values.dtype.itemsize == 2 and values.dtype != np.float16:
        return torch.from_numpy(np.ascontiguousarray(values).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(values))
