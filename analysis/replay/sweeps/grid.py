"""The grid of a sweep: a site, layers, and the tokens of each document that are edited."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.replay.engine.receiver import Receiver
from flexcache.errors import AnalysisError, nearest
from flexcache.site import Layers, plain_layers, resolve_layers
from flexcache.spec import is_whole
from flexcache.store.read.store import Store

WORDS = ("last", "first", "all", "each")
Positions = int | str | dict[str, tuple[int, ...]]
"""One entry of the position dim: a number, a word, or positions by document id."""
Readout = str | tuple[int, ...]
"""Tokens at which logits are compared: ``"all"``, ``"last"``, or positions, negative from the document's end."""


@dataclass(frozen=True)
class Grid:
    """Layers × positions of one site; made by `grid`.

    >>> grid(layers=[8, 12], positions=[0, "last"])
    Grid(site='resid_post', layers=[8, 12], positions={'0': 0, 'last': 'last'})

    Attributes
    ----------
    positions : mapping from label to Positions
        Labels of the position dim of the results, and the tokens of a document that each stands for.
    heads : "each", tuple of int, or None
        Heads that are edited one by one.
    receiver : Receiver, or None
        The end of the path along which edits act.
    """

    site: str
    layers: Layers
    positions: Mapping[str, Positions]
    heads: str | tuple[int, ...] | None = field(default=None, repr=False)
    receiver: Receiver | None = field(default=None, repr=False)

    def resolve(self, store: Store, depth: int) -> tuple[tuple[int | None, ...], dict[str, Positions]]:
        """Return the layers, and the positions with ``"each"`` resolved to numbers.

        ``"all"`` layers are those of a model of *depth* blocks at which the store allows a replay to start, and from
        which a path leads to the receiver.

        Raises
        ------
        AnalysisError
            No path leads from a layer to the receiver.
        """
        positions = dict(self.positions)
        if "each" in positions:
            longest = int(store.documents["n_tokens"].to_numpy().max())
            del positions["each"]
            positions |= {str(position): position for position in range(longest)}
        if "." in self.site:
            found: tuple[int | None, ...] = (None,)
        elif self.layers != "all":
            found = resolve_layers(self.layers, depth)
        else:
            found = tuple(_layers_to_start_at(store, self.site, depth))
        if self.receiver is None:
            return found, positions
        receiver = self.receiver.in_model(depth)
        before = tuple(n for n in found if n is not None and receiver.follows(self.site, n))
        if not before or (self.layers != "all" and len(before) < len(found)):
            raise AnalysisError(
                "no path leads from the edit to the receiver",
                where=f"{self.site}, layer {', '.join(map(str, [n for n in found if n not in before]))}",
                expected=f"a standard site and layer before {receiver.site} of layer {receiver.layer}",
                remedy="choose earlier layers, or a later receiver",
            )
        return before, positions


def grid(
    site: str = "resid_post",
    layers: Layers = "all",
    positions: str | int | Sequence[int | str] | Mapping[str, Mapping[str, Sequence[int]]] = "last",
    *,
    heads: str | int | Sequence[int] | None = None,
    receiver: Receiver | None = None,
) -> Grid:
    """Return where a sweep makes its edits.

    >>> grid("attn_out", layers=5, positions={"subject": {"doc-1": [2, 3]}}).positions
    {'subject': {'doc-1': (2, 3)}}

    Parameters
    ----------
    site
        One of `flexcache.site.STANDARD`, or a module path.
    layers
        ``"all"`` that the store allows, a number, a list, or text such as ``"0,8"`` or ``"8:24"``.
    positions
        ``"last"`` or ``"first"`` token of each document, ``"all"`` of them at once, ``"each"`` position one by one; a
        number, negative from the document's end; a list of these, one by one; or names for positions that differ by
        document: ``{"subject": {"doc-1": [2, 3], …}}``. Documents without such a token are left out.
    heads
        At ``q``, ``k``, ``v`` or ``z``: edit ``"each"`` head by itself, or each of some. The results have one entry a
        head along the dim edit, with a coordinate ``head``.
    receiver
        Path patching: measure only the effect that reaches the output by way of this `Receiver`. Everything else that
        is added to the residual stream between edit and receiver stays as it is without the edit; what follows the
        receiver is computed.

    Raises
    ------
    AnalysisError
        The site or the positions cannot be read.
    """
    if not isinstance(site, str):
        raise AnalysisError("a site cannot be read", expected="a name or a module path", found=repr(site)[:80])
    found: dict[str, Positions] = {}
    if isinstance(positions, Mapping):
        for name, by_document in positions.items():
            if not isinstance(by_document, Mapping):
                raise _position_error(
                    by_document, "positions by document id, such as {'subject': {'doc-1': [2, 3]}}", name
                )
            found[str(name)] = {
                str(key): tuple(parse_position(one, f"{name}, {key}") for one in as_list(given))
                for key, given in by_document.items()
            }
    else:
        for one in as_list(positions):
            found[str(one)] = one if isinstance(one, str) and one in WORDS else parse_position(one)
    if not found:
        raise AnalysisError("no position is given", remedy='write positions="last"')
    if receiver is not None and not isinstance(receiver, Receiver):
        raise AnalysisError(
            "a receiver cannot be read", expected="replay.Receiver(site, layer)", found=repr(receiver)[:80]
        )
    return Grid(site, plain_layers(layers), found, _parse_heads(heads), receiver)


def _parse_heads(heads: Any) -> str | tuple[int, ...] | None:
    if heads is None or heads == "each":
        return heads
    found = tuple(as_list(heads))
    if not found or not all(is_whole(head) and head >= 0 for head in found) or len(set(found)) < len(found):
        raise AnalysisError("heads cannot be read", expected='"each", or whole numbers', found=repr(heads)[:80])
    return found


def select_tokens(
    positions: Positions, lengths: NDArray[np.int64], ids: Sequence[str]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the lines and positions of the tokens that *positions* selects in documents, each token once."""
    lines: list[int] = []
    found: list[int] = []
    for line, length in enumerate(lengths.tolist()):
        if isinstance(positions, dict):
            asked: Any = positions.get(ids[line], ())
        elif positions == "all":
            asked = range(length)
        else:
            asked = (-1,) if positions == "last" else (0,) if positions == "first" else (positions,)
        inside = sorted({p + length if p < 0 else p for p in asked if -length <= p < length})
        lines += [line] * len(inside)
        found += inside
    return np.array(lines, np.int64), np.array(found, np.int64)


def has_readout(readout: Readout, lengths: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which documents have all tokens of a readout.

    >>> has_readout((0, 41), np.array([10, 50])).tolist()
    [False, True]
    """
    if isinstance(readout, str):
        return lengths > 0
    asked = np.array(readout)[None]
    found: NDArray[np.bool_] = np.all((asked >= -lengths[:, None]) & (asked < lengths[:, None]), axis=1)
    return found


def readout_positions(readout: Readout, lengths: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """Return the positions at which logits are computed, shape (documents, read); None for all.

    In a document that lacks a token of the readout, another one takes its place; see `has_readout`.
    """
    if readout == "all":
        return None
    asked = np.array((-1,) if readout == "last" else tuple(map(int, readout)))[None]
    ends = lengths[:, None]
    found: NDArray[np.int64] = np.clip(asked + np.where(asked < 0, ends, 0), 0, ends - 1)
    return found


def parse_readout(readout: str | int | Sequence[int]) -> Readout:
    """Return a readout: a word, or positions.

    Raises
    ------
    AnalysisError
        It is another word, or holds something other than whole numbers, or nothing.
    """
    if isinstance(readout, str):
        if readout not in ("all", "last"):
            raise AnalysisError(f"readout cannot be {readout!r}", remedy=nearest(readout, ("all", "last")))
        return readout
    found = tuple(parse_position(position, "readout") for position in as_list(readout))
    if not found:
        raise AnalysisError("readout has no position", expected='"all", "last", or positions')
    return found


def has_tokens(positions: Positions, lengths: Mapping[str, int]) -> bool:
    """Return True if *positions* selects a token in any document; *lengths* by document id."""
    if isinstance(positions, dict):
        asked = ((p, lengths.get(name, 0)) for name, chosen in positions.items() for p in chosen)
        return any(-length <= p < length for p, length in asked)
    return isinstance(positions, str) or any(-length <= positions < length for length in lengths.values())


def as_list(value: Any) -> list[Any]:
    """Return one value or several as a list."""
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str | Mapping) else [value]


def parse_position(value: Any, where: str | None = None) -> int:
    """Return a position as an int, or raise AnalysisError if it is not a whole number."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise _position_error(value, "a whole number" + ("" if where else f", or one of {', '.join(WORDS)}"), where)
    return index(value)


def _position_error(value: Any, expected: str, where: str | None) -> AnalysisError:
    return AnalysisError(
        "a position cannot be read", where=where, expected=expected, found=" ".join(repr(value).split())[:80]
    )


def _layers_to_start_at(store: Store, site: str, depth: int) -> list[int]:
    post = set(store.layers("resid_post")) if "resid_post" in store.arrays else set()
    pre = set(store.layers("resid_pre")) if "resid_pre" in store.arrays else set()
    ready = {0} | {layer + 1 for layer in post} | pre  # blocks that can be the first to run
    return [layer for layer in range(depth) if (layer + (site == "resid_post")) in ready]
