"""Targets beside the plain columns of the documents: of single tokens, and of one label among several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import cloudpickle
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from flexcache.errors import AnalysisError, nearest

COORDINATES = ("token_id", "position", "document")


class _Target:
    """Base of the two kinds of target; it pickles with its function, which may be a lambda or a closure."""

    name: str
    values: Callable[[Any], pa.Array]

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (type(self), self.name, cloudpickle.dumps(self.values))


def _unpickled(kind: Callable[[str, Any], Any], name: str, values: bytes) -> Any:
    return kind(name, cloudpickle.loads(values))


@dataclass(frozen=True)
class TokenTarget(_Target):
    """A target with a value for each row of a store; made by `coordinate`, `function` and `spans`.

    Attributes
    ----------
    name
        What it is called in results.
    values
        Of a store: one value a row, as an Arrow array; null for rows that have none.
    """

    name: str
    values: Callable[[Any], pa.Array]


@dataclass(frozen=True)
class DocumentTarget(_Target):
    """A target with a value for each document of a store; made by `labels`.

    Attributes
    ----------
    name
        What it is called in results.
    values
        Of a store: one value a document, as an Arrow array; null for documents that have none.
    """

    name: str
    values: Callable[[Any], pa.Array]

    def of_documents(self, documents: pa.Table, store: Any) -> pa.Array:
        """Return the value of each document.

        Raises
        ------
        AnalysisError
            The function of the target gave another number of values.
        """
        found = self.values(store)
        found = found if isinstance(found, pa.Array) else pa.array(found, from_pandas=True)
        if len(found) != len(documents):
            raise AnalysisError(
                "a target gave another number of values",
                where=self.name,
                expected=f"{len(documents)}, one a document",
                found=str(len(found)),
            )
        return found


def check_target(target: Any) -> None:
    """Raise AnalysisError if a value is neither the name of a label nor a target of this module."""
    if not isinstance(target, str | TokenTarget | DocumentTarget):
        raise AnalysisError(
            "that is not a target",
            expected="the name of a column of the documents, or a target of analysis.targets",
            found=type(target).__name__,
            remedy="values of your own: analysis.targets.DocumentTarget(name, lambda store: values), one a document, or"
            " analysis.targets.function(name, lambda tokens: values), one a row",
        )


def read(store: Any, text: str) -> list[str | TokenTarget | DocumentTarget]:
    """Return the targets that a text means for a store.

    A column of the documents; of a column of lists of words, a target for each word; of a column of lists of
    ``{start, end, label}``, the labels of tokens; a label that the tokens were captured with; or ``token_id``,
    ``position`` or ``document``.
    """
    table = store.documents
    if text in store.token_labels:
        return [TokenTarget(text, lambda other: other.token_label(text))]
    if text in table.column_names:
        kind = table.schema.field(text).type
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            return [spans(text)] if pa.types.is_struct(kind.value_type) else [*labels(store, text)]
        return [text]
    return [coordinate(text)] if text in COORDINATES else [text]


def labels(store: Any, column: str) -> list[DocumentTarget]:
    """Return a target for each word in a column of lists of words: whether the document has it.

    Documents with null in place of a list are left out; null and NaN within a list are no word.
    """

    def has(word: str) -> Callable[[Any], pa.Array]:
        return lambda other: pa.array(
            [None if found is None else word in found for found in other.documents[column].to_pylist()]
        )

    listed = {word for found in store.documents[column].to_pylist() for word in found or ()}
    words = sorted((word for word in listed if word is not None and word == word), key=str)  # NaN is not itself
    return [DocumentTarget(f"{column}={word}", has(word)) for word in words]


def coordinate(name: str) -> TokenTarget:
    """Return ``token_id``, ``position`` or ``document`` as the target of each token.

    Raises
    ------
    AnalysisError
        There is no such coordinate.
    """
    if name not in COORDINATES:
        raise AnalysisError(f"tokens have no {name!r}", remedy=nearest(name, COORDINATES))
    return TokenTarget(name, lambda store: pa.array(np.asarray(store.coordinates[name].values)))


def function(name: str, of: Callable[[Mapping[str, NDArray[Any]]], Any]) -> TokenTarget:
    """Return what a function says of the tokens.

    Parameters
    ----------
    name
        What it is called in results.
    of
        Takes the coordinates of all rows by name: token_id, position and document (line of the documents table), each
        of shape (rows,). Returns a value for each row; None or NaN for rows to leave out.
    """

    def values(store: Any) -> pa.Array:
        told = {key: np.asarray(store.coordinates[key].values) for key in COORDINATES}
        found = of(told)
        found = found if isinstance(found, pa.Array) else pa.array(found, from_pandas=True)
        if len(found) != len(told["position"]):
            raise AnalysisError(
                "a function of tokens gave another number of values",
                where=name,
                expected=f"{len(told['position'])}, one a row",
                found=str(len(found)),
            )
        return found

    return TokenTarget(name, values)


def spans(column: str, outside: str | None = None) -> TokenTarget:
    """Return the labels of spans of tokens, from a column of the documents.

    Parameters
    ----------
    column
        A list for each document, of structs ``start``, ``end`` (token positions, the end excluded) and ``label``. Of
        spans that overlap, the later one counts.
    outside
        The label of tokens in no span; by default they are left out.
    """

    def values(store: Any) -> pa.Array:
        if column not in store.documents.column_names:
            raise AnalysisError(
                f"the documents have no column {column!r}", remedy=nearest(column, tuple(store.documents.column_names))
            )
        position = np.asarray(store.coordinates["position"].values)
        labels = np.full(len(position), outside, object)
        starts, counts = (store.documents[name].to_numpy().astype(np.int64) for name in ("row_start", "n_rows"))
        for line, found in enumerate(store.documents[column].to_pylist()):
            mine = slice(starts[line], starts[line] + counts[line])
            for span in found or ():
                if not isinstance(span, dict) or not {"start", "end", "label"} <= span.keys():
                    raise AnalysisError(
                        f"column {column!r} holds no spans",
                        expected="lists of {start, end, label}",
                        found=str(span)[:80],
                    )
                inside = (position[mine] >= span["start"]) & (position[mine] < span["end"])
                labels[mine][inside] = span["label"]
        return pa.array(labels.tolist())

    return TokenTarget(column, values)
