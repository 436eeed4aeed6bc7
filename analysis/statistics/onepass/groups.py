"""Group rows by position, token, token class or document label, or by several of these at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import xarray as xr
import xxhash

from analysis.dataset import document_columns
from analysis.statistics.onepass.row_block import RowBlock
from flexcache.errors import AnalysisError, nearest
from flexcache.spec import listed
from flexcache.store.read.store import Store

POSITIONS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


@dataclass(frozen=True, eq=False)
class GroupKey:
    """A key to group by: a code for each value of a coordinate.

    Attributes
    ----------
    name : str
        Name of the dim in results.
    of : str
        Coordinate of the rows: ``position``, ``token_id`` or ``document``.
    edges : ndarray, or None
        Lower edges of buckets, the last one open; the code is the bucket of the value.
    table : ndarray, or None
        Codes by value; -1 and values beyond the table are in no group.
    labels : ndarray
        Meaning of each code.
    """

    name: str
    of: str
    labels: np.ndarray
    edges: np.ndarray | None = None
    table: np.ndarray | None = None

    def codes(self, block: RowBlock) -> np.ndarray:
        """Return the code of each row; -1 for rows in no group."""
        values = np.asarray(getattr(block, self.of), np.int64)
        if self.edges is not None:
            return np.searchsorted(self.edges, values, side="right") - 1
        assert self.table is not None
        inside = (values >= 0) & (values < len(self.table))
        return np.where(inside, self.table[np.where(inside, values, 0)], -1)

    def digest(self) -> str:
        """Return the XXH3-128 of labels, edges and codes: other labels or token types give another one."""
        labels = "\n".join(map(str, self.labels.tolist())).encode()
        arrays = [np.ascontiguousarray(array) for array in (self.edges, self.table) if array is not None]
        return xxhash.xxh3_128_hexdigest(b"".join([labels, *(array.tobytes() for array in arrays)]))


@dataclass(frozen=True, eq=False)
class Grouping:
    """All combinations of the codes of some keys; without keys, one group of all rows.

    >>> Grouping().size
    1
    """

    keys: tuple[GroupKey, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of codes of each key."""
        return tuple(len(key.labels) for key in self.keys)

    @cached_property
    def size(self) -> int:
        """Number of groups."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the keys."""
        return tuple(key.name for key in self.keys)

    def codes(self, block: RowBlock) -> np.ndarray:
        """Return the group of each row; -1 for rows in no group."""
        code = np.zeros(len(block), np.int64)
        outside = np.zeros(len(block), bool)
        for key in self.keys:
            own = key.codes(block)
            outside |= own < 0
            code = code * len(key.labels) + own
        return np.where(outside, -1, code)

    def unfold(self, values: np.ndarray, *dims: str) -> xr.Variable:
        """Return per-group values, shape (groups, …), as a variable with a dim for each key and then *dims*."""
        return xr.Variable((*self.dims, *dims), values.reshape(self.shape + values.shape[1:]))

    def coordinates(self) -> dict[str, Any]:
        """Return the coordinates of results; position buckets also have their end, which is excluded."""
        found: dict[str, Any] = {key.name: (key.name, key.labels) for key in self.keys}
        for key in self.keys:
            if key.edges is not None:
                stops = np.append(key.edges[1:], np.iinfo(np.int32).max)
                found[f"{key.name}_stop"] = (key.name, stops)
        return found

    def describe(self) -> list[str]:
        """Return the name of each key and a digest of its codes, for provenance."""
        return [f"{key.name} {key.digest()}" for key in self.keys]


def grouping(
    store: Store,
    by: str | Sequence[str] = (),
    *,
    positions: Sequence[int] | None = None,
    token_types: Any = None,
) -> Grouping:
    """Return the groups of rows for some keys.

    ::

        groups = onepass.grouping(store, ["position", "label"], positions=[0, 1, 8, 64])
        onepass.read(store, "resid_post", {"moments": Moments(groups)})

    Parameters
    ----------
    by
        Any of ``position``, ``token_id``, ``token_type``, and columns of ``store.documents`` that hold text, whole
        numbers or booleans. ``layer`` is accepted and ignored, because results always have a layer.
    positions
        First positions of the buckets, ascending; 0, 1, 2, 4, 8, … up to the longest document by default.
    token_types
        Result of `analysis.tokens.token_types`, needed for ``token_type``.

    Raises
    ------
    AnalysisError
        The documents do not have the column, or its values cannot be labels.
    """
    keys = [
        _key(store, name, positions, token_types) for name in dict.fromkeys(listed(by, str, "by")) if name != "layer"
    ]
    return Grouping(tuple(keys))


def _key(store: Store, name: str, positions: Sequence[int] | None, token_types: Any) -> GroupKey:
    if name == "position":
        longest = int(store.plan.get("longest", 0)) or int(np.max(store.documents["n_tokens"].to_numpy(), initial=1))
        edges = np.asarray(positions if positions is not None else [p for p in POSITIONS if p < longest] or [0])
        if not len(edges) or (np.diff(edges) <= 0).any() or edges[0] < 0:
            raise AnalysisError("positions are not ascending", expected="first positions of buckets", found=str(edges))
        return GroupKey("position", "position", edges.astype(np.int64), edges=edges.astype(np.int64))
    if name == "token_id" and getattr(store, "images", False):
        raise AnalysisError(
            "the tokens of images have no ids", remedy="group by position, or a column of the documents"
        )
    if name == "token_id":
        highest = 0
        for tokens in store.tokens["tokens"].chunks:
            values = tokens.flatten().to_numpy(zero_copy_only=False)
            highest = max(highest, int(values.max(initial=0)))
        ids = np.arange(highest + 1)
        return GroupKey("token_id", "token_id", ids, table=ids)
    if name == "token_type":
        if token_types is None:
            raise AnalysisError(
                "classes of tokens need the vocabulary",
                where="by token_type",
                remedy="give token_types=analysis.tokens.token_types(vocabulary)",
            )
        return GroupKey("token_type", "token_id", np.asarray(token_types.names), table=np.asarray(token_types.codes))
    return _label_key(store, name)


def _label_key(store: Store, name: str) -> GroupKey:
    table = store.documents
    if name not in table.column_names:
        known = ("layer", "position", "token_id", "token_type", *table.column_names)
        raise AnalysisError(f"rows cannot be grouped by {name!r}", where=str(store.path), remedy=nearest(name, known))
    values = document_columns.read_column(table, name, "group")
    valid = document_columns.is_known(values)
    found = np.asarray(values.to_pylist(), object)
    if any(isinstance(value, float) for value in found[valid]):
        raise AnalysisError(
            f"rows cannot be grouped by {name!r}", expected="text, whole numbers or booleans", found=str(values.type)
        )
    labels = sorted(set(found[valid].tolist())) or [""]
    place = {label: code for code, label in enumerate(labels)}
    codes = np.array([place[value] if good else -1 for value, good in zip(found, valid)], np.int64)
    return GroupKey(name, "document", np.asarray(labels), table=codes)
