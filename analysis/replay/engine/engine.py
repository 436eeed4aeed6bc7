"""Forwards of a store's own batches, complete or from a stored residual stream, with edits."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from analysis.replay.edits.edit_context import EditContext, StoreRows
from analysis.replay.engine.compatibility import (
    check_compatible,
    check_editable,
    check_store_and_model,
    has_unloaded_weights,
    inexactness_notes,
)
from analysis.replay.engine.forward_hooks import (
    ForwardResult,
    PlacedEdit,
    capture_activation,
    edit_activation,
    limit_head,
)
from analysis.replay.engine.starts import find_start, stack_residuals
from flexcache import hooks
from flexcache.errors import AnalysisError, FlexCacheError
from flexcache.hooks.locate.encoder_decoder import is_encoder_decoder, run_encoder
from flexcache.hooks.locate.evaluation_mode import evaluation_mode
from flexcache.hooks.locate.hook_point import HookPoint
from flexcache.hooks.locate.names import modules_by_path, unwrap_copies, unwrap_module
from flexcache.hooks.read.activation_hooks import accepts_keyword, uncompiled
from flexcache.hooks.read.block_skipping import (
    Container,
    observe_containers,
    skip_blocks,
    tensor_output,
    tuple_output,
    unambiguous_lines,
)
from flexcache.hooks.read.measure import input_device
from flexcache.images.input import stored_image_input
from flexcache.recording.forward.batch import Batch, unplanned_batch
from flexcache.recording.forward.batch_reader import BatchReader
from flexcache.recording.forward.image_inputs import padding, to_tensors
from flexcache.site import Site
from flexcache.store.read.store import Store
from flexcache.virtual.plan import BEGINNING, Start


class Engine:
    """Run a model over a store's batches as the capture did, or only the blocks after a stored residual stream.

    Masks, positions and everything else are the model's own: the model is called as always, with token ids or with the
    pixels of the images in the store, and skipped blocks return the stored rows. The model is restored afterwards. ::

        engine = replay.Engine(store, model)
        for batch in engine.batches():
            logits = engine.run(batch, engine.start_at("resid_post", 12)).logits

    Parameters
    ----------
    processor
        For stores of images: the image processor of the capture, needed if it was a function.

    Raises
    ------
    AnalysisError
        *store* is not a store, or *model* not a loaded model.
    MismatchError
        The store cannot be replayed with this model, see `analysis.replay.engine.compatibility`.
    """

    def __init__(self, store: Store, model: nn.Module, accept: Collection[str] = (), processor: Any = None) -> None:
        check_store_and_model(store, model)
        self.notes = check_compatible(store, model, accept, processor)
        self.store, self.model = store, unwrap_copies(model)
        self.source = StoreRows(store)
        self._named = modules_by_path(self.model)
        path, blocks = hooks.find_blocks(self.model)
        self._blocks = [f"{path}.{number}" for number in range(len(blocks))]
        self._modules = [unwrap_module(block) for block in blocks]
        self.depth = len(blocks)
        recorded, where = store.provenance.tokenizer, str(store.path)
        images = stored_image_input(recorded, self.model, processor, where=where) if store.images else None
        self._pad = padding(self.model, images)
        self._points: dict[tuple[str, int | None], HookPoint] = {}
        self._notes: dict[str, list[str]] = {}
        self._container: Container | None = None
        context = TWO_TOKENS if is_encoder_decoder(self.model) else None
        self._example = unplanned_batch(TWO_TOKENS, context=context)
        self._reader = BatchReader(store.path)
        self._defaults = {"use_cache": False} if accepts_keyword(self.model, "use_cache") else {}
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        self._head: nn.Module | None = head if isinstance(head, nn.Module) else None
        self._last_logits: dict[int, torch.Tensor] = {}

    def batches(self, documents: Collection[int] | None = None) -> Iterator[Batch]:
        """Yield the capture's batches of committed units that hold any of *documents*, each document once.

        A unit's batches follow the token budget that the ledger recorded for it.
        """
        wanted = None if documents is None else np.asarray(sorted(documents))
        for unit in self.store.committed_units.tolist():
            for batch in self._reader.read_unit(unit, self.store.ledger.read_record(unit).batch_tokens):
                whole = batch.keep[0][0] == 0  # the rest of a document that spans units was run with its beginning
                if whole and (wanted is None or np.isin(batch.documents, wanted).any()) and self._has_rows(batch):
                    yield batch

    def batch_of(self, document: int) -> Batch:
        """Return the batch of a document."""
        return next(self.batches([document]))

    def start_at(self, site: str, layer: int | None, *, stored: bool = True) -> Start:
        """Return the latest start that the store allows for an edit; see `analysis.replay.engine.starts.find_start`."""
        return find_start(self.store, site, layer, stored=stored)

    @cached_property
    def vocabulary(self) -> int:
        """Length of the last dim of the logits."""
        weight = getattr(self._head, "weight", None)
        if weight is None:
            return int(self.run(self._example).logits.shape[-1])
        return int(getattr(self._head, "out_features", len(weight)))

    def point(self, site: str, layer: int | None) -> HookPoint:
        """Return the hook point of a site and layer."""
        if (site, layer) not in self._points:
            found = hooks.find_hook_points(self.model, Site.parse(site), "all" if layer is None else layer)
            self._points[site, layer] = found[0]
        return self._points[site, layer]

    def notes_on(self, start: Start) -> list[str]:
        """Return why a replay from this start is not exact, see `compatibility.inexactness_notes`."""
        if not start.skipped:
            return []
        dtype = self.store.arrays[start.site].dtype
        if dtype not in self._notes:
            self._notes[dtype] = inexactness_notes(self.store, self.model, dtype)
        return self._notes[dtype]

    def last_logits(self, document: int) -> torch.Tensor:
        """Return the logits at a document's last token, in its own batch: float32, shape (vocabulary,).

        The logits of the other documents of the batch are kept for later calls.
        """
        if document not in self._last_logits:
            batch = self.batch_of(document)
            last = np.array([[len(tokens) - 1] for tokens in batch.tokens])
            logits = self.run(batch, read=last).logits[:, 0].float().cpu()
            self._last_logits |= dict(zip(batch.documents.tolist(), logits, strict=True))
        return self._last_logits[document]

    @torch.no_grad()
    def run(
        self,
        batch: Batch,
        start: Start | Sequence[Start] = BEGINNING,
        placed: Sequence[PlacedEdit] = (),
        *,
        read: NDArray[np.int64] | None = None,
        points: Sequence[tuple[str, int | None]] = (),
        gradients: bool = False,
    ) -> ForwardResult:
        """Run a batch from *start* to the end of the model.

        Parameters
        ----------
        start
            Several starts stack the batch along its first dim, once for each, in the order of the blocks they start at:
            this runs as many edits side by side.
        read
            Positions at which logits are computed, shape (sequences, read); all by default.
        points
            Sites and layers to return. For a site in a block, the lines that have reached this block are returned.
        gradients
            Record the forward, so that the result can be differentiated by what the edits contain.

        Raises
        ------
        AnalysisError
            The model fails when blocks are skipped; an edit is at a site that cannot be edited.
        """
        for one in placed:
            check_editable(one.point)
        copies = [start] if isinstance(start, Start) else list(start)
        starts = [copy.skipped for copy in copies for _ in range(batch.shape[0])]
        assert starts == sorted(starts), "copies are in the order of the blocks that they start at"
        lines, longest = len(starts), batch.shape[1]
        device = input_device(self.model)
        container = self._find_container(copies[-1]) if starts[-1] else tensor_output
        if starts[0] < starts[-1]:
            starts += [starts[-1]] * (unambiguous_lines(lines, longest) - lines)
        inputs = {
            name: _repeated(values, len(starts))
            for name, values in to_tensors(self.model, batch.inputs(self._pad)).items()
        }
        result = ForwardResult(torch.empty(0), {})
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(gradients))
            stack.enter_context(evaluation_mode(self.model))
            stack.enter_context(uncompiled(self.model))
            if read is not None and self._head is not None:
                stack.enter_context(limit_head(self._head, _repeated(torch.from_numpy(read), len(starts)).to(device)))
            for point in dict.fromkeys(one.point for one in placed):
                module = self._named[point.module]
                edits = [(one, self._context(one, module, batch, result)) for one in placed if one.point == point]
                shape = (self._lines_at(point, starts), longest)
                stack.enter_context(edit_activation(module, point, edits, shape, batch.shape[0]))
            for key in points:
                point = self.point(*key)
                shape = (self._lines_at(point, starts), longest)
                if shape[0]:
                    stack.enter_context(capture_activation(self._named[point.module], point, key, shape, result))
            if starts[-1]:
                dtype = next(self.model.parameters()).dtype
                residual = stack_residuals(self.source, batch, copies, len(starts), dtype).to(device)
                stack.enter_context(skip_blocks(self._modules, starts, residual, container))
                output = self._call_skipping(inputs, starts)
            else:
                with observe_containers(self._modules) as found:
                    output = self._call(inputs)
                self._container = self._container or found[0]
            result.logits = _logits(output)[:lines]
        return result

    def reaches(self, start: Start, key: tuple[str, int | None]) -> bool:
        """Return True if a replay from *start* computes, or starts with, the value at a site and layer."""
        block = self._block(point := self.point(*key))
        return block is None or start.skipped <= block + (
            point.module == self._blocks[block] and point.side == "output"
        )

    def _has_rows(self, batch: Batch) -> bool:
        first = self.source.row_start[batch.documents]
        last = first + self.source.lengths[batch.documents] - 1
        return bool(np.isin(last // self.store.shard_rows, self.store.committed_units).all())

    def _block(self, point: HookPoint) -> int | None:
        """Return the number of the block that contains a hook point; None if no block does."""
        inside = (n for n, block in enumerate(self._blocks) if f"{point.module}.".startswith(f"{block}."))
        return next(inside, None)

    def _lines_at(self, point: HookPoint, starts: Sequence[int]) -> int:
        """Return how many lines pass a hook point: in a block, those that have reached it."""
        block = self._block(point)
        return len(starts) if block is None or point.module in self._blocks else bisect_right(starts, block)

    def _context(self, placed: PlacedEdit, module: nn.Module, batch: Batch, result: ForwardResult) -> EditContext:
        lines, positions = placed.tokens
        documents = batch.documents[lines % batch.shape[0]]
        where = (placed.point.array, placed.point.layer, module)
        return EditContext(self.source, *where, lines, documents, positions, placed.seed, result.left_out)

    def _call(self, inputs: Mapping[str, torch.Tensor]) -> Any:
        return self.model(**run_encoder(self.model, inputs), **self._defaults)

    def _call_skipping(self, inputs: Mapping[str, torch.Tensor], starts: Sequence[int]) -> Any:
        try:
            return self._call(inputs)
        except (FlexCacheError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a model's own code can raise anything where the output of a block is missing
            raise AnalysisError(
                "the model fails when blocks are skipped",
                where=f"{type(self.model).__name__}, the first {starts[0]} to {starts[-1]} blocks skipped",
                found=f"{type(error).__name__}: {str(error)[:300]}",
                remedy="its blocks pass on more than the residual stream; such a model cannot be replayed",
            ) from error

    def _find_container(self, start: Start) -> Container:
        """Return how blocks pack their output; if nothing has run yet, run a small forward to see."""
        if self._container is None:
            if not any(has_unloaded_weights(block) for block in self._modules):
                self.run(self._example if isinstance(self._pad, int) else next(self.batches()))
            elif start.skipped < self.depth:
                self._container = self._try_containers(start)
        return self._container or tensor_output

    def _try_containers(self, start: Start) -> Container:
        device = input_device(self.model)
        stored = self.store.arrays[start.site]
        if isinstance(self._pad, int):
            arrays, length = self._example.inputs(self._pad), 2
            inputs = {name: torch.from_numpy(values).to(device) for name, values in arrays.items()}
        else:
            inputs, length = self._pad.example(self.model)(1, 0), self._pad.patches.tokens
        given = torch.zeros((1, length, stored.features), dtype=next(self.model.parameters()).dtype, device=device)
        for container in (tensor_output, tuple_output):
            try:
                with (
                    torch.no_grad(),
                    observe_containers(self._modules) as found,
                    skip_blocks(self._modules, [start.skipped], given, container),
                ):
                    self._call(inputs)
            except Exception:  # the other container may fit
                continue
            if type(found[-1](given)) is type(container(given)):
                return container
        return tensor_output


TWO_TOKENS = [np.ones(2, np.int32)]


def _repeated(values: torch.Tensor, lines: int) -> torch.Tensor:
    """Return sequences repeated up to *lines* in all."""
    return values.repeat(-(-lines // len(values)), *[1] * (values.ndim - 1))[:lines]


def _logits(output: Any) -> torch.Tensor:
    logits = getattr(output, "logits", None)
    found = logits if logits is not None else output if isinstance(output, torch.Tensor) else output[0]
    assert isinstance(found, torch.Tensor)
    return found
