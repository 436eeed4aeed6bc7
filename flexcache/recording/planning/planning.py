"""From documents to a planned store, or to the numbers of one that is only considered."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from flexcache.documents import Documents
from flexcache.documents.digest import DIGEST
from flexcache.errors import MismatchError
from flexcache.identity import check_model, differences, for_store
from flexcache.plan import Batching, Largest, Plan, batch_groups, unit_rows
from flexcache.recording.run.fingerprint import versions
from flexcache.sequences import Corpus, Positions, TokenizedCorpus, tokenize_corpus
from flexcache.spec import ArraySpec, Spec
from flexcache.store.format.dataset_card import card
from flexcache.store.format.text import join_lines, size
from flexcache.store.storage.location import StoreLocation
from flexcache.store.write.create import check_free_space, check_names, create, create_once, total_bytes

Progress = Callable[[int, int], None]
DOCUMENTS_DIGEST = f"documents.{DIGEST}"


@dataclass(frozen=True)
class Source:
    """All that a store is planned from.

    Attributes
    ----------
    documents : Documents
    tokenizer : callable or None
    arrays : list of ArraySpec
    spec : Spec
    model, tokenizer_identity : dict
        As provenance records them.
    vocabulary, encoder_vocabulary : int or None
        Number of token ids that the model knows, and that its encoder does beside a decoder.
    positions : pair of int or None
        As `flexcache.model.positions` returns them.
    notes : dict
        Further provenance, such as hooks that a live model carried.
    batching : Batching
        Which sequences may share a batch.
    """

    documents: Documents
    tokenizer: Any
    arrays: list[ArraySpec]
    spec: Spec
    model: dict[str, Any]
    tokenizer_identity: dict[str, Any]
    vocabulary: int | None = None
    encoder_vocabulary: int | None = None
    positions: Positions = (None, None)
    notes: dict[str, Any] | None = None
    batching: Batching = "padded"

    @property
    def widest_row(self) -> int:
        """Bytes of a row of the widest array."""
        return max(array.row_bytes for array in self.arrays)

    def identity(self) -> dict[str, Any]:
        """Return what must agree between a store and a run that goes on with it."""
        return {
            "spec": self.spec.model_dump(mode="json"),
            "arrays": {array.name: array.to_json() for array in self.arrays},
            "model": self.model,
            "tokenizer": self.tokenizer_identity,
            "documents": self.documents.describe(read=True),
        }


@dataclass(frozen=True)
class Estimate:
    """What a plan amounts to, before anything is captured.

    Attributes
    ----------
    rows, documents, sequences, units, shard_rows, files : int
    bytes : int
        Of all shard files, before compression.
    tokens, tokens_run, tokens_padded : int
        Of the documents; in all forwards; and with padding. Of an encoder and a decoder, documents have the tokens that
        the decoder reads, and forwards count those of each sequence's longer side.
    longest_document, truncated_documents, skipped_documents, rowless_documents : int
    largest_batch : Largest
        The forward of most tokens: unit, batch, tokens with padding.
    """

    rows: int
    documents: int
    sequences: int
    units: int
    shard_rows: int
    files: int
    bytes: int
    tokens: int
    tokens_run: int
    tokens_padded: int
    longest_document: int
    truncated_documents: int
    skipped_documents: int
    rowless_documents: int
    largest_batch: Largest

    def lines(self) -> list[tuple[str, str]]:
        """Return the estimate as names and values for people."""
        tokens = f"{self.tokens:,} (run ÷ kept {self.tokens_padded / max(1, self.rows):.2f}"
        tokens += f", padding {self.tokens_padded / max(1, self.tokens_run) - 1:.1%})"
        cut = f", {self.truncated_documents:,} truncated" if self.truncated_documents else ""
        cut += f", {self.skipped_documents:,} empty ones skipped" if self.skipped_documents else ""
        cut += f", {self.rowless_documents:,} without rows left out" if self.rowless_documents else ""
        sequences = f" in {self.sequences:,} sequences" if self.sequences != self.documents else ""
        return [
            ("documents", f"{self.documents:,}{sequences}{cut}; the longest has {self.longest_document:,} tokens"),
            ("tokens", tokens),
            ("rows", f"{self.rows:,}"),
            ("units", f"{self.units:,} of {self.shard_rows:,} rows"),
            ("files", f"{self.files:,}"),
            ("bytes", size(self.bytes)),
        ]


def make_plan(source: Source, folder: Path, progress: Progress) -> tuple[Plan, TokenizedCorpus, Estimate]:
    """Tokenize the documents into *folder* and cut them into units."""
    check_names(source.arrays)
    corpus = tokenized(source, source.documents, folder, progress)
    lengths, sequences = corpus.lengths, corpus.segmentation
    plan = planned(
        source, corpus.input_lengths, sequences.kept, linked=sequences.linked, image_bytes=corpus.image_bytes
    )
    shard_rows = plan.shard_rows
    run, padded, largest = plan.forwards()
    n_arrays = sum(len(array.slices) for array in source.arrays)
    estimate = Estimate(
        rows=plan.n_rows,
        documents=len(lengths),
        sequences=len(sequences.lengths),
        units=plan.n_units,
        shard_rows=shard_rows,
        files=plan.n_units * n_arrays,
        bytes=total_bytes(source.arrays, plan.n_rows, shard_rows),
        tokens=int(lengths.sum(dtype=np.int64)),
        tokens_run=run,
        tokens_padded=padded,
        longest_document=int(lengths.max()),
        truncated_documents=corpus.truncated,
        skipped_documents=corpus.skipped,
        rowless_documents=corpus.rowless,
        largest_batch=largest,
    )
    return plan, corpus, estimate


def tokenized(source: Source, documents: Corpus, folder: Path, progress: Progress) -> TokenizedCorpus:
    """Tokenize the documents of a source, or a part of them, into *folder*."""
    spec = source.spec
    return tokenize_corpus(
        documents,
        source.tokenizer,
        folder,
        spec,
        vocabulary=source.vocabulary,
        encoder_vocabulary=source.encoder_vocabulary,
        positions=source.positions,
        empty=spec.empty_documents,
        keep_text=spec.keep_text,
        progress=progress,
    )


def planned(
    source: Source,
    sides: np.ndarray,
    kept: np.ndarray,
    shard_rows: int | None = None,
    linked: np.ndarray | None = None,
    image_bytes: int = 0,
) -> Plan:
    """Cut sequences of these sides and rows into units, of *shard_rows* where they are only a part of a corpus.

    Of images, a unit's *image_bytes* are bounded like the bytes of a shard, since they are read together.
    """
    spec, lengths = source.spec, sides.max(axis=1)
    if shard_rows is None:
        tokens, rows = (int(values.sum(dtype=np.int64)) for values in (lengths, kept))
        widest = max(source.widest_row, image_bytes // max(1, rows))
        shard_rows = unit_rows(rows, int(kept.max()), tokens, widest, spec.batch_tokens)
    groups = batch_groups(source.batching, sides)
    return Plan(lengths, kept, shard_rows, spec.batch_tokens, spec.seed, linked=linked, groups=groups)


def estimate(source: Source, progress: Progress = lambda documents, tokens: None) -> Estimate:
    """Return what a plan would amount to; nothing is kept."""
    with tempfile.TemporaryDirectory(prefix="flexcache-plan-") as folder:
        return make_plan(source, Path(folder), progress)[2]


def plan_store(
    path: StoreLocation,
    source: Source,
    progress: Progress = lambda documents, tokens: None,
    on_wait: Callable[[], None] = lambda: None,
) -> Estimate | None:
    """Make a store that holds its plan and no activations; it appears at *path* in one step.

    Where several processes ask for it, one plans and the others wait, calling *on_wait* now and then; if the one ends
    before it has finished, another takes over.

    Returns
    -------
    What the plan amounts to; None where the store was there, or another process made it.

    Raises
    ------
    PlanError
        The disk has no room for the whole store.
    StoreError
        The place is taken.
    DocumentsError
        See `flexcache.sequences.tokenize_corpus`.
    CaptureError
        The disk refuses a write.
    """
    return create_once(path, lambda folder: _plan(path, folder, source, progress), on_wait)


def _plan(path: StoreLocation, folder: Path, source: Source, progress: Progress) -> Estimate:
    plan, corpus, amount = make_plan(source, folder, progress)
    check_free_space(path, amount.bytes)
    content = {
        "spec": source.spec.model_dump(mode="json"),
        "provenance": {
            "model": for_store(source.model),
            "tokenizer": source.tokenizer_identity,
            "documents": source.documents.describe(),
            "versions": versions(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            **(source.notes or {}),
        },
    }
    create(
        path, folder, plan, corpus, source.arrays, asdict(amount), content,
        compression=source.spec.compression, card=card(path.name, source.arrays, amount.lines(), content),
    )  # fmt: skip
    return amount


def check_same(
    stored: dict[str, Any], given: dict[str, Any], path: StoreLocation, *, allow_changed_model: bool = False
) -> list[str]:
    """Return what differs between the model of a store and the one at hand, if that is allowed.

    Raises
    ------
    MismatchError
        With every value that differs: of models, if *allow_changed_model* is False, and of anything else.
    """
    stored_model, model = (part.get("model") or {} for part in (stored, given))
    before, now = (_flat({key: part for key, part in held.items() if key != "model"}) for held in (stored, given))
    budget = "spec.batch_tokens"
    if None in (before.get(DOCUMENTS_DIGEST), now.get(DOCUMENTS_DIGEST)):  # of an earlier version, or of a generator
        before.pop(DOCUMENTS_DIGEST, None)
        now.pop(DOCUMENTS_DIGEST, None)
    if now.get(budget, 0) < before.get(budget, 0):
        now[budget] = before[budget]  # smaller forwards of the same plan
    different = [
        f"{name}: {before.get(name, 'nothing')} in the store, {now.get(name, 'nothing')} now"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    if different:
        different += differences(stored_model, model)
        raise MismatchError(
            "the store was made from something else",
            where=str(path),
            found=join_lines(different),
            remedy="give the same configuration to go on with it, or another path for a new store",
        )
    return check_model(stored_model, model, str(path), allow=allow_changed_model)


def stored_identity(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return the same parts as `Source.identity` from the attributes of a store."""
    provenance = attributes["provenance"]
    return {
        "spec": attributes["spec"],
        "arrays": attributes["arrays"],
        "model": provenance["model"],
        "tokenizer": provenance["tokenizer"],
        "documents": provenance["documents"],
    }


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {k: v for name, part in value.items() for k, v in _flat(part, f"{path}.{name}".lstrip(".")).items()}
    return {path: value}
