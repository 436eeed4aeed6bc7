"""Targets in addition to the plain columns of the documents: of single tokens, and of one label among several."""

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
    """Base of the two kinds of target; its function, which may be a lambda or a closure, is pickled with it."""

    name: str
    values: Callable[[Any], pa.Array]

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (type(self), self.name, cloudpickle.dumps(self.values))


def _unpickled(kind: Callable[[str, Any], Any], name: str, values: bytes) -> Any:
    return kind(name, cloudpickle.loads(values))


@dataclass(frozen=True)
class TokenTarget(_Target):
    """A target with a value for each row of a store; made by `coordinate`, `function` and `spans`.

    >>> TokenTarget("row", lambda store: pa.array(range(store.n_rows))).name
    'row'

    Attributes
    ----------
    name
        Name in results.
    values
        Function of a store that returns one value per row as an Arrow array, null for rows without a value.
    """

    name: str
    values: Callable[[Any], pa.Array]


@dataclass(frozen=True)
class DocumentTarget(_Target):
    """A target with a value for each document of a store; made by `labels`.

    >>> DocumentTarget("long", lambda store: [n > 100 for n in store.documents["n_tokens"].to_pylist()]).name
    'long'

    Attributes
    ----------
    name
        Name in results.
    values
        Function of a store that returns one value per document as an Arrow array, null for documents without a value.
    """

    name: str
    values: Callable[[Any], pa.Array]

    def of_documents(self, documents: pa.Table, store: Any) -> pa.Array:
        """Return the value of each document.

        Raises
        ------
        AnalysisError
            The function returned another number of values.
        """
        found = self.values(store)
        found = found if isinstance(found, pa.Array) else pa.array(found, from_pandas=True)
        if len(found) != len(documents):
            raise AnalysisError(
                "a target returned another number of values",
                where=self.name,
                expected=f"{len(documents)}, one per document",
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
            remedy="for your own values: analysis.targets.DocumentTarget(name, lambda store: values), one per document,"
            " or analysis.targets.function(name, lambda tokens: values), one per row",
        )


def read(store: Any, text: str) -> list[str | TokenTarget | DocumentTarget]:
    """Return the targets that a name stands for in a store.

    ::

        targets.read(store, "topics")       # a column of lists: one target for each word

    The name is a column of the documents: plain values are one target, lists of words one target for each word, lists
    of ``{start, end, label}`` a token target. Or it is a label that the tokens were captured with, or ``token_id``,
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
    """Return one target for each word in a column of lists of words: True if the document has the word.

    ::

        probes.sweeps(store, targets.labels(store, "topics"), ["resid_post"])

    Documents with null instead of a list are left out; null and NaN inside a list are ignored.
    """

    def has(word: str) -> Callable[[Any], pa.Array]:
        return lambda other: pa.array(
            [None if found is None else word in found for found in other.documents[column].to_pylist()]
        )

    listed = {word for found in store.documents[column].to_pylist() for word in found or ()}
    words = sorted((word for word in listed if word is not None and word == word), key=str)  # NaN is not itself
    return [DocumentTarget(f"{column}={word}", has(word)) for word in words]


def coordinate(name: str) -> TokenTarget:
    """Return ``token_id``, ``position`` or ``document`` as a target of tokens.

    >>> coordinate("position").name
    'position'

    Raises
    ------
    AnalysisError
        Tokens do not have the coordinate.
    """
    if name not in COORDINATES:
        raise AnalysisError(f"tokens have no {name!r}", remedy=nearest(name, COORDINATES))
    return TokenTarget(name, lambda store: pa.array(np.asarray(store.coordinates[name].values)))


def function(name: str, of: Callable[[Mapping[str, NDArray[Any]]], Any]) -> TokenTarget:
    """Return a target of tokens whose values a function computes.

    >>> function("early", lambda tokens: tokens["position"] < 4).name
    'early'

    Parameters
    ----------
    name
        Name in results.
    of
        Function of the coordinates of all rows by name: token_id, position and document (row of the documents table),
        each of shape (rows,). It returns a value for each row; None or NaN leaves the row out.
    """

    def values(store: Any) -> pa.Array:
        told = {key: np.asarray(store.coordinates[key].values) for key in COORDINATES}
        found = of(told)
        found = found if isinstance(found, pa.Array) else pa.array(found, from_pandas=True)
        if len(found) != len(told["position"]):
            raise AnalysisError(
                "a function of tokens returned another number of values",
                where=name,
                expected=f"{len(told['position'])}, one per row",
                found=str(len(found)),
            )
        return found

    return TokenTarget(name, values)


def spans(column: str, outside: str | None = None) -> TokenTarget:
    """Return the labels of token spans in a column of the documents as a target of tokens.

    >>> spans("entities", outside="O").name
    'entities'

    Parameters
    ----------
    column
        Column with a list for each document, of structs ``start``, ``end`` (token positions, end excluded) and
        ``label``. If spans overlap, the later one counts.
    outside
        Label of tokens outside all spans; they are left out by default.
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
