"""Import the samples of inference engines: checked first, then read once more, batch by batch, into a store."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

from flexcache.array_spec import DTYPES
from flexcache.errors import ConfigError, DamagedError, MismatchError
from flexcache.exchange.engine_layout import EngineLayout
from flexcache.exchange.engine_samples import Sample, SampleFile, SampleProblem, read_sample
from flexcache.exchange.sample_labels import SampleLabels
from flexcache.progress import ProgressCallback
from flexcache.recording.external_forward import record
from flexcache.store.read.store import Store
from flexcache.store.storage.location import parse_location

BATCH_TOKENS = 4096
MASK = "loss_mask"
SHOWN = 8
_BLOCK = 1 << 22
DOCUMENTS_AT_A_TIME = 256
_TYPES = {"id": pa.string(), "tokens": pa.list_(pa.int32()), MASK: pa.list_(pa.int8())}
_Shape = tuple[tuple[tuple[int, str], ...], bool]
"""Features and dtype of each state, and True if there is a loss mask."""
_EXPONENTS = {"bfloat16": 0x7F80, "float16": 0x7C00}


@dataclass(frozen=True)
class _Corpus:
    """Documents of the samples, mapped from a file, and the dtype and features of all samples."""

    table: pa.Table
    dtype: str
    features: list[int]
    longest: int
    size: int


def import_samples(
    root: Path,
    target: str | Path,
    kind: str,
    files: Sequence[SampleFile],
    layout: EngineLayout,
    *,
    labels: SampleLabels,
    model: str,
    dtype: str | None,
    compression: str,
    progress: ProgressCallback,
) -> Store:
    """Make a store from the samples of an engine; see `flexcache.import_folder`.

    All samples are read and checked before the store is begun; a resumed import checks their token ids alone. Memory
    holds the samples of one batch.

    Raises
    ------
    DamagedError
        Samples cannot be read, or do not fit; the first are named, each with the reason.
    ConfigError
        The dtype of the states cannot be stored as it is.
    MismatchError
        The target holds another store, or a sample has changed since the import began.
    """
    begun = (parse_location(target) / "zarr.json").exists()
    with _corpus(root, files, kind, layout, labels, finite=not begun) as corpus:
        if dtype is None and corpus.dtype not in DTYPES:
            raise ConfigError(
                f"states of {corpus.dtype} cannot be stored as they are",
                expected=f"one of {', '.join(DTYPES)}",
                remedy="choose the stored dtype (--dtype float32)",
            )
        widths = dict(zip(layout.targets, corpus.features, strict=True))
        sites: dict[str, tuple[int, int] | int] = {
            site: features if layer is None or layout.depth is None else (layout.depth, features)
            for (site, layer), features in widths.items()
        }
        origin = {"format": kind, "samples": len(files), "bytes": corpus.size}
        recorder = record(
            target,
            corpus.table,
            sites=sites,
            layers=sorted({layer for _, layer in layout.targets if layer is not None}) or "all",
            model={"name": model, "class": "imported", "imported": origin, "engine": layout.engine},
            dtype=dtype or corpus.dtype,
            batch_tokens=max(BATCH_TOKENS, corpus.longest),
            token_labels=[MASK] if MASK in corpus.table.column_names else [],
            compression=compression,
            fingerprint={"imported": kind},
        )
    final = len(layout.targets) > layout.layers
    with recorder:
        source = recorder.store.documents.column("source_index").to_numpy()
        progress(recorder.rows_done, recorder.store.n_rows)
        for batch in recorder.batches():
            samples = [
                _same_sample(files[source[sequence.document]], kind, layout.layers, final, sequence.tokens)
                for sequence in batch.sequences
            ]
            for state, (site, layer) in enumerate(layout.targets):
                values = batch.kept([sample.states[state] for sample in samples])
                recorder.put(site, values, rows=batch.rows, layer=layer)
            progress(recorder.rows_done + len(batch.rows), recorder.store.n_rows)
    return Store(target)


def _same_sample(file: SampleFile, kind: str, layers: int, final: bool, tokens: np.ndarray) -> Sample:
    try:
        sample = read_sample(file, kind, layers, final)
    except SampleProblem as error:
        raise DamagedError("a sample cannot be imported", where=str(file.path), found=str(error)) from error
    if not np.array_equal(sample.tokens, tokens):
        raise MismatchError(
            "a sample has other tokens than when the import began",
            where=str(file.path),
            remedy="import into a new store",
        )
    return sample


@contextmanager
def _corpus(
    root: Path, files: Sequence[SampleFile], kind: str, layout: EngineLayout, labels: SampleLabels, finite: bool
) -> Iterator[_Corpus]:
    """Check all samples, and yield their documents, which are written to a temporary file meanwhile."""
    with tempfile.TemporaryDirectory(prefix="flexcache-import-") as folder:
        path = Path(folder) / "documents.arrow"
        problems: list[str] = []
        shapes: dict[_Shape, list[str]] = {}
        longest = size = 0
        final = len(layout.targets) > layout.layers
        with _DocumentFile(path) as documents:
            for number, file in enumerate(files):
                try:
                    sample = read_sample(file, kind, layout.layers, final)
                    mask = labels.check_sample(number, sample)
                    if finite:
                        _check_finite(sample, layout)
                except (SampleProblem, DamagedError) as error:
                    why = error if isinstance(error, SampleProblem) else f"{error.message}: {error.found}"
                    problems.append(f"{file.id}: {why}")
                    continue
                shapes.setdefault((sample.shape, mask is not None), []).append(file.id)
                longest, size = max(longest, len(sample.tokens)), size + sum(state.nbytes for state in sample.states)
                if len(shapes) == 1:
                    documents.add(file.id, sample.tokens, mask)
        problems += _different(shapes)
        if problems:
            more = f"\n    and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
            raise DamagedError(
                f"{len(problems)} of {len(files)} samples cannot be imported",
                where=str(root),
                found="\n    ".join(problems[:SHOWN]) + more,
                remedy=("check the format and the layer ids, or " if len(problems) == len(files) > 1 else "")
                + "write these samples again, or move them out of the folder; nothing has been imported. An engine"
                " with prefix caching gives fewer states than token ids"
                if finite
                else "write these samples again: the import that was begun needs them",
            )
        ((states, _),) = shapes
        with pa.memory_map(str(path)) as source:
            table = labels.add_to(pa.ipc.open_file(source).read_all())
            yield _Corpus(table, states[0][1], [features for features, _ in states], longest, size)


class _DocumentFile:
    """An Arrow file of documents, written some at a time."""

    def __init__(self, path: Path) -> None:
        self._path, self._rows = path, list[dict[str, Any]]()
        self._writer: pa.ipc.RecordBatchFileWriter | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        if self._writer is not None:
            self._writer.close()

    def add(self, name: str, tokens: np.ndarray, mask: np.ndarray | None) -> None:
        self._rows.append({"id": name, "tokens": tokens} | ({} if mask is None else {MASK: mask}))
        if len(self._rows) == DOCUMENTS_AT_A_TIME:
            self._flush()

    def _flush(self) -> None:
        if not self._rows:
            return
        names = self._rows[0].keys()
        columns = {name: pa.array([row[name] for row in self._rows], _TYPES[name]) for name in names}
        batch, self._rows = pa.RecordBatch.from_pydict(columns), []
        if self._writer is None:
            self._writer = pa.ipc.new_file(str(self._path), batch.schema)
        self._writer.write_batch(batch)


def _different(shapes: dict[_Shape, list[str]]) -> list[str]:
    """Return the samples that differ from most others in features, dtype or loss mask, each with the reason."""
    if not shapes:
        return []
    common = max(shapes, key=lambda shape: len(shapes[shape]))
    usual = f"most samples have {_described(common)}"
    return [
        f"{name}: {_described(shape)}; {usual}" for shape in shapes if shape != common for name in shapes[shape]
    ] + [
        f"{name}: {_described(common)}: several dtypes" for name in shapes[common] if len({d for _, d in common[0]}) > 1
    ]


def _described(shape: _Shape) -> str:
    states = ", ".join(f"{features} features in {dtype}" for features, dtype in dict.fromkeys(shape[0]))
    return f"{len(shape[0])} states of {states}, {'with' if shape[1] else 'without'} a loss mask"


def _check_finite(sample: Sample, layout: EngineLayout) -> None:
    """Raise SampleProblem if a state has a value that is not finite."""
    for state, (site, layer) in zip(sample.states, layout.targets, strict=True):
        step = max(1, _BLOCK // max(1, state.shape[1]))
        exponent = _EXPONENTS.get(state.dtype.name)
        for start in range(0, len(state), step):
            block = np.ascontiguousarray(state[start : start + step])
            if exponent is None:
                finite = np.isfinite(block)
            else:
                finite = (block.view(np.uint16) & exponent) != exponent
            if not finite.all():
                token = start + int(np.flatnonzero(~finite.all(axis=1))[0])
                place = site if layer is None else f"{site} of layer {layer}"
                raise SampleProblem(f"a value that is not finite, at token {token}, {place}")
