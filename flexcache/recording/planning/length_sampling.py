"""Estimate the size of a capture from a sample of the corpus, with its error."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from flexcache.documents.runs import spread_runs
from flexcache.errors import DocumentsError
from flexcache.plan import unit_rows
from flexcache.progress import ProgressCallback, ignore_progress
from flexcache.recording.planning.planning import Estimate, PlanInputs, estimate_size, planned, tokenizing
from flexcache.sequences import TokenizedCorpus
from flexcache.store.format.schema import COORDINATES, DOCUMENTS, SEQUENCES
from flexcache.store.storage.backend import relative_files
from flexcache.store.write.create import check_names, create

DOCUMENTS_TOKENIZED = 2048
UNITS_SIMULATED = 4


@dataclass(frozen=True)
class Sampled:
    """The size of a capture, extrapolated from a sample of its documents.

    Attributes
    ----------
    amount : Estimate
        The size for the whole corpus. The longest document is that of the sample; a longer one may make units larger.
    documents, table_bytes : int
        Number of tokenized documents; bytes of documents.parquet, sequences.parquet and the coordinates.
    error : float
        Two standard errors of the tokens, relative to them; 0 if all documents were tokenized. It comes from the
        variance between the runs of the sample, so it is larger for a corpus whose documents change along the way.
    plan : Path
        The sample as a store without activations; its batches can be run.
    """

    amount: Estimate
    documents: int
    error: float
    table_bytes: int
    plan: Path


def sample(
    inputs: PlanInputs,
    folder: Path,
    size: int = DOCUMENTS_TOKENIZED,
    seed: int = 0,
    progress: ProgressCallback = ignore_progress,
) -> Sampled:
    """Tokenize about *size* documents and extrapolate the size of the capture of all documents.

    Documents are sampled as runs of consecutive documents, one at random in each of up to 64 equal parts of the corpus.
    The shares of repeated tokens and of padding are simulated, with units of full size made of documents drawn from the
    sample. DocumentsError as for `flexcache.sequences.tokenize_corpus`, or if the number of documents is unknown.
    """
    check_names(inputs.arrays)
    count = inputs.documents.count
    if count is None:
        raise DocumentsError(
            "the number of documents is not known",
            where=str(inputs.documents.describe()["kind"]),
            expected="files, a table, or a list",
        )
    runs = spread_runs(count, size, seed)
    most = inputs.spec.max_tokens
    unbounded = replace(inputs, spec=inputs.spec.model_copy(update={"max_tokens": None}))
    *_, corpus = tokenizing(unbounded, inputs.documents.select_runs(runs), folder, progress)
    read = sum(len(run) for run in runs)
    tokens = int(corpus.lengths.sum(dtype=np.int64)) * count / read
    scale = count / read * (1 if most is None else min(1.0, most / tokens))
    amount = _extrapolated(inputs, corpus, scale, seed)
    sequences = corpus.segmentation
    plan = planned(inputs, corpus.input_lengths, sequences.kept, amount.shard_rows, sequences.linked)
    path, place = folder / "sample.zarr", folder / "making"
    place.mkdir()
    content = {
        "spec": inputs.spec.model_dump(mode="json"),
        "provenance": {"model": inputs.model, "tokenizer": inputs.tokenizer_identity, "documents": {}},
    }
    summary = {**asdict(amount), "rows": plan.n_rows, "units": plan.n_units}
    create(path, place, plan, corpus, inputs.arrays, summary, content, "")
    return Sampled(
        amount=amount,
        documents=read,
        error=0.0 if read == count else _error(corpus, runs, count),
        table_bytes=_table_bytes(path, scale),
        plan=path,
    )


def _extrapolated(inputs: PlanInputs, corpus: TokenizedCorpus, scale: float, seed: int) -> Estimate:
    sequences, spec = corpus.segmentation, inputs.spec
    sides, kept, linked = corpus.input_lengths, sequences.kept, sequences.linked
    lengths = sides.max(axis=1)
    tokens = round(int(lengths.sum(dtype=np.int64)) * scale)
    n_rows = round(int(kept.sum()) * scale)
    widest = max(inputs.widest_row, corpus.image_bytes // max(1, int(kept.sum())))
    shard_rows = unit_rows(n_rows, int(kept.max()), tokens, widest, spec.batch_tokens)
    if scale != 1:
        # sequences of the sample, drawn with replacement, enough for a few units
        count = min(round(len(lengths) * scale), int(UNITS_SIMULATED * shard_rows / kept.mean()) + 1)
        some = np.random.default_rng(seed).choice(len(kept), count)
        lengths, sides, kept, linked = lengths[some], sides[some], kept[some], None
    share = tokens / int(lengths.sum(dtype=np.int64))
    return estimate_size(inputs, corpus, planned(inputs, sides, kept, shard_rows, linked), n_rows, scale, share)


def _error(corpus: TokenizedCorpus, runs: list[range], count: int) -> float:
    """Return two relative standard errors of the mean tokens of a document, from the means of runs of equal length."""
    if len(runs) < 2:
        return 1.0
    length = len(runs[0])
    order = corpus.read_documents(0, len(corpus.lengths)).column("source_index").to_numpy()
    tokens = np.bincount(order // length, weights=corpus.lengths, minlength=len(runs))
    unseen = 1 - len(runs) * length / count
    return float(2 * tokens.std(ddof=1) / tokens.mean() * np.sqrt(unseen / len(runs)))


def _table_bytes(path: Path, scale: float) -> int:
    """Return the bytes of tables and coordinates of a store, scaled by *scale* except for their metadata."""
    parts = [name for name in relative_files(path) if name.split("/")[0] in (DOCUMENTS, SEQUENCES, *COORDINATES)]
    whole = sum((path / name).stat().st_size for name in parts)
    fixed = sum((path / name / "zarr.json").stat().st_size for name in COORDINATES)
    fixed += sum(pq.read_metadata(path / name).serialized_size for name in (DOCUMENTS, SEQUENCES))
    return fixed + round((whole - fixed) * scale)
