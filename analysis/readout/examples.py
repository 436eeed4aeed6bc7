"""Tokens with the largest activations of a neuron or direction, in context, as text and coloured HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike

from analysis.arguments import check_whole
from analysis.dataset.store_argument import accept_store_path
from analysis.dataset.tokens import Vocabulary, vocabulary
from analysis.statistics.onepass import RowBlock, State, Statistic, read
from flexcache.errors import AnalysisError
from flexcache.store.read.store import Store


@dataclass(frozen=True, eq=False)
class TopRows(Statistic):
    """The rows with the largest values of some directions.

    ::

        onepass.read(store, "mlp_post", {"top": TopRows((7, 42), count=20)})["top"]["row"]

    Attributes
    ----------
    directions : ndarray of shape (directions, features), or a tuple of int
        Directions, or indices of features.
    count : int
        Number of rows to keep for each.
    per_document : int
        Largest number of rows of one document; any number by default.
    """

    directions: np.ndarray | tuple[int, ...]
    count: int = 40
    per_document: int | None = None

    def zero(self, features: int) -> State:
        """Return the state of no rows."""
        shape = (self.count, len(self.directions))
        return {"value": np.full(shape, -np.inf), "row": np.full(shape, -1), "document": np.full(shape, -1)}

    def update(self, state: State, block: RowBlock) -> State:
        """Return *state* with the rows of *block* added."""
        values = along(block.float64, self.directions)
        at = np.broadcast_to(np.arange(len(values))[:, None], values.shape)
        if self.per_document is not None:
            values, at = _largest_by_document(values, block.document, min(self.per_document, self.count))
        top = np.argpartition(-values, min(self.count, len(values)) - 1, axis=0)[: self.count]
        values, at = (np.take_along_axis(found, top, 0) for found in (values, at))
        rows, documents = (np.where(at < 0, -1, found[at]) for found in (block.rows, block.document))
        return self.merge(state, {"value": values, "row": rows, "document": documents})

    def merge(self, first: State, second: State) -> State:
        """Return the state of the rows of both; of equal values, the lower row comes first."""
        both = {name: np.concatenate([first[name], second[name]]) for name in first}
        order = np.lexsort((both["row"], -both["value"]), axis=0)
        both = {name: np.take_along_axis(values, order, 0) for name, values in both.items()}
        if self.per_document is not None:
            owner = both["document"]
            before = np.stack([(owner[:i] == owner[i]).sum(0) for i in range(len(owner))])
            order = np.argsort(before >= self.per_document, axis=0, kind="stable")  # rows beyond the limit last
            dropped = np.sort(before >= self.per_document, axis=0) & (np.take_along_axis(owner, order, 0) >= 0)
            both = {name: np.take_along_axis(values, order, 0) for name, values in both.items()}
            both = {name: np.where(dropped, self.zero(0)[name][0], values) for name, values in both.items()}
        return {name: values[: self.count] for name, values in both.items()}

    def result(self, state: State) -> xr.Dataset:
        """Return ``value`` and ``row`` (rank, direction), largest first; row -1 if there are fewer rows."""
        dims = ("rank", "direction")
        return xr.Dataset({"value": (dims, state["value"]), "row": (dims, state["row"])})

    def state_bytes(self, features: int) -> int:
        """Return the bytes of one state."""
        return 24 * self.count * len(self.directions)

    def describe(self) -> dict[str, Any]:
        """Return the arguments as plain values."""
        dims = self.directions
        return {
            "statistic": "examples",
            "count": self.count,
            "per_document": self.per_document,
            "dims": list(dims) if isinstance(dims, tuple) else "given",
        }


@dataclass(frozen=True)
class Example:
    """A token with a large activation of a direction, in context; returned by `top`.

    ::

        for example in examples.top(store, "mlp_post", 12, direction=7):
            print(example)

    Attributes
    ----------
    document : str
        Id of the document.
    position : int
        Position of the token in its document.
    value : float
    tokens : tuple of str
        The token and its context.
    values : tuple of float
        Value of each of *tokens*.
    place : int
        Index of the token in *tokens*.
    """

    document: str
    position: int
    value: float
    tokens: tuple[str, ...]
    values: tuple[float, ...]
    place: int

    def __str__(self) -> str:
        before, after = "".join(self.tokens[: self.place]), "".join(self.tokens[self.place + 1 :])
        return f"{self.value:9.3f}  {before}[[{self.tokens[self.place]}]]{after}".replace("\n", "⏎")


@accept_store_path
def top(
    store: Store,
    site: str,
    layer: int | None,
    direction: int | ArrayLike,
    *,
    count: int = 10,
    context: int = 12,
    per_document: int = 1,
    words: Vocabulary | None = None,
    **where: Any,
) -> list[Example]:
    """Return the tokens with the largest value of a feature or direction, largest first.

    ::

        found = examples.top(store, "mlp_post", 12, direction=7, count=5)
        print(found[0])

    Parameters
    ----------
    direction
        Index of a feature, such as a neuron of ``mlp_post``, or a vector with as many numbers as the site has features.
    context
        Number of tokens to show before and after.
    per_document
        Largest number of tokens of one document; further ones come from the documents with the next largest values.
    words
        The vocabulary; by default that of the model of the store, if it is available. Otherwise tokens are shown as
        ``#id``.
    where
        scheduler, workers and progress; see `analysis.statistics.onepass.read`.

    Raises
    ------
    AnalysisError
        The direction has another length, the site does not have the feature, or a number cannot be used.
    """
    check_whole("count", count, 1)
    check_whole("per_document", per_document, 1)
    check_whole("context", context, 0)
    directions = checked(store, site, [direction])
    statistic = TopRows(directions, count, per_document)
    found = read(store, site, {"top": statistic}, layers="all" if layer is None else layer, **where)
    return shown(
        store,
        site,
        found.layers[0],
        directions,
        found["top"].isel(layer=0),
        count=count,
        context=context,
        words=words,
    )[0]


@accept_store_path
def shown(
    store: Store,
    site: str,
    layer: int | None,
    directions: np.ndarray | tuple[int, ...],
    found: xr.Dataset,
    *,
    count: int = 10,
    context: int = 12,
    words: Vocabulary | None = None,
) -> list[list[Example]]:
    """Return the examples of each direction for one layer of a `TopRows` result."""
    words = words or vocabulary(store) or Vocabulary(())
    rows, values = found["row"].values[:count], found["value"].values[:count]
    return [
        [
            _example(store, site, layer, directions[i : i + 1], row, value, context, words)
            for row, value in zip(rows[:, i].tolist(), values[:, i].tolist())
            if row >= 0
        ]
        for i in range(len(directions))
    ]


def html(examples: Sequence[Example]) -> str:
    """Return examples as HTML, one line each, with tokens coloured by value: warm above 0, cool below.

    ::

        IPython.display.HTML(examples.html(examples.top(store, "mlp_post", 12, direction=7)))

    Colours come from the CSS variables ``--warm`` and ``--cool``, with defaults for a notebook; texts are escaped.
    """
    scale = (
        max((abs(example.value) for example in examples), default=1.0) or 1.0
    )  # the scale ignores massive values in the context
    lines = []
    for example in examples:
        spans = []
        for i, (token, value) in enumerate(zip(example.tokens, example.values)):
            colour = "var(--warm, #d9480f)" if value > 0 else "var(--cool, #1971c2)"
            share = round(75 * min(1.0, abs(value) / scale))
            mark = ";outline:1px solid currentColor" if i == example.place else ""
            text = escape(token).replace("\n", "⏎")
            style = f"background:color-mix(in srgb, {colour} {share}%, transparent){mark}"
            spans.append(f'<span title="{value:.4g}" style="{style}">{text}</span>')
        about = f"{escape(example.document)}, position {example.position}"
        lines.append(
            f'<p class="example" title="{about}" style="white-space:pre-wrap;margin:.3em 0">'
            f"<b>{example.value:.3g}</b> {''.join(spans)}</p>"
        )
    return f'<div class="examples">{"".join(lines)}</div>'


def checked(store: Store, site: str, directions: Sequence[int | ArrayLike]) -> np.ndarray | tuple[int, ...]:
    """Return feature indices as a tuple, or directions as a matrix.

    Raises
    ------
    AnalysisError
        The store does not have the site, or an index or length does not fit it.
    """
    if site not in store.arrays:
        raise AnalysisError(f"the store has no site {site!r}", where=str(store.path))
    features = store.arrays[site].features
    if all(isinstance(item, int | np.integer) for item in directions):
        dims = tuple(int(item) for item in directions)  # type: ignore[arg-type]
        if any(not 0 <= dim < features for dim in dims):
            raise AnalysisError(f"{site} has features 0 to {features - 1}", found=str(list(dims)))
        return dims
    matrix = np.atleast_2d(np.asarray(directions, np.float64))
    if matrix.ndim != 2 or matrix.shape[1] != features:
        raise AnalysisError(
            "a direction has another length than the site", expected=f"{features} numbers", found=str(matrix.shape)
        )
    return matrix


def along(values: np.ndarray, directions: np.ndarray | tuple[int, ...]) -> np.ndarray:
    """Return the values of features, or products with directions, (rows, directions)."""
    return values[:, list(directions)] if isinstance(directions, tuple) else values @ directions.T


def _largest_by_document(values: np.ndarray, document: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the *most* largest values of each document and their places, -inf and -1 where it has fewer rows."""
    starts = np.flatnonzero(np.diff(document, prepend=document[0] - 1))
    lengths = np.diff(starts, append=len(values))
    left, line = values.copy(), np.arange(len(values))[:, None]
    tops, places = [], []
    for _ in range(min(most, int(lengths.max()))):
        top = np.maximum.reduceat(left, starts, axis=0)
        first = np.where(left == np.repeat(top, lengths, axis=0), line, len(values))
        place = np.minimum.reduceat(first, starts, axis=0)
        np.put_along_axis(left, place, -np.inf, axis=0)
        tops.append(top)
        places.append(np.where(top == -np.inf, -1, place))
    return np.concatenate(tops), np.concatenate(places)


def _example(
    store: Store,
    site: str,
    layer: int | None,
    direction: np.ndarray | tuple[int, ...],
    row: int,
    value: float,
    context: int,
    words: Vocabulary,
) -> Example:
    owner = int(store.coordinates["document"].values[row])
    start = int(store.documents["row_start"][owner].as_py())
    stop = start + int(store.documents["n_rows"][owner].as_py())
    rows = np.arange(max(start, row - context), min(stop, row + context + 1))
    values = along(store.read(site, layer, rows).astype(np.float64), direction)[:, 0]
    ids, positions = (store.coordinates[name].values[rows].tolist() for name in ("token_id", "position"))
    if store.images and min(positions) >= 0:  # means have no position
        texts = tuple(f" {store.patches.name(position)}" for position in positions)
    else:
        texts = tuple(words.text(token) if token >= 0 else "(mean)" for token in ids)
    return Example(
        document=str(store.documents["id"][owner].as_py()),
        position=int(store.coordinates["position"].values[row]),
        value=value,
        tokens=texts,
        values=tuple(values.tolist()),
        place=row - int(rows[0]),
    )
