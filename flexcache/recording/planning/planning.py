"""Plan a store from documents, or only estimate its size."""

from __future__ import annotations

import tempfile
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

if TYPE_CHECKING:
    from flexcache.documents import Documents
from flexcache.array_spec import ArraySpec, check_one_window
from flexcache.plan import Batching, Largest, Plan, batch_groups, unit_rows
from flexcache.progress import ProgressCallback, ignore_progress
from flexcache.sequences import Corpus, Positions, TokenizedCorpus, tokenize_corpus
from flexcache.sequences.special_tokens import DOUBLED, doubled_notice
from flexcache.spec import CaptureSpec
from flexcache.store.format.int8 import with_scales
from flexcache.store.format.text import size
from flexcache.store.read.store import Store
from flexcache.store.storage.location import StoreLocation
from flexcache.store.write.create import check_names, total_bytes


@dataclass(frozen=True)
class PlanInputs:
    """The inputs of the plan of a store.

    Attributes
    ----------
    model, tokenizer_identity : dict
        As provenance records them.
    vocabulary, encoder_vocabulary : int or None
        Number of token ids that the model knows, and that the encoder of an encoder-decoder model knows.
    positions : pair of int or None
        As `flexcache.hooks.locate.position_tables.count_positions` returns them.
    notes : dict
        Further provenance, such as user hooks of the model.
    batching : Batching
        The rule by which sequences share a batch.
    """

    documents: Documents
    tokenizer: Any
    arrays: list[ArraySpec]
    spec: CaptureSpec
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

    def match_store(self, path: StoreLocation) -> Self:
        """Return the inputs with the int8 codec of the store at *path*, if there is one."""
        if not (path / "zarr.json").exists():
            return self
        return replace(self, arrays=with_scales(self.arrays, Store(path).arrays))

    def identity(self) -> dict[str, Any]:
        """Return what must agree between a store and a run that resumes it."""
        return {
            "spec": self.spec.model_dump(mode="json"),
            "arrays": {array.name: array.to_json() for array in self.arrays},
            "model": self.model,
            "tokenizer": self.tokenizer_identity,
            "documents": self.documents.describe(read=True),
        }


@dataclass(frozen=True)
class Estimate:
    """The size of a plan.

    Attributes
    ----------
    bytes : int
        Bytes of all shard files, before compression.
    tokens, tokens_run, tokens_padded : int
        Tokens of the documents, of all forward passes, and of all forward passes with padding. For an encoder-decoder
        model, documents count the tokens of the decoder, and forward passes those of the longer side.
    doubled_documents : int
        Texts with special tokens of their own, which the tokenizer does not add again.
    largest_batch : Largest
        The batch with the most tokens: its unit, its number, and its tokens with padding.
    left_out : dict of str to int
        Texts of messages that the chat template leaves out, by part.
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
    doubled_documents: int = 0
    left_out: dict[str, int] = field(default_factory=dict)

    def lines(self) -> list[tuple[str, str]]:
        """Return the estimate as pairs of a name and a formatted value."""
        tokens = f"{self.tokens:,} (run ÷ kept {self.tokens_padded / max(1, self.rows):.2f}"
        tokens += f", padding {self.tokens_padded / max(1, self.tokens_run) - 1:.1%})"
        cut = f", {self.truncated_documents:,} truncated" if self.truncated_documents else ""
        cut += f", {self.skipped_documents:,} empty ones skipped" if self.skipped_documents else ""
        cut += f", {self.rowless_documents:,} without rows left out" if self.rowless_documents else ""
        sequences = f" in {self.sequences:,} sequences" if self.sequences != self.documents else ""
        twice = [("special tokens", doubled_notice(self.doubled_documents))] if self.doubled_documents else []
        left = ", ".join(f"{count:,} of {part}" for part, count in self.left_out.items())
        return [
            ("documents", f"{self.documents:,}{sequences}{cut}; the longest has {self.longest_document:,} tokens"),
            *([("texts left out", f"{left}: the chat template writes no more of these messages")] if left else []),
            ("tokens", tokens),
            *twice,
            ("rows", f"{self.rows:,}"),
            ("units", f"{self.units:,} of {self.shard_rows:,} rows"),
            ("files", f"{self.files:,}"),
            ("bytes", size(self.bytes)),
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the numbers as a store holds them; doubled documents only if there are some, as in older stores."""
        return {name: value for name, value in asdict(self).items() if value or name not in (DOUBLED, "left_out")}


def plan_corpus(inputs: PlanInputs, corpus: TokenizedCorpus) -> Plan:
    """Split the sequences of a tokenized corpus into units."""
    sequences = corpus.segmentation
    check_one_window(inputs.spec.keep, sequences.linked)
    size = size_of_units(inputs, corpus)
    plan = planned(
        inputs,
        corpus.input_lengths,
        sequences.kept,
        None if size is None else size.shard_rows,
        linked=sequences.linked,
        image_bytes=corpus.image_bytes,
    )
    return plan if size is None else replace(plan, expected_rows=size.expected_rows)


class UnitSize(NamedTuple):
    """Rows of a unit, and of the whole corpus as far as its first segment lets expect."""

    shard_rows: int
    expected_rows: int


def size_of_units(inputs: PlanInputs, corpus: TokenizedCorpus) -> UnitSize | None:
    """Return the size of units that follows from the first segment of a corpus; None if it is sized as a whole.

    The first segment ends with the document that reaches ``segment_tokens``. It decides once another document follows,
    so the result does not depend on how far a corpus is tokenized. A generator of documents, whose number is not known,
    and images are sized as a whole.
    """
    spec, count = inputs.spec, inputs.documents.count
    ends = np.cumsum(corpus.lengths, dtype=np.int64)
    documents = int(np.searchsorted(ends, spec.segment_tokens)) + 1
    if count is None or corpus.image_bytes or documents >= len(ends):
        return None
    sequences = corpus.segmentation

    def last_document(sequence: int) -> int:
        return int(sequences.segments(np.array([sequence])).document[-1])

    stop = max(1, bisect_left(range(len(sequences.lengths)), documents, key=last_document))
    lengths, kept = corpus.input_lengths[:stop].max(axis=1), sequences.kept[:stop]
    share = count / documents
    if spec.max_tokens is not None:
        share = min(share, spec.max_tokens / int(ends[documents - 1]))
    tokens, rows = (round(int(values.sum(dtype=np.int64)) * max(1.0, share)) for values in (lengths, kept))
    return UnitSize(unit_rows(rows, int(kept.max()), tokens, inputs.widest_row, spec.batch_tokens), rows)


def estimate_size(
    inputs: PlanInputs, corpus: TokenizedCorpus, plan: Plan, n_rows: int, scale: float = 1.0, share: float = 1.0
) -> Estimate:
    """Return the size of the plan of a corpus of which the tokenized documents are a sample.

    *n_rows* are those of the whole corpus; it has *scale* times the documents of the sample, and *share* times the
    tokens of *plan*.
    """
    run, padded, largest = plan.forwards()
    units = -(-n_rows // plan.shard_rows)
    return Estimate(
        rows=n_rows,
        documents=round(len(corpus.lengths) * scale),
        sequences=round(len(corpus.segmentation.lengths) * scale),
        units=units,
        shard_rows=plan.shard_rows,
        files=units * sum(len(array.slices) for array in inputs.arrays),
        bytes=total_bytes(inputs.arrays, n_rows, plan.shard_rows),
        tokens=round(int(corpus.lengths.sum(dtype=np.int64)) * scale),
        tokens_run=round(run * share),
        tokens_padded=round(padded * share),
        longest_document=int(corpus.lengths.max()),
        truncated_documents=round(corpus.truncated * scale),
        skipped_documents=round(corpus.skipped * scale),
        rowless_documents=round(corpus.rowless * scale),
        largest_batch=largest,
        doubled_documents=round(corpus.doubled * scale),
        left_out={part: round(count * scale) for part, count in sorted(corpus.left_out.items())},
    )


def tokenizing(
    inputs: PlanInputs, documents: Corpus, folder: Path, progress: ProgressCallback
) -> Iterator[TokenizedCorpus]:
    """Tokenize documents, all of the inputs or a part of them, into *folder*; yield them after each batch."""
    spec = inputs.spec
    return tokenize_corpus(
        documents,
        inputs.tokenizer,
        folder,
        spec,
        vocabulary=inputs.vocabulary,
        encoder_vocabulary=inputs.encoder_vocabulary,
        positions=inputs.positions,
        empty=spec.empty_documents,
        keep_text=spec.keep_text,
        progress=progress,
    )


def planned(
    inputs: PlanInputs,
    sides: np.ndarray,
    kept: np.ndarray,
    shard_rows: int | None = None,
    linked: np.ndarray | None = None,
    image_bytes: int = 0,
) -> Plan:
    """Split sequences into units, with *shard_rows* rows each if they are only a part of a corpus.

    Parameters
    ----------
    sides : ndarray of int, shape (sequences, sides)
        Tokens of each sequence; for an encoder-decoder model, of encoder and decoder.
    kept : ndarray of int, shape (sequences,)
        Rows of each sequence.
    image_bytes
        Bytes of all images; those of a unit are bounded like the bytes of a shard, since they are read together.
    """
    spec, lengths = inputs.spec, sides.max(axis=1)
    if shard_rows is None:
        tokens, rows = (int(values.sum(dtype=np.int64)) for values in (lengths, kept))
        widest = max(inputs.widest_row, image_bytes // max(1, rows))
        shard_rows = unit_rows(rows, int(kept.max()), tokens, widest, spec.batch_tokens)
    groups = batch_groups(inputs.batching, sides)
    return Plan(lengths, kept, shard_rows, spec.batch_tokens, spec.seed, linked=linked, groups=groups)


def estimate(inputs: PlanInputs, progress: ProgressCallback = ignore_progress) -> Estimate:
    """Return the size of the plan; nothing is kept."""
    check_names(inputs.arrays)
    with tempfile.TemporaryDirectory(prefix="flexcache-plan-") as folder:
        *_, corpus = tokenizing(inputs, inputs.documents, Path(folder), progress)
        plan = plan_corpus(inputs, corpus)
        return estimate_size(inputs, corpus, plan, plan.n_rows)
