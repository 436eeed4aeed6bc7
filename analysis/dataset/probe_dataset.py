"""Build a probe dataset: the rows of a store that have a target, with target and group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from analysis.dataset import document_columns
from analysis.dataset.layer_choice import choose_layers
from analysis.dataset.readable import Readable, Rows, Task
from analysis.dataset.row_choice import choose_rows, row_offsets
from analysis.dataset.store_argument import accept_store_path
from analysis.dataset.targets import DocumentTarget, TokenTarget, check_target
from flexcache.errors import AnalysisError, nearest
from flexcache.site import Layers

BLOCK = 8192
"""Rows in memory at once when documents are pooled."""


@dataclass(frozen=True)
class ProbeDataset:
    """Samples of one site with targets and groups; made by `build_dataset`.

    ::

        dataset = probe_dataset.build_dataset(store, "resid_post", "label", rows="mean")
        X, y = dataset.read_layer(12), dataset.y

    A *sample* is one feature vector: a row of a document, the mean or maximum of its rows, or, with ``rows="all"``,
    each of its rows. With ``rows="tokens"`` it is the matrix of the rows of a document. Activations are read only by
    `read_layer` and `read_samples`.
    """

    store: Readable = field(repr=False)
    site: str
    layers: tuple[int | None, ...]
    """Captured layers in ascending order; ``(None,)`` for a module path."""
    target: str
    task: Task
    task_reason: str
    """The reason for the task, such as the type of the values."""
    classes: tuple[Any, ...]
    """The classes in sorted order; empty in a regression."""
    rows: Rows
    groups: str | None
    y: NDArray[Any]
    """(n_samples,) int64 positions in ``classes``, or float64 values."""
    group: NDArray[np.int64]
    """(n_samples,) numbers of the groups that folds must not split."""
    document: NDArray[np.int64]
    """(n_samples,) positions in ``row_start``, ``texts`` and the other columns of the kept documents."""
    source: NDArray[np.int64]
    """(n_documents,) rows of ``store.documents``."""
    row_start: NDArray[np.int64]
    n_rows: NDArray[np.int64]
    row: NDArray[np.int64] | None
    """(n_samples,) rows of the store, one per sample; None if a sample is made of several rows."""
    texts: tuple[str, ...] | None = field(repr=False)
    dropped: dict[str, int]
    """Number of documents that were left out, by reason."""
    labels: dict[str, str] = field(default_factory=dict)
    """Checksums of the label tables of target and groups that were joined after the capture, by column."""

    @property
    def n_samples(self) -> int:
        """Number of feature vectors."""
        return len(self.y)

    @property
    def n_documents(self) -> int:
        """Number of documents with a target, a group and at least one row."""
        return len(self.source)

    @property
    def n_groups(self) -> int:
        """Number of groups."""
        return int(self.group.max()) + 1

    @property
    def corpus_order(self) -> NDArray[np.int64]:
        """The samples in the order of the corpus, which batches of another size do not change, (n_samples,)."""
        table = self.store.documents
        if "source_index" not in table.column_names:
            return np.arange(self.n_samples)
        return np.argsort(table["source_index"].to_numpy()[self.source][self.document], kind="stable")

    def read_layer(self, layer: int | None, *, linear: bool = False) -> NDArray[Any]:
        """Return the samples of one layer, float32 ``(n_samples, features)``; an array of matrices for tokens.

        Memory is that one matrix, and what a probe adds (`bytes_per_layer`). Pooled samples read at most `BLOCK` rows
        at a time and average in float64.

        Raises
        ------
        AnalysisError
            A value is not finite, or the matrix does not fit into memory.
        """
        self._check_memory(layer, linear)
        self._prefetch(layer, self._every_row() if self.row is None else self.row)
        if self.rows == "tokens":
            flat = self._finite(layer, _matrix(self.store.read(self.site, layer=layer, rows=self._every_row())))
            matrices = np.empty(self.n_samples, object)
            matrices[:] = np.split(flat, np.cumsum(self.n_rows)[:-1])
            return matrices
        if self.row is not None:
            return self._finite(layer, _matrix(self.store.read(self.site, layer=layer, rows=self.row)))
        return self._finite(layer, self._pooled(layer))

    def read_samples(self, layer: int | None, part: slice) -> NDArray[np.float32]:
        """Return the samples of one layer in the slice *part*; each sample must be one row."""
        assert self.row is not None
        self._prefetch(layer, self.row[part])
        return self._finite(layer, _matrix(self.store.read(self.site, layer=layer, rows=self.row[part])), part.start)

    @property
    def features(self) -> int:
        """Number of features of a sample."""
        array = getattr(self.store, "arrays", {}).get(self.site)
        if array is not None:
            return int(array.features)
        return int(_matrix(self.store.read(self.site, layer=self.layers[0], rows=self.row_start[:1])).shape[1])

    def _prefetch(self, layer: int | None, rows: NDArray[np.int64]) -> None:
        """Recompute rows of a virtual layer with those of the layers after it, which are probed next."""
        attached = getattr(self.store, "attached", None)
        if attached is not None and layer is not None:
            attached.prefetch(self.site, [one for one in self.layers if one is not None and one >= layer], rows)

    def bytes_per_layer(self, *, linear: bool = False) -> int:
        """Return the peak bytes of a probe in memory: float32 rows, float64 rows, and their standardised copy.

        A *linear* probe of this package computes block by block: float32 rows, and at most as much again.
        """
        count = int(self.n_rows.sum()) if self.rows == "tokens" else self.n_samples
        return count * self.features * (4 + 4 if linear else 4 + 8 + 8)

    def _check_memory(self, layer: int | None, linear: bool) -> None:
        if self.rows not in ("all", "tokens") or layer != self.layers[0]:
            return
        needed, memory = self.bytes_per_layer(linear=linear), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > memory:
            raise AnalysisError(
                "one layer of all rows does not fit into memory",
                where=self.site,
                expected=f"at most {memory / 2**30:.1f} GiB",
                found=f"{self.n_samples:,} samples need {needed / 2**30:.1f} GiB",
                remedy='use a linear probe, which reads blocks; set rows="mean" or rows="last"; or select documents',
            )

    def _pooled(self, layer: int | None) -> NDArray[np.float32]:
        largest = self.rows == "max"
        found: NDArray[np.float64] | None = None
        for rows, owner in _blocks(self.row_start, self.n_rows):
            block = _matrix(self.store.read(self.site, layer=layer, rows=rows))
            if found is None:
                found = np.full((self.n_documents, block.shape[1]), -np.inf if largest else 0.0)
            first = np.flatnonzero(np.diff(owner, prepend=-1))
            if largest:
                found[owner[first]] = np.maximum(found[owner[first]], np.maximum.reduceat(block, first, axis=0))
            else:
                found[owner[first]] += np.add.reduceat(block, first, axis=0, dtype=np.float64)
        assert found is not None
        return (found if largest else found / self.n_rows[:, None]).astype(np.float32)

    def _every_row(self) -> NDArray[np.int64]:
        return np.repeat(self.row_start, self.n_rows) + _within(self.n_rows)

    def _finite(self, layer: int | None, X: NDArray[np.float32], first: int = 0) -> NDArray[np.float32]:
        finite = np.isfinite(X).all(axis=1)
        if not finite.all():
            at = int(finite.argmin()) + first
            if self.rows == "tokens":
                at = int(np.searchsorted(np.cumsum(self.n_rows), at, side="right"))
            raise AnalysisError(
                "an activation is not finite",
                where=f"{self.site}, layer {layer}, {self._id(at)}",
                expected="finite values",
                found=f"{int((~finite).sum())} samples with NaN or infinity",
                remedy="run flexcache verify on the store; choose a layer that was captured",
            )
        return X

    def _id(self, sample: int) -> str:
        table, row = self.store.documents, int(self.source[self.document[sample]])
        return f"document {table['id'][row].as_py()!r}" if "id" in table.column_names else f"document {row}"


@accept_store_path
def build_dataset(
    store: Readable,
    site: str,
    target: str | TokenTarget | DocumentTarget,
    *,
    groups: str | None = "document",
    rows: Rows | None = None,
    layers: Layers = "all",
    task: Task | None = None,
) -> ProbeDataset:
    """Build a probe dataset from the rows of a store and the columns of its documents.

    ::

        dataset = probe_dataset.build_dataset(store, "resid_post", "label", rows="last", layers=[12])

    Parameters
    ----------
    store
        A store as `flexcache.open` returns it, or its path.
    site
        Name of an array of the store.
    target
        A column of ``store.documents``, or a target of `analysis.targets`. Text, booleans and integers are classes,
        and so are two whole numbers in a floating-point column; numbers with decimals are a regression. More than two
        whole numbers in a floating-point column need *task*, because pandas turns integers with missing values into
        such a column. Documents and tokens without a value (null, NaN or an empty text) are left out and counted in
        `ProbeDataset.dropped`.
    groups
        ``"document"`` keeps the rows of a document together. The name of a column keeps documents with the same value
        together, that of a label of tokens, such as ``"turn"`` of chats, the rows with the same value. ``None`` makes
        each row its own group, which leaks the identity of a document.
    rows
        ``"last"`` or ``"first"`` token, ``"mean"`` or ``"max"`` over tokens, or ``"all"`` rows of each document; a
        token position, negative from the end of the document (documents without it are left out); or ``"tokens"`` for
        probes that read all rows of a document together. By default the row that the store holds for each document,
        or the last one of several; all rows for a token target.
    layers
        ``"all"`` captured layers, a number, a list, or a slice as text. Negative numbers count from the last layer of
        the model.
    task
        ``"classification"`` or ``"regression"``, to override the type of the column.

    Raises
    ------
    AnalysisError
        The store does not have the column, site, layer or row; the target has fewer than two values, or is ambiguous.
    """
    table = store.documents
    if site not in store.sites:
        raise AnalysisError(f"the store has no site {site!r}", remedy=nearest(str(site), tuple(store.sites)))
    check_target(target)
    if not isinstance(groups, str | None):
        raise AnalysisError(
            "groups cannot be read",
            expected="document, a column of the documents, or None",
            found=type(groups).__name__,
        )
    if task not in (*get_args(Task), None):
        raise AnalysisError(f"task cannot be {task!r}", remedy=nearest(str(task), get_args(Task)))
    by_token = isinstance(target, TokenTarget)
    rows = "all" if by_token and rows is None else choose_rows(store, rows)
    if by_token and rows in ("mean", "max", "tokens"):
        raise AnalysisError(f"a token target cannot be read from the {rows} of a document", remedy='rows="all"')
    n_rows = table["n_rows"].to_numpy().astype(np.int64)
    name = target if isinstance(target, str) else target.name
    if isinstance(target, str):
        if target not in table.column_names and target in getattr(store, "token_labels", ()):
            raise AnalysisError(
                f"{target!r} is a label of tokens, not of documents",
                where="target",
                remedy=f"give analysis.targets.read(store, {target!r})[0]",
            )
        values = document_columns.read_column(table, target, "target")
    else:
        values = target.of_documents(table, store) if isinstance(target, DocumentTarget) else None
    valid = np.ones(len(table), bool) if values is None else document_columns.is_known(values)
    keys = row_keys = None
    if groups is not None and groups != "document":
        of_tokens: Any = store
        if groups in getattr(store, "token_labels", ()) and groups not in table.column_names:
            row_keys = of_tokens.token_label(groups)
        else:
            keys = document_columns.read_column(table, groups, "groups")
    if row_keys is not None and rows in ("mean", "max", "tokens"):
        raise AnalysisError(
            f"groups by tokens cannot be read from the {rows} of a document", found=str(groups), remedy='rows="all"'
        )
    grouped = np.ones(len(table), bool) if keys is None else document_columns.is_known(keys)
    chosen = row_offsets(store, rows, n_rows)
    reasons = {
        "no target": ~valid,
        "no group": valid & ~grouped,
        "no rows": valid & grouped & (n_rows == 0),
        "no such token": valid & grouped & (n_rows > 0) & (chosen < 0),
    }
    kept = np.flatnonzero(valid & grouped & (n_rows > 0) & (chosen >= 0))
    dropped = {reason: int(mask.sum()) for reason, mask in reasons.items() if mask.any()}
    if not len(kept):
        raise AnalysisError(
            "no document can be used", where=f"target {name!r}", found=f"left out: {dropped or 'nothing'}"
        )

    n_rows, row_start = n_rows[kept], table["row_start"].to_numpy()[kept].astype(np.int64)
    document = np.repeat(np.arange(len(kept)), n_rows if rows == "all" else 1)
    row = None if rows in ("mean", "max", "tokens") else row_start[document] + chosen[kept][document]
    if rows == "all":
        row = row_start[document] + _within(n_rows)
    if isinstance(target, TokenTarget):
        assert row is not None
        of_row = target.values(store)
        known = document_columns.is_known(of_row.take(pa.array(row)))
        if not known.all():
            dropped["tokens without a target"] = int((~known).sum())
        row, document = row[known], document[known]
        values = of_row.take(pa.array(row))
    else:
        assert values is not None
        values = values.take(pa.array(kept))
    if row_keys is not None:
        assert row is not None
        known = document_columns.is_known(row_keys.take(pa.array(row)))
        if not known.all():
            dropped["tokens without a group"] = int((~known).sum())
        row, document = row[known], document[known]
        values = values.filter(pa.array(known)) if by_token else values
    if not len(document):
        raise AnalysisError("no token can be used", where=f"target {name!r}", found=f"left out: {dropped or 'nothing'}")
    task, reason = document_columns.choose_task(values, name, task)
    y, classes = document_columns.encode_target(values, name, task)
    if groups is None:
        group = np.arange(len(document))
    elif row_keys is not None:
        group = np.unique(document_columns.value_codes(row_keys.take(pa.array(row))), return_inverse=True)[1]
    elif keys is None:
        group = np.unique(document, return_inverse=True)[1]
    else:
        group = np.unique(document_columns.value_codes(keys.take(pa.array(kept)))[document], return_inverse=True)[1]
    texts = None
    if "text" in table.column_names:
        texts = tuple(text or "" for text in table["text"].take(pa.array(kept)).to_pylist())
    return ProbeDataset(
        store=store,
        site=site,
        layers=choose_layers(store, site, layers),
        target=name,
        task=task,
        task_reason=reason,
        classes=classes,
        rows=rows,
        groups=groups,
        y=y if by_token else y[document],
        group=group.astype(np.int64),
        document=document,
        source=kept,
        row_start=row_start,
        n_rows=n_rows,
        row=row,
        texts=texts,
        dropped=dropped,
        **document_columns.joined_labels(store, (target, groups)),
    )


def _within(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return 0 … n−1 for each count, concatenated."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1]) - np.repeat(ends - counts, counts)


def _blocks(
    row_start: NDArray[np.int64], n_rows: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield (rows, document of each row), at most `BLOCK` rows at a time; a document may be split."""
    ends = np.cumsum(n_rows)
    for low in range(0, int(ends[-1]), BLOCK):
        place = np.arange(low, min(low + BLOCK, int(ends[-1])))
        owner = np.searchsorted(ends, place, side="right")
        yield row_start[owner] + place - (ends - n_rows)[owner], owner


def _matrix(values: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray(values, np.float32).reshape(len(values), -1)
