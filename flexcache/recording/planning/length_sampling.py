"""What a capture would amount to, from a part of the corpus: the rest is extrapolated, with its error."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from flexcache.documents.runs import spread_runs
from flexcache.errors import DocumentsError
from flexcache.plan import Plan, unit_rows
from flexcache.recording.planning.planning import Estimate, Progress, Source, planned, tokenized
from flexcache.sequences import TokenizedCorpus
from flexcache.store.format.schema import COORDINATES, DOCUMENTS, SEQUENCES
from flexcache.store.storage.backend import relative_files
from flexcache.store.write.create import check_names, create, total_bytes

DOCUMENTS_TOKENIZED = 2048
UNITS_SIMULATED = 4


@dataclass(frozen=True)
class Sampled:
    """A capture in numbers, extrapolated from a sample of its documents.

    Attributes
    ----------
    amount : Estimate
        Of the whole corpus. Its longest document is the longest seen; a longer one may make units larger.
    documents : int
        Documents tokenized.
    error : float
        Two standard errors of the tokens, as a share of them; 0 where all documents were tokenized. From the spread
        between the runs of the sample, so that a corpus whose documents change on the way through has a larger one.
    table_bytes : int
        Of documents.parquet, sequences.parquet and the coordinates.
    plan : Path
        The sample as a store without activations, whose batches can be run.
    """

    amount: Estimate
    documents: int
    error: float
    table_bytes: int
    plan: Path


def sample(
    source: Source,
    folder: Path,
    size: int = DOCUMENTS_TOKENIZED,
    seed: int = 0,
    progress: Progress = lambda documents, tokens: None,
) -> Sampled:
    """Tokenize about *size* documents of a source, and say what all of them would amount to.

    Documents are taken as runs of neighbours, one at random in each of up to 64 equal parts of the corpus. How many
    tokens are run again, and how many are padding, is simulated: units as large as those of the whole, of documents
    drawn from the sample.

    Raises
    ------
    DocumentsError
        See `flexcache.sequences.tokenize_corpus`; or nothing says how many documents there are.
    """
    check_names(source.arrays)
    count = source.documents.count
    if count is None:
        raise DocumentsError(
            "how many documents there are is not known",
            where=str(source.documents.describe()["kind"]),
            expected="files, a table, or a list",
        )
    runs = spread_runs(count, size, seed)
    most = source.spec.max_tokens
    unbounded = replace(source, spec=source.spec.model_copy(update={"max_tokens": None}))
    corpus = tokenized(unbounded, source.documents.select_runs(runs), folder, progress)
    read = sum(len(run) for run in runs)
    tokens = int(corpus.lengths.sum(dtype=np.int64)) * count / read
    scale = count / read * (1 if most is None else min(1.0, most / tokens))
    amount = _extrapolated(source, corpus, scale, seed)
    sequences = corpus.segmentation
    plan = planned(source, corpus.input_lengths, sequences.kept, amount.shard_rows, sequences.linked)
    path, place = folder / "sample.zarr", folder / "making"
    place.mkdir()
    content = {
        "spec": source.spec.model_dump(mode="json"),
        "provenance": {"model": source.model, "tokenizer": source.tokenizer_identity, "documents": {}},
    }
    summary = {**asdict(amount), "rows": plan.n_rows, "units": plan.n_units}
    create(path, place, plan, corpus, source.arrays, summary, content, compression=source.spec.compression, card="")
    return Sampled(
        amount=amount,
        documents=read,
        error=0.0 if read == count else _error(corpus, runs, count),
        table_bytes=_table_bytes(path, scale),
        plan=path,
    )


def _extrapolated(source: Source, corpus: TokenizedCorpus, scale: float, seed: int) -> Estimate:
    sequences, spec = corpus.segmentation, source.spec
    sides, kept, linked = corpus.input_lengths, sequences.kept, sequences.linked
    lengths = sides.max(axis=1)
    tokens = round(int(lengths.sum(dtype=np.int64)) * scale)
    n_rows = round(int(kept.sum()) * scale)
    widest = max(source.widest_row, corpus.image_bytes // max(1, int(kept.sum())))
    shard_rows = unit_rows(n_rows, int(kept.max()), tokens, widest, spec.batch_tokens)
    if scale != 1:
        some = _drawn(kept, shard_rows, round(len(lengths) * scale), seed)
        lengths, sides, kept, linked = lengths[some], sides[some], kept[some], None
    run, padded, largest = planned(source, sides, kept, shard_rows, linked).forwards()
    share = tokens / int(lengths.sum(dtype=np.int64))
    none = np.zeros(0, np.int32)
    units = Plan(none, none, shard_rows, spec.batch_tokens, spec.seed, n_rows).n_units
    return Estimate(
        rows=n_rows,
        documents=round(len(corpus.lengths) * scale),
        sequences=round(len(sequences.lengths) * scale),
        units=units,
        shard_rows=shard_rows,
        files=units * sum(len(array.slices) for array in source.arrays),
        bytes=total_bytes(source.arrays, n_rows, shard_rows),
        tokens=round(int(corpus.lengths.sum(dtype=np.int64)) * scale),
        tokens_run=round(run * share),
        tokens_padded=round(padded * share),
        longest_document=int(corpus.lengths.max()),
        truncated_documents=round(corpus.truncated * scale),
        skipped_documents=round(corpus.skipped * scale),
        rowless_documents=round(corpus.rowless * scale),
        largest_batch=largest,
    )


def _drawn(kept: np.ndarray, shard_rows: int, most: int, seed: int) -> np.ndarray:
    """Return numbers of sequences of the sample, drawn with replacement, enough for a few units."""
    count = min(most, int(UNITS_SIMULATED * shard_rows / kept.mean()) + 1)
    return np.random.default_rng(seed).choice(len(kept), count)


def _error(corpus: TokenizedCorpus, runs: list[range], count: int) -> float:
    """Return two standard errors of the mean tokens of a document, relative, by the means of runs of equal length."""
    if len(runs) < 2:
        return 1.0
    length = len(runs[0])
    order = corpus.read_documents(0, len(corpus.lengths)).column("source_index").to_numpy()
    tokens = np.bincount(order // length, weights=corpus.lengths, minlength=len(runs))
    unseen = 1 - len(runs) * length / count
    return float(2 * tokens.std(ddof=1) / tokens.mean() * np.sqrt(unseen / len(runs)))


def _table_bytes(path: Path, scale: float) -> int:
    """Return the bytes of the tables and coordinates of a store, *scale* times as large but for what describes them."""
    parts = [name for name in relative_files(path) if name.split("/")[0] in (DOCUMENTS, SEQUENCES, *COORDINATES)]
    whole = sum((path / name).stat().st_size for name in parts)
    fixed = sum((path / name / "zarr.json").stat().st_size for name in COORDINATES)
    fixed += sum(pq.read_metadata(path / name).serialized_size for name in (DOCUMENTS, SEQUENCES))
    return fixed + round((whole - fixed) * scale)
