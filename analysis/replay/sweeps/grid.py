"""Which cells a sweep visits: a site, layers, and which tokens of each document."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexcache.errors import AnalysisError
from flexcache.site import Layers, plain_layers, resolve_layers
from flexcache.store.read.store import Store

WORDS = ("last", "first", "all", "each")
Place = int | str | dict[str, tuple[int, ...]]
"""One entry of the position dim: a number, a word, or chosen positions by document id."""


@dataclass(frozen=True)
class Grid:
    """Layers × positions of one site; made by `grid`.

    Attributes
    ----------
    positions : mapping from label to Place
        What the position dim of the results is called, and which tokens of a document it means.
    """

    site: str
    layers: Layers
    positions: Mapping[str, Place]

    def resolve(self, store: Store, depth: int) -> tuple[tuple[int | None, ...], dict[str, Place]]:
        """Return the layers, and the positions with ``"each"`` spelt out.

        Layers are those of the store where it holds the site or the residual stream before it; all of *depth* are those
        that a replay can start at.
        """
        positions = dict(self.positions)
        if "each" in positions:
            longest = int(store.documents["n_tokens"].to_numpy().max())
            del positions["each"]
            positions |= {str(place): place for place in range(longest)}
        if "." in self.site:
            return (None,), positions
        if self.layers != "all":
            return resolve_layers(self.layers, depth), positions
        return tuple(_startable(store, self.site, depth)), positions


def grid(
    site: str = "resid_post",
    layers: Layers = "all",
    positions: str | int | Sequence[int | str] | Mapping[str, Mapping[str, Sequence[int]]] = "last",
) -> Grid:
    """Say where a sweep makes its edits.

    Parameters
    ----------
    site
        One of `flexcache.site.STANDARD`, or a module path.
    layers
        ``"all"`` that the store allows, a number, a list, or text such as ``"0,8"`` or ``"8:24"``.
    positions
        ``"last"`` or ``"first"`` token of each document, ``"all"`` of them at once, ``"each"`` position one by one; a
        number, negative from the document's end; a list of these, one by one; or names for positions that differ by
        document: ``{"subject": {"doc-1": [2, 3], …}}``. Documents that have no such token are left out.

    Raises
    ------
    AnalysisError
        Positions that cannot be read.
    """
    if not isinstance(site, str):
        raise AnalysisError("a site cannot be read", expected="a name or a module path", found=repr(site)[:80])
    found: dict[str, Place] = {}
    if isinstance(positions, Mapping):
        for name, by_document in positions.items():
            if not isinstance(by_document, Mapping):
                raise _unread(by_document, "positions by document id, such as {'subject': {'doc-1': [2, 3]}}", name)
            found[str(name)] = {
                str(key): tuple(number(place, f"{name}, {key}") for place in several(places))
                for key, places in by_document.items()
            }
    else:
        for place in several(positions):
            word = isinstance(place, str) and place in WORDS
            found[str(place)] = place if word else number(place)
    if not found:
        raise AnalysisError("no position is given", remedy='write positions="last"')
    return Grid(site, plain_layers(layers), found)


def chosen(place: Place, lengths: NDArray[np.int64], ids: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the tokens that a place means in documents: their lines, and their positions, each once."""
    lines: list[int] = []
    positions: list[int] = []
    for line, length in enumerate(lengths.tolist()):
        if isinstance(place, dict):
            asked: Any = place.get(ids[line], ())
        elif place == "all":
            asked = range(length)
        else:
            asked = (-1,) if place == "last" else (0,) if place == "first" else (place,)
        found = sorted({p + length if p < 0 else p for p in asked if -length <= p < length})
        lines += [line] * len(found)
        positions += found
    return np.array(lines, np.int64), np.array(positions, np.int64)


def reachable(place: Place, lengths: Mapping[str, int]) -> bool:
    """Return True if any document, of *lengths* by id, has a token at a place."""
    if isinstance(place, dict):
        asked = ((p, lengths.get(name, 0)) for name, places in place.items() for p in places)
        return any(-length <= p < length for p, length in asked)
    return isinstance(place, str) or any(-length <= place < length for length in lengths.values())


def several(places: Any) -> list[Any]:
    """Return a list of what may be given as one, or as several."""
    return list(places) if isinstance(places, Iterable) and not isinstance(places, str | Mapping) else [places]


def number(place: Any, where: str | None = None) -> int:
    """Return a position as an int; raise AnalysisError if it is no whole number."""
    if isinstance(place, bool) or not hasattr(place, "__index__"):
        raise _unread(place, "a whole number" + ("" if where else f", or one of {', '.join(WORDS)}"), where)
    return index(place)


def _unread(place: Any, expected: str, where: str | None) -> AnalysisError:
    return AnalysisError(
        "a position cannot be read", where=where, expected=expected, found=" ".join(repr(place).split())[:80]
    )


def _startable(store: Store, site: str, depth: int) -> list[int]:
    post = set(store.layers("resid_post")) if "resid_post" in store.arrays else set()
    pre = set(store.layers("resid_pre")) if "resid_pre" in store.arrays else set()
    ready = {0} | {layer + 1 for layer in post} | pre  # blocks that can be the first to run
    return [layer for layer in range(depth) if (layer + (site == "resid_post")) in ready]
