"""Forwards of a store's own batches, whole or from a stored residual stream on, with edits on the way."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from analysis.replay.hooking import Placed, Ran, editing, reading, tapping
from analysis.replay.obstacles import admit, conditions, on_meta
from analysis.replay.skip import Container, as_tensor, as_tuple, skipping, watching
from analysis.replay.spot import Source, Spot
from analysis.replay.spot import as_tensor as tensor_of
from flexcache import hooks
from flexcache.errors import AnalysisError, FlexCacheError
from flexcache.hooks.measure import input_device
from flexcache.hooks.names import modules, peel
from flexcache.hooks.tap import Tap
from flexcache.hooks.taps import accepts, eager
from flexcache.model import evaluating, pad_id
from flexcache.recorder.batch import Batch, BatchReader
from flexcache.site import Site
from flexcache.store.store import Store


@dataclass(frozen=True)
class Start:
    """Where a replay begins: how many blocks are skipped, and the stored site and layer that stand for them."""

    skipped: int
    site: str = ""
    layer: int | None = None


class Engine:
    """Runs a model over a store's batches as the capture did, or only what comes after a stored residual stream.

    Masks, positions and everything else are the model's own: the model is called as always, with token ids, and blocks
    that are skipped return what is stored. The model is left as it was.

    Raises
    ------
    MismatchError
        The store cannot be replayed with this model, see `analysis.replay.obstacles`.
    """

    def __init__(self, store: Store, model: nn.Module, accept: Collection[str] = ()) -> None:
        self.notes = admit(store, model, accept)
        self.store, self.model = store, peel(model)
        self.source = Source(store)
        self.depth = len(hooks.find_blocks(self.model)[1])
        self._named = modules(self.model)
        self._pad = pad_id(self.model, None)
        self._container: Container | None = None
        self._reader = BatchReader(store.path, mean=False)
        self._defaults = {"use_cache": False} if accepts(self.model, "use_cache") else {}
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        self.ends: dict[int, torch.Tensor] = {}
        """Logits at the ends of documents, as `analysis.replay.question.last_logits` keeps them."""
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

    def tap(self, site: str, layer: int | None) -> Tap:
        """Return where a site is in the model."""
        return hooks.locate(self.model, Site.parse(site), "all" if layer is None else layer)[0]

    def notes_on(self, start: Start) -> list[str]:
        """Return why a replay from here is not exact, see `analysis.replay.obstacles.conditions`."""
        return conditions(self.store, self.model, self.store.arrays[start.site].dtype) if start.skipped else []

    # Running

    @torch.no_grad()
    def run(
        self,
        batch: Batch,
        start: Start = Start(0),
        placed: Sequence[Placed] = (),
        *,
        copies: int = 1,
        read: NDArray[np.int64] | None = None,
        taps: Sequence[tuple[str, int | None]] = (),
    ) -> Ran:
        """Run a batch, from *start* on.

        Parameters
        ----------
        copies
            How many times the batch is stacked along its first dim, for as many edits side by side.
        read
            Positions to compute logits at, shape (sequences, read); all by default. The head runs on those alone.
        taps
            Sites and layers to return.

        Raises
        ------
        AnalysisError
            The model fails when blocks are skipped.
        """
        device = input_device(self.model)
        container = self._contained(start) if start.skipped else as_tensor
        ids, mask = (
            torch.from_numpy(values).repeat(copies, 1).to(device)
            for values in (batch.input_ids(self._pad), batch.attention_mask())
        )
        ran = Ran(torch.empty(0), {})
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            stack.enter_context(eager(self.model))
            if read is not None and self._head is not None:
                stack.enter_context(reading(self._head, torch.from_numpy(read).repeat(copies, 1).to(device)))
            for one in placed:
                module = self._named[one.tap.module]
                stack.enter_context(editing(module, one, self._spot(one, module, batch, ran), (len(ids), ids.shape[1])))
            for place in taps:
                tap = self.tap(*place)
                stack.enter_context(tapping(self._named[tap.module], tap, place, (len(ids), ids.shape[1]), ran))
            if start.skipped:
                residual = self._residual(batch, start, device).repeat(copies, 1, 1)
                stack.enter_context(skipping(self.model, start.skipped, residual, container))
                output = self._guarded(ids, mask, start)
            else:
                with watching(self.model) as found:
                    output = self._call(ids, mask)
                self._container = self._container or found[0]
        ran.logits = _logits(output)
        return ran

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
        values = tensor_of(self.store.read(start.site, start.layer, rows, raw=True))
        dtype = next(self.model.parameters()).dtype
        padded = torch.zeros((*batch.shape, values.shape[1]), dtype=dtype)
        padded[torch.from_numpy(batch.attention_mask()).bool()] = values.to(dtype)
        return padded.to(device)

    def _spot(self, placed: Placed, module: nn.Module, batch: Batch, ran: Ran) -> Spot:
        lines, positions = placed.tokens
        documents = batch.documents[lines % batch.shape[0]]
        where = (placed.tap.array, placed.tap.layer, module)
        return Spot(self.source, *where, lines, documents, positions, placed.seed, ran.left_out)

    def _call(self, ids: torch.Tensor, mask: torch.Tensor) -> Any:
        return self.model(input_ids=ids, attention_mask=mask, **self._defaults)

    def _guarded(self, ids: torch.Tensor, mask: torch.Tensor, start: Start) -> Any:
        try:
            return self._call(ids, mask)
        except (FlexCacheError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a model's own code raises where a block's work is missing
            raise AnalysisError(
                "the model cannot go on where blocks are skipped",
                where=f"{type(self.model).__name__}, the first {start.skipped} blocks skipped",
                found=f"{type(error).__name__}: {str(error)[:300]}",
                remedy="its blocks hand on more than the residual stream; such a model cannot be replayed",
            ) from error

    def _contained(self, start: Start) -> Container:
        """Return how blocks pack their output: from a block that runs, where nothing has run yet."""
        if self._container is None:
            blocks = hooks.find_blocks(self.model)[1]
            if not any(on_meta(block) for block in blocks):
                self.run(ONE)
            elif start.skipped < len(blocks):
                self._container = self._tried(start)
        return self._container or as_tensor

    def _tried(self, start: Start) -> Container:
        device = input_device(self.model)
        stored = self.store.arrays[start.site]
        given = torch.zeros((1, 2, stored.features), dtype=next(self.model.parameters()).dtype, device=device)
        ids = torch.ones((1, 2), dtype=torch.int64, device=device)
        for container in (as_tensor, as_tuple):
            try:
                with (
                    torch.no_grad(),
                    watching(self.model) as found,
                    skipping(self.model, start.skipped, given, container),
                ):
                    self._call(ids, torch.ones_like(ids))
            except Exception:  # the other one, then
                continue
            if type(found[-1](given)) is type(container(given)):
                return container
        return as_tensor


ONE = Batch(0, 0, range(2), np.zeros(1, np.int64), (np.ones(2, np.int32),), ((0, 2),))


def _logits(output: Any) -> torch.Tensor:
    logits = getattr(output, "logits", None)
    found = logits if logits is not None else output if isinstance(output, torch.Tensor) else output[0]
    assert isinstance(found, torch.Tensor)
    return found
