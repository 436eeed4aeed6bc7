"""The plan of a sweep: its cells, edits, metrics and controls as one value."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import xxhash

from analysis.replay.edits.donors import donor_ids, iterate_donor_edits
from analysis.replay.edits.edit import Edit, list_edits
from analysis.replay.edits.edit_context import StoreRows
from analysis.replay.edits.heads import OnHeads
from analysis.replay.edits.held_out import iterate_fitted, judged_documents
from analysis.replay.engine.engine import Engine
from analysis.replay.engine.receiver import Receiver
from analysis.replay.metrics import NAMED, Metric, resolve_metrics
from analysis.replay.sweeps.arguments import Answers, parse_answers
from analysis.replay.sweeps.grid import Grid, Positions, Readout, has_readout, has_tokens, parse_readout
from flexcache.errors import AnalysisError, StoreError, nearest
from flexcache.hooks.locate.head_count import count_heads
from flexcache.provenance import callable_fingerprint
from flexcache.spec import listed
from flexcache.store.read.store import Store

BASELINES = ("identity", "random_direction", "norm_matched")


@dataclass(frozen=True)
class SweepPlan:
    """A sweep with all defaults resolved; made by `plan_sweep`.

    Attributes
    ----------
    documents : tuple of int
        Lines in the store.
    readout : {"all", "last"} or tuple of int
        Tokens at which the logits with and without an edit are compared; negative numbers from the end.
    copies : int
        Cells side by side in one forward, along its first dim.
    receiver : Receiver, or None
        The end of the path along which edits act.
    excluded : int
        Number of named documents that are left out, because an edit was fitted to them.
    """

    site: str
    layers: tuple[int | None, ...]
    positions: Mapping[str, Positions]
    edits: tuple[Edit, ...]
    metrics: tuple[Metric, ...]
    baselines: tuple[str, ...]
    answers: tuple[int, int] | dict[str, tuple[int, int]] | None
    documents: tuple[int, ...]
    readout: Readout = "all"
    copies: int = 1
    seed: int = 0
    receiver: Receiver | None = None
    excluded: int = 0

    @property
    def arms(self) -> tuple[str, ...]:
        """The edit and its controls."""
        return ("edit", *self.baselines)

    @property
    def strengths(self) -> tuple[float, ...]:
        """All strengths of all edits, sorted."""
        return tuple(sorted({strength for edit in self.edits for strength in edit.strengths}))

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the dims arm, layer, position, edit, alpha, document and metric."""
        dims = (self.arms, self.layers, self.positions, self.edits, self.strengths, self.documents, self.metrics)
        return tuple(len(dim) for dim in dims)

    def describe(self) -> dict[str, Any]:
        """Return the plan as plain values."""
        return {
            "site": self.site,
            "layers": list(self.layers),
            "positions": {
                label: positions if isinstance(positions, dict) else str(positions)
                for label, positions in self.positions.items()
            },
            "edits": [edit.to_json() for edit in self.edits],
            "metrics": [
                metric.name if metric.name in NAMED else callable_fingerprint(metric.function)
                for metric in self.metrics
            ],
            "baselines": list(self.baselines),
            "answers": dict(self.answers) if isinstance(self.answers, Mapping) else self.answers,
            "documents": list(self.documents),
            "readout": self.readout,
            "copies": self.copies,
            "seed": self.seed,
            **({} if self.receiver is None else {"receiver": asdict(self.receiver)}),
        }

    @property
    def digest(self) -> str:
        """XXH3-128 of the plan."""
        return xxhash.xxh3_128_hexdigest(json.dumps(self.describe(), sort_keys=True, default=str).encode())

    def count_forwards(self) -> int:
        """Return how many forwards a batch takes at most."""
        cells = len(self.positions) * sum(len(edit.strengths) for edit in self.edits)
        cells *= 1 + sum(name != "identity" for name in self.baselines)
        return 1 + -(-len(self.layers) * (1 + cells) // self.copies)


def plan_sweep(
    engine: Engine,
    at: Grid,
    edit: Any,
    metrics: Any,
    baselines: str | Sequence[str],
    answers: Answers,
    documents: str | Sequence[str] | None,
    readout: str | int | Sequence[int],
    copies: int,
    seed: int,
) -> SweepPlan:
    """Return the plan of a sweep after checking its arguments; see `analysis.replay.sweep`.

    Raises
    ------
    AnalysisError, StoreError
    """
    baselines = listed(baselines, str, "baselines")
    documents = None if documents is None else listed(documents, str, "documents")
    _check_baselines(baselines)
    readout = parse_readout(readout)
    layers, positions = at.resolve(engine.store, engine.depth)
    if not layers:
        raise AnalysisError("the store has no layer that a replay can start from", where=at.site)
    for layer in layers:
        engine.start_at(at.site, layer, stored=layer is not None)
    resolved_answers = parse_answers(answers, engine, documents)
    resolved_metrics = tuple(
        replace(metric, reads=tuple((s, None if n is None else n % engine.depth) for s, n in metric.reads))
        for metric in resolve_metrics(metrics, answers is not None)
    )
    edits = _on_heads(list_edits(edit), engine, at, layers)
    receiver = None if at.receiver is None else _check_receiver(at.receiver.in_model(engine.depth), engine, copies)
    lines = _resolve_documents(engine, documents, edits, positions, readout)
    return SweepPlan(
        site=at.site,
        layers=layers,
        positions=positions,
        edits=edits,
        metrics=resolved_metrics,
        baselines=tuple(baselines),
        answers=resolved_answers,
        documents=lines,
        readout=readout,
        copies=copies,
        seed=seed,
        receiver=receiver,
        excluded=0 if documents is None else len(set(documents)) - len(lines),
    )


def check_before_loading(
    store: Store,
    at: Grid,
    metrics: Any,
    baselines: Sequence[str],
    answers: bool,
    documents: Sequence[str] | None,
    readout: str | int | Sequence[int],
    depth: int,
) -> None:
    """Raise AnalysisError or StoreError for arguments of a sweep that are wrong for any model of *depth* blocks.

    Parameters
    ----------
    answers
        True if answers are given.
    """
    _check_baselines(baselines)
    parse_readout(readout)
    resolve_metrics(metrics, answers)
    at.resolve(store, depth)
    if documents is not None:
        StoreRows(store).check_documents(documents, str(store.path), StoreError)


def _check_baselines(names: Sequence[str]) -> None:
    for name in names:
        if name not in BASELINES:
            raise AnalysisError(f"there is no baseline {name!r}", remedy=nearest(name, BASELINES))


def _on_heads(edits: tuple[Edit, ...], engine: Engine, at: Grid, layers: Sequence[int | None]) -> tuple[Edit, ...]:
    """Return one edit for each edit and head of the grid."""
    if at.heads is None:
        return edits
    counts = {count_heads(engine.model, at.site, layer) for layer in layers if layer is not None}
    if len(counts) != 1:
        raise AnalysisError(
            "layers of a sweep by head have equal numbers of heads",
            where=at.site,
            found=", ".join(map(str, sorted(counts))) or "no layers",
        )
    count = counts.pop()
    heads = range(count) if isinstance(at.heads, str) else at.heads
    _check_heads(heads, count, at.site)
    return tuple(OnHeads(edit, head, count) for edit in edits for head in heads)


def _check_receiver(receiver: Receiver, engine: Engine, copies: int) -> Receiver:
    if copies > 1:
        raise AnalysisError("path patching runs one edit in a forward", expected="copies=1", found=f"copies={copies}")
    engine.point(receiver.site, receiver.layer)
    if receiver.heads is not None:
        _check_heads(receiver.heads, count_heads(engine.model, receiver.site, receiver.layer), receiver.site)
    if isinstance(receiver.positions, dict):
        engine.source.check_documents(receiver.positions, "positions of the receiver")
    return receiver


def _check_heads(heads: Sequence[int], count: int, site: str) -> None:
    missing = [head for head in heads if head >= count]
    if missing:
        raise AnalysisError(f"{site} has no head {missing[0]}", expected=f"heads from 0 to {count - 1}")


def _resolve_documents(
    engine: Engine,
    documents: Sequence[str] | None,
    edits: Sequence[Edit],
    positions: Mapping[str, Positions],
    readout: Readout,
) -> tuple[int, ...]:
    """Return the lines of the documents that no edit was fitted to, after checking all ids.

    Some document must have tokens to edit and read.
    """
    source = engine.source
    if documents is not None:
        source.check_documents(documents, str(engine.store.path), StoreError)
    asked = [*source.numbers] if documents is None else [str(name) for name in documents]
    lines = sorted({source.numbers[name] for name in judged_documents(edits, asked)})
    if asked and not lines:
        raise AnalysisError(
            "an edit was fitted to every document of the sweep",
            where=", ".join(dict.fromkeys(part.name for part in iterate_fitted(edits))),
            expected="documents that were held out of the fit",
            found=f"{len(asked)} documents of the fit",
            remedy="name other documents, or leave documents= out",
        )
    for donor in (part.donor for edit in edits for part in iterate_donor_edits(edit)):
        source.check_documents(donor_ids(donor), "donor")
    for label, chosen in positions.items():
        if isinstance(chosen, dict):
            source.check_documents(chosen, f"positions {label!r}")
    wanted = set(lines)
    lengths = {name: int(source.lengths[line]) for name, line in source.numbers.items() if line in wanted}
    if lengths and not any(has_tokens(chosen, lengths) for chosen in positions.values()):
        raise AnalysisError(
            "no document has a token at these positions",
            where="positions",
            expected=f"positions of documents of up to {max(lengths.values())} tokens",
            found=", ".join(positions),
        )
    if lengths and not has_readout(readout, np.array([*lengths.values()])).any():
        raise AnalysisError(
            "no document has all tokens of the readout",
            where="readout",
            expected=f"positions of documents of up to {max(lengths.values())} tokens",
            found=str(readout),
        )
    return tuple(lines)
