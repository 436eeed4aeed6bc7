"""Forwards of a store's own batches, whole or from a stored residual stream on, with edits on the way."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from analysis.replay.edits.edit_context import EditContext, StoreRows
from analysis.replay.edits.edit_context import as_tensor as tensor_of
from analysis.replay.engine.compatibility import admit, check_store_and_model, conditions, on_meta, refuse_half
from analysis.replay.engine.hooking import Placed, Ran, editing, reading, reading_at
from analysis.replay.engine.skip import Container, as_tensor, as_tuple, skipping, unambiguous, watching
from flexcache import hooks
from flexcache.errors import AnalysisError, FlexCacheError
from flexcache.hooks.locate.encoder_decoder import encoded, is_encoder_decoder
from flexcache.hooks.locate.hook_point import HookPoint
from flexcache.hooks.locate.names import modules, peel
from flexcache.hooks.read.activation_hooks import accepts, eager
from flexcache.hooks.read.measure import input_device
from flexcache.images.input import stored_image_input
from flexcache.model import evaluating
from flexcache.recording.forward.batch import Batch, BatchReader
from flexcache.recording.forward.image_inputs import padding, tensors
from flexcache.site import Site
from flexcache.store.read.store import Store


@dataclass(frozen=True)
class Start:
    """Where a replay begins: how many blocks are skipped, and the stored site and layer that stand for them."""

    skipped: int
    site: str = ""
    layer: int | None = None


class Engine:
    """Runs a model over a store's batches as the capture did, or only what comes after a stored residual stream.

    Masks, positions and everything else are the model's own: the model is called as always, with token ids, or with the
    pixels of the images that the store keeps, and blocks that are skipped return what is stored. The model is left as
    it was.

    Parameters
    ----------
    processor
        Of images: the image processor of the capture, where the store cannot say it because it was a function.

    Raises
    ------
    AnalysisError
        *store* is no store, or *model* no loaded model.
    MismatchError
        The store cannot be replayed with this model, see `analysis.replay.engine.compatibility`.
    """

    def __init__(self, store: Store, model: nn.Module, accept: Collection[str] = (), processor: Any = None) -> None:
        check_store_and_model(store, model)
        self.notes = admit(store, model, accept, processor)
        self.store, self.model = store, peel(model)
        self.source = StoreRows(store)
        self._named = modules(self.model)
        path, blocks = hooks.find_blocks(self.model)
        self._blocks = [f"{path}.{number}" for number in range(len(blocks))]
        self.depth = len(blocks)
        self._pad = padding(self.model, stored_image_input(store, self.model, processor) if store.images else None)
        self._points: dict[tuple[str, int | None], HookPoint] = {}
        self._conditions: dict[str, list[str]] = {}
        self._container: Container | None = None
        self._one = replace(ONE, context=ONE.tokens) if is_encoder_decoder(self.model) else ONE
        self._reader = BatchReader(store.path, mean=False)
        self._defaults = {"use_cache": False} if accepts(self.model, "use_cache") else {}
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        self.ends: dict[int, torch.Tensor] = {}
        """Logits at the ends of documents, as `analysis.replay.sweeps.sweep_plan.last_logits` keeps them."""
        self._head: nn.Module | None = head if isinstance(head, nn.Module) else None

    # What there is to run

    def batches(self, documents: Collection[int] | None = None) -> Iterator[Batch]:
        """Yield the capture's batches of committed units that hold any of *documents*, each document once.

        A unit's batches are those of the budget it was run with, as the ledger has it.
        """
        wanted = None if documents is None else np.asarray(sorted(documents))
        for unit in self.store.committed_units.tolist():
            for batch in self._reader.unit(unit, self.store.ledger.read(unit).batch_tokens):
                whole = batch.keep[0][0] == 0  # the rest of a document that straddles units was run with its front
                if whole and (wanted is None or np.isin(batch.documents, wanted).any()) and self._has_rows(batch):
                    yield batch

    def batch_of(self, document: int) -> Batch:
        """Return the batch of a document."""
        return next(self.batches([document]))

    def start_at(self, site: str, layer: int | None, *, stored: bool = True) -> Start:
        """Return the latest start that the store allows for an edit at a site and layer.

        Raises
        ------
        AnalysisError
            *stored* is asked for, and the residual stream just before is not in the store.
        """
        wanted = 0 if layer is None else layer + 1 if site == "resid_post" else layer
        for skipped in range(wanted, 0, -1):
            for name, number in (("resid_post", skipped - 1), ("resid_pre", skipped)):
                if name in self.store.arrays and number in self.store.layers(name):
                    return Start(skipped, name, number)
            if stored:
                break
        if stored and wanted:
            raise AnalysisError(
                "the residual stream to go on from is not stored",
                where=f"{site}, layer {layer}",
                expected=f"resid_post of layer {wanted - 1}, or resid_pre of layer {wanted}",
                found=", ".join(f"{name} {list(self.store.layers(name))}" for name in self.store.sites),
                remedy="capture it, or choose one of the stored layers",
            )
        return Start(0)

    @cached_property
    def vocabulary(self) -> int:
        """Length of the last dim of the logits."""
        weight = getattr(self._head, "weight", None)
        if weight is None:
            return int(self.run(self._one).logits.shape[-1])
        return int(getattr(self._head, "out_features", len(weight)))

    def point(self, site: str, layer: int | None) -> HookPoint:
        """Return where a site is in the model."""
        if (site, layer) not in self._points:
            found = hooks.find_hook_points(self.model, Site.parse(site), "all" if layer is None else layer)
            self._points[site, layer] = found[0]
        return self._points[site, layer]

    def notes_on(self, start: Start) -> list[str]:
        """Return why a replay from here is not exact, see `analysis.replay.engine.compatibility.conditions`."""
        if not start.skipped:
            return []
        dtype = self.store.arrays[start.site].dtype
        if dtype not in self._conditions:
            self._conditions[dtype] = conditions(self.store, self.model, dtype)
        return self._conditions[dtype]

    # Running

    @torch.no_grad()
    def run(
        self,
        batch: Batch,
        start: Start | Sequence[Start] = Start(0),
        placed: Sequence[Placed] = (),
        *,
        read: NDArray[np.int64] | None = None,
        points: Sequence[tuple[str, int | None]] = (),
    ) -> Ran:
        """Run a batch, from *start* on.

        Parameters
        ----------
        start
            Several stack the batch along its first dim, once for each, for as many edits side by side; in the order
            of the blocks they begin at.
        read
            Positions to compute logits at, shape (sequences, read); all by default. The head runs on those alone.
        points
            Sites and layers to return; of what lies in a block, the lines that have begun there.

        Raises
        ------
        AnalysisError
            The model fails when blocks are skipped; an edit is at a site that cannot be edited.
        """
        for one in placed:
            refuse_half(one.point)
        copies = [start] if isinstance(start, Start) else list(start)
        starts = [copy.skipped for copy in copies for _ in range(batch.shape[0])]
        assert starts == sorted(starts), "copies are in the order of the blocks that they begin at"
        lines, longest = len(starts), batch.shape[1]
        device = input_device(self.model)
        container = self._contained(copies[-1]) if starts[-1] else as_tensor
        if starts[0] < starts[-1]:
            starts += [starts[-1]] * (unambiguous(lines, longest) - lines)
        inputs = {
            name: _repeated(values, len(starts))
            for name, values in tensors(self.model, batch.inputs(self._pad)).items()
        }
        ran = Ran(torch.empty(0), {})
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            stack.enter_context(eager(self.model))
            if read is not None and self._head is not None:
                stack.enter_context(reading(self._head, _repeated(torch.from_numpy(read), len(starts)).to(device)))
            for point in dict.fromkeys(one.point for one in placed):
                module = self._named[point.module]
                edits = [(one, self._spot(one, module, batch, ran)) for one in placed if one.point == point]
                shape = (self._begun(point, starts), longest)
                stack.enter_context(editing(module, point, edits, shape, batch.shape[0]))
            for place in points:
                point = self.point(*place)
                shape = (self._begun(point, starts), longest)
                if shape[0]:
                    stack.enter_context(reading_at(self._named[point.module], point, place, shape, ran))
            if starts[-1]:
                residual = self._residuals(batch, copies, len(starts), device)
                stack.enter_context(skipping(self.model, starts, residual, container))
                output = self._guarded(inputs, starts)
            else:
                with watching(self.model) as found:
                    output = self._call(inputs)
                self._container = self._container or found[0]
        ran.logits = _logits(output)[:lines]
        return ran

    def reaches(self, start: Start, place: tuple[str, int | None]) -> bool:
        """Whether a replay from here computes, or begins with, what is at a site and layer; before, nothing changes."""
        block = self._block(point := self.point(*place))
        return block is None or start.skipped <= block + (
            point.module == self._blocks[block] and point.side == "output"
        )

    def residual(self, batch: Batch, start: Start) -> torch.Tensor:
        """Return the stored residual stream of a batch, padded with zeros: shape (sequences, longest, hidden)."""
        return self._residual(batch, start, input_device(self.model))

    # Private

    def _has_rows(self, batch: Batch) -> bool:
        first = self.source.row_start[batch.documents]
        last = first + self.source.lengths[batch.documents] - 1
        return bool(np.isin(last // self.store.shard_rows, self.store.committed_units).all())

    def _residual(self, batch: Batch, start: Start, device: torch.device) -> torch.Tensor:
        lengths = np.array([len(tokens) for tokens in batch.tokens])
        first = self.source.row_start[batch.documents]
        together = len(lengths) == 1 or bool((first[1:] == (first + lengths)[:-1]).all())
        rows: Any = (
            slice(int(first[0]), int(first[0] + lengths.sum()))
            if together
            else np.concatenate([np.arange(a, a + n) for a, n in zip(first, lengths, strict=True)])
        )
        stored = self.store.arrays[start.site].dtype != "int8"
        values = tensor_of(self.store.read(start.site, start.layer, rows, raw=stored))
        dtype = next(self.model.parameters()).dtype
        padded = torch.zeros((*batch.shape, values.shape[1]), dtype=dtype)
        padded[torch.from_numpy(batch.attention_mask()).bool()] = values.to(dtype)
        return padded.to(device)

    def _residuals(self, batch: Batch, copies: Sequence[Start], lines: int, device: torch.device) -> torch.Tensor:
        """Return what each line begins with; zeros where no block is skipped."""
        stored = {copy: self._residual(batch, copy, device) for copy in dict.fromkeys(copies) if copy.skipped}
        nothing = torch.zeros_like(next(iter(stored.values())))
        whole = [stored.get(copy, nothing) for copy in copies]
        return torch.cat([*whole, *[whole[-1][:1]] * (lines - len(copies) * batch.shape[0])])

    def _block(self, point: HookPoint) -> int | None:
        """Return the number of the block that a hook point is at or in; None for one outside."""
        inside = (n for n, block in enumerate(self._blocks) if f"{point.module}.".startswith(f"{block}."))
        return next(inside, None)

    def _begun(self, point: HookPoint, starts: Sequence[int]) -> int:
        """Return how many lines pass a hook point: in a block, those that have begun there."""
        block = self._block(point)
        return len(starts) if block is None or point.module in self._blocks else bisect_right(starts, block)

    def _spot(self, placed: Placed, module: nn.Module, batch: Batch, ran: Ran) -> EditContext:
        lines, positions = placed.tokens
        documents = batch.documents[lines % batch.shape[0]]
        where = (placed.point.array, placed.point.layer, module)
        return EditContext(self.source, *where, lines, documents, positions, placed.seed, ran.left_out)

    def _call(self, inputs: Mapping[str, torch.Tensor]) -> Any:
        return self.model(**encoded(self.model, inputs), **self._defaults)

    def _guarded(self, inputs: Mapping[str, torch.Tensor], starts: Sequence[int]) -> Any:
        try:
            return self._call(inputs)
        except (FlexCacheError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a model's own code raises where a block's work is missing
            raise AnalysisError(
                "the model cannot go on where blocks are skipped",
                where=f"{type(self.model).__name__}, the first {starts[0]} to {starts[-1]} blocks skipped",
                found=f"{type(error).__name__}: {str(error)[:300]}",
                remedy="its blocks hand on more than the residual stream; such a model cannot be replayed",
            ) from error

    def _contained(self, start: Start) -> Container:
        """Return how blocks pack their output: from a block that runs, where nothing has run yet."""
        if self._container is None:
            blocks = hooks.find_blocks(self.model)[1]
            if not any(on_meta(block) for block in blocks):
                self.run(self._one if isinstance(self._pad, int) else next(self.batches()))
            elif start.skipped < len(blocks):
                self._container = self._tried(start)
        return self._container or as_tensor

    def _tried(self, start: Start) -> Container:
        device = input_device(self.model)
        stored = self.store.arrays[start.site]
        if isinstance(self._pad, int):
            arrays, length = self._one.inputs(self._pad), 2
            inputs = {name: torch.from_numpy(values).to(device) for name, values in arrays.items()}
        else:
            inputs, length = self._pad.example(self.model)(1, 0), self._pad.patches.tokens
        given = torch.zeros((1, length, stored.features), dtype=next(self.model.parameters()).dtype, device=device)
        for container in (as_tensor, as_tuple):
            try:
                with (
                    torch.no_grad(),
                    watching(self.model) as found,
                    skipping(self.model, [start.skipped], given, container),
                ):
                    self._call(inputs)
            except Exception:  # the other one, then
                continue
            if type(found[-1](given)) is type(container(given)):
                return container
        return as_tensor


ONE = Batch(0, 0, range(2), np.zeros(1, np.int64), (np.ones(2, np.int32),), ((0, 2),))


def _repeated(values: torch.Tensor, lines: int) -> torch.Tensor:
    """Return sequences over and over, *lines* in all."""
    return values.repeat(-(-lines // len(values)), *[1] * (values.ndim - 1))[:lines]


def _logits(output: Any) -> torch.Tensor:
    logits = getattr(output, "logits", None)
    found = logits if logits is not None else output if isinstance(output, torch.Tensor) else output[0]
    assert isinstance(found, torch.Tensor)
    return found
