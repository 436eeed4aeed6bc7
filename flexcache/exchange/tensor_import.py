"""Import tensors from files of other tools: layers by the names of the tensors, documents by their shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flexcache.array_spec import DTYPES
from flexcache.errors import ConfigError, DamagedError, MismatchError, SiteError
from flexcache.exchange.file_tensors import FileTensor, TensorStack, find_tensors, list_tensors
from flexcache.paths import local_path
from flexcache.plan import ranges
from flexcache.progress import ProgressCallback
from flexcache.recording.external_forward import record
from flexcache.site import STANDARD
from flexcache.store.format.text import TABLE_COLUMNS
from flexcache.store.read.store import Store

LAYER_PATTERN = r"(?:layers?|blocks|h)[._](\d+)"
"""Layer in the name of a tensor: ``layer_3``, ``model.layers.3``, ``blocks.3.hook_resid_post``, ``transformer.h.3``."""
BATCH_TOKENS = 4096


def import_tensors(
    folder: Path,
    target: str | Path,
    kind: str,
    *,
    site: str,
    layer_pattern: str,
    depth: int | None,
    token_ids: str | None,
    documents: str | Path | None,
    model: str,
    dtype: str | None,
    compression: str,
    progress: ProgressCallback,
) -> Store:
    """Make a store from the tensors in a folder; see `flexcache.import_folder`."""
    tensors = find_tensors(folder, kind)
    names = token_ids if token_ids is not None else "token_ids" if kind == "saelens" else None
    found = _layers([tensor for tensor in tensors if not _is_called(tensor, names)], site, _compiled(layer_pattern))
    shape = _shape(found)
    corpus, offsets = _documents(shape, documents, _token_ids(folder, tensors, names, shape, token_ids is not None))
    first = next(iter(found.values()))[0]
    numbers = sorted(layer for layer in found if layer is not None)
    if depth is not None and numbers and not max(numbers) < depth:
        raise ConfigError(f"depth {depth} has no layer {max(numbers)}", expected=f"at least {max(numbers) + 1}")
    origin = {"format": kind, "tensors": len(tensors), "bytes": sum(_bytes(tensor) for tensor in tensors)}
    with record(
        target,
        corpus,
        sites={site: (depth or max(numbers) + 1, first.shape[-1]) if numbers else first.shape[-1]},
        layers=numbers or "all",
        model={"name": model, "class": "imported", "imported": origin},
        dtype=dtype or _stored(first),
        batch_tokens=max(BATCH_TOKENS, int(pc.max(pc.list_value_length(corpus.column("tokens"))).as_py())),
        compression=compression,
        fingerprint={"imported": kind},
    ) as recorder:
        stacks = {layer: TensorStack(found[layer]) for layer in recorder.store.arrays[site].slices}
        source = offsets[recorder.store.documents.column("source_index").to_numpy()]
        position, document = (recorder.store.coordinates[name].values for name in ("position", "document"))
        progress(recorder.rows_done, recorder.store.n_rows)
        for batch in recorder.batches():
            span = slice(batch.rows.start, batch.rows.stop)
            rows = source[document[span]] + position[span]
            for layer, stack in stacks.items():
                recorder.put(site, stack.gather_rows(rows), rows=batch.rows, layer=layer)
            progress(recorder.rows_done + len(batch.rows), recorder.store.n_rows)
    return Store(target)


@dataclass(frozen=True)
class _Shape:
    """Number of tokens, and tokens of each document if the tensors have a document dim."""

    tokens: int
    lengths: np.ndarray | None


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"layer pattern {pattern!r} cannot be read", found=str(error)) from error
    if compiled.groups != 1:
        raise ConfigError(
            f"layer pattern {pattern!r} has {compiled.groups} groups",
            expected="one group, the number of the layer",
            remedy=r"for example layer[._](\d+)",
        )
    return compiled


def _layers(tensors: Sequence[FileTensor], site: str, pattern: re.Pattern[str]) -> dict[int | None, list[FileTensor]]:
    """Return the tensors of each layer, in order; the key is None if there are no layers."""
    found: dict[int | None, list[FileTensor]] = {}
    for tensor in tensors:
        match = pattern.search(tensor.name) or pattern.search(tensor.file)
        if match is None:
            continue
        try:
            found.setdefault(int(match[1]), []).append(tensor)
        except (TypeError, ValueError):
            raise ConfigError(
                f"layer pattern {pattern.pattern!r} finds no number", where=str(tensor), found=repr(match[1])
            ) from None
    if found:
        return found
    if site in STANDARD or not tensors:
        raise SiteError(
            f"no tensor of the folder has a layer, which {site} needs",
            expected=f"names that {pattern.pattern} finds a number in",
            found=", ".join(map(str, tensors[:8])) or "no tensor",
            remedy="give a layer pattern with one group, such as --layer-pattern 'block(\\d+)'",
        )
    return {None: list(tensors)}


def _shape(found: dict[int | None, list[FileTensor]]) -> _Shape:
    """Return the common shape of the tensors of all layers; raise MismatchError if they differ."""
    first = next(iter(found.values()))
    lead = [tensor.shape[:-1] for tensor in first]
    for layer, tensors in found.items():
        for tensor in tensors:
            if len(tensor.shape) not in (2, 3) or len(tensor.shape) != len(first[0].shape):
                raise MismatchError(
                    "a tensor has the wrong number of dims",
                    where=str(tensor),
                    expected="(tokens, features) or (documents, tokens, features), the same for all",
                    found=str(tensor.shape),
                )
            if tensor.shape[-1] != first[0].shape[-1] or tensor.dtype != first[0].dtype:
                raise MismatchError(
                    "tensors differ in features or dtype",
                    where=str(tensor),
                    expected=f"{first[0].shape[-1]} features in {first[0].dtype}, as {first[0]}",
                    found=f"{tensor.shape[-1]} features in {tensor.dtype}",
                )
        if [tensor.shape[:-1] for tensor in tensors] != lead:
            raise MismatchError(
                f"layer {layer} has other tokens than layer {next(iter(found))}",
                expected=_sum(lead),
                found=_sum([tensor.shape[:-1] for tensor in tensors]),
                remedy="every layer needs the same tensors; a file may be missing",
            )
    tokens = sum(math.prod(shape) for shape in lead)
    if not tokens:
        raise MismatchError("the tensors hold no token", where=str(first[0]))
    lengths = np.concatenate([np.full(shape[0], shape[1]) for shape in lead]) if len(lead[0]) == 2 else None
    return _Shape(tokens, lengths)


def _sum(shapes: list[tuple[int, ...]]) -> str:
    return f"{sum(math.prod(shape) for shape in shapes)} tokens in {len(shapes)} tensors"


def _token_ids(folder: Path, tensors: list[FileTensor], names: str | None, shape: _Shape, needed: bool) -> np.ndarray:
    if names is None:
        return np.zeros(shape.tokens, np.int32)
    inside = [tensor for tensor in tensors if _is_called(tensor, names)]
    path = next((path for path in (folder / names, local_path(names)) if path.is_file()), None)
    if path is not None and not inside:
        inside = list_tensors(path, path.name)
    if not inside and not needed:
        return np.zeros(shape.tokens, np.int32)
    if not inside:
        raise ConfigError(f"there are no token ids {names!r}", expected="the name of a tensor in the files, or a file")
    flat = np.concatenate([tensor.open().reshape(-1) for tensor in inside])
    if len(flat) != shape.tokens or flat.dtype.kind not in "iu":
        raise MismatchError(
            "the token ids do not fit the activations",
            where=", ".join(map(str, inside[:3])),
            expected=f"{shape.tokens} whole numbers",
            found=f"{len(flat)} of {flat.dtype}",
        )
    return np.maximum(flat, 0).astype(np.int32)  # -1 stands for the token of a mean


def _documents(shape: _Shape, path: str | Path | None, tokens: np.ndarray) -> tuple[pa.Table, np.ndarray]:
    """Return the documents that have tokens, and the offset of the tokens of each."""
    table = None if path is None else _table(local_path(path))
    if shape.lengths is not None:
        lengths = shape.lengths
    elif table is not None and "n_rows" in table.column_names:
        lengths = table.column("n_rows").to_numpy().astype(np.int64)
    else:
        lengths = np.ones(shape.tokens if table is None else len(table), np.int64)
    if lengths.sum() != shape.tokens or (table is not None and len(table) != len(lengths)):
        raise MismatchError(
            "the documents do not fit the activations",
            where=str(path),
            expected=f"{shape.tokens} tokens"
            + ("" if shape.lengths is None else f" in {len(shape.lengths)} documents"),
            found=f"{int(lengths.sum())} tokens in {len(lengths if table is None else table)} documents",
            remedy="n_rows says how many tokens each document has in the tensors",
        )
    offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    kept = np.flatnonzero(lengths)
    flat = tokens[ranges(offsets[kept], lengths[kept])]
    ends = np.concatenate([[0], np.cumsum(lengths[kept])])
    lists = pa.LargeListArray.from_arrays(pa.array(ends, pa.int64()), pa.array(flat))
    columns: dict[str, Any] = {"tokens": lists}
    if table is not None:
        labels = [name for name in table.column_names if name == "id" or name not in TABLE_COLUMNS]
        columns |= {name: table.column(name).take(pa.array(kept)) for name in labels}
    return pa.table(columns), offsets[kept]


def _table(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise DamagedError(
            "the documents cannot be read", where=str(path), expected="a Parquet file", found=str(error)
        ) from error


def _is_called(tensor: FileTensor, names: str | None) -> bool:
    return (
        names is not None and tensor.name.rpartition(".")[2] == names.rpartition(".")[2] and tensor.name.endswith(names)
    )


def _bytes(tensor: FileTensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _stored(tensor: FileTensor) -> str:
    if tensor.dtype.name not in DTYPES:
        raise ConfigError(
            f"tensors of {tensor.dtype.name} cannot be stored as they are",
            where=str(tensor),
            expected=f"one of {', '.join(DTYPES)}",
            remedy="choose the stored dtype (--dtype float32)",
        )
    return tensor.dtype.name
