"""The assembly of whole activations from the pieces on the ranks: pure arithmetic on headers, equal on every rank."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from flexcache.errors import LayoutError
from flexcache.parallel.header import ActivationKey, Header
from flexcache.parallel.mesh import Coordinate

CHECKSUM_TOLERANCE = 1e-2
"""The relative difference allowed between the checksums of two copies of a tensor."""


@dataclass(frozen=True)
class PlacedPart:
    """A piece in its place in the whole: its start, its shape, and the (rank, number of header) of its holders."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    holders: tuple[tuple[int, int], ...]

    def holder(self, receiver: int) -> tuple[int, int]:
        """Return the rank that sends the piece to *receiver*: *receiver* itself if it holds it."""
        return next((holder for holder in self.holders if holder[0] == receiver), self.holders[0])


@dataclass(frozen=True)
class Assembly:
    """A whole activation.

    Attributes
    ----------
    parts
        They tile *shape* exactly.
    addends
        The parts of its gradient: equal to *parts*, or, if copies share the activation, those of all copies, to be
        added.
    """

    key: ActivationKey
    shape: tuple[int, ...]
    dtype: str
    parts: tuple[PlacedPart, ...]
    addends: tuple[PlacedPart, ...]


def assemble(
    headers: Sequence[Sequence[Header]], coordinates: Sequence[Coordinate], names: Sequence[str]
) -> list[Assembly]:
    """Return the activations that the pieces make up, in the order of their keys.

    Rows are in the order of the unsplit batch: by data-parallel rank, then by microbatch.

    Parameters
    ----------
    headers
        By group rank.
    coordinates
        By group rank.
    names
        Names of the hooks, for errors.

    Raises
    ------
    LayoutError
        Pieces are missing, do not fit together, or differ although they are copies.
    """
    found: dict[ActivationKey, list[tuple[int, int, Header]]] = defaultdict(list)
    for rank, held in enumerate(headers):
        for number, header in enumerate(held):
            found[header.key].append((rank, number, header))
    return [_Pieces(key, held, coordinates, names[key.hook]).whole() for key, held in sorted(found.items())]


class _Pieces:
    """All pieces of one activation."""

    def __init__(
        self, key: ActivationKey, held: list[tuple[int, int, Header]], coordinates: Sequence[Coordinate], where: str
    ) -> None:
        self.key = key
        self.where = where if key.call == 0 else f"{where}, run {key.call}"
        self.held = held
        self.at = coordinates
        self.first = held[0][2]
        self.layout = self.first.layout
        stages = {coordinates[rank].pp for rank, _, _ in held}
        self.n_dp = 1 + max(at.dp for at in coordinates if at.pp in stages)
        self.n_tp = 1 + max(at.tp for at in coordinates if at.pp in stages)

    def whole(self) -> Assembly:
        cells: dict[tuple[int, int], dict[int, list[tuple[int, int, Header]]]] = defaultdict(lambda: defaultdict(list))
        for rank, number, header in self.held:
            cells[self.at[rank].dp, header.chunk][self.at[rank].tp].append((rank, number, header))
        self._check_present(cells)
        for _, _, header in self.held:
            self._check_alike(header)
        rows = self.layout.rows
        lengths = [next(iter(cells[cell].values()))[0][2].layout.shape for cell in sorted(cells)]
        starts = [0, *accumulate(shape[rows] for shape in lengths)] if rows is not None else [0]
        shape = list(self.layout.shape)
        if rows is not None:
            shape[rows] = starts[-1]
        elif not self.layout.gradient:
            sharded = self.layout.sharded is not None
            for shard in {self.at[rank].tp if sharded else 0 for rank, _, _ in self.held}:
                self._check_same([header for rank, _, header in self.held if not sharded or self.at[rank].tp == shard])
        parts: list[PlacedPart] = []
        shared = 0
        for number, cell in enumerate(sorted(cells)):
            if number == 1 and rows is None:
                shared = len(parts)
            offset = 0
            for piece in self._shards(cells[cell]):
                header = piece[0][2]
                start = [0] * len(shape)
                if rows is not None:
                    start[rows] = starts[number]
                if self.layout.sharded is not None:
                    start[self.layout.sharded] = offset
                    offset += header.shape[self.layout.sharded]
                parts.append(PlacedPart(tuple(start), header.shape, tuple((rank, held) for rank, held, _ in piece)))
        return Assembly(
            self.key, tuple(shape), self.first.dtype, tuple(parts[:shared] if shared else parts), tuple(parts)
        )

    def _shards(self, cell: dict[int, list[tuple[int, int, Header]]]) -> list[list[tuple[int, int, Header]]]:
        """Return the pieces of one data-parallel copy and microbatch, each with all its holders."""
        sharded = self.layout.sharded
        if sharded is None:
            everyone = [piece for tp in sorted(cell) for piece in cell[tp]]
            self._check_same([header for _, _, header in everyone])
            return [everyone]
        for tp in cell:
            self._check_same([header for _, _, header in cell[tp]])
        total = sum(cell[tp][0][2].shape[sharded] for tp in sorted(cell))
        if total != self.layout.shape[sharded]:
            raise LayoutError(
                "the shards of an activation do not add up to the whole",
                where=self.where,
                expected=f"{self.layout.shape[sharded]} along dim {sharded}",
                found=f"{' + '.join(str(cell[tp][0][2].shape[sharded]) for tp in sorted(cell))}",
                remedy="give the hook function the right expected_shape, or leave it out",
            )
        return [cell[tp] for tp in sorted(cell)]

    def _check_present(self, cells: dict[tuple[int, int], dict[int, list[tuple[int, int, Header]]]]) -> None:
        chunks = {chunk for _, chunk in cells}
        missing = [
            f"data-parallel rank {dp}, tensor-parallel rank {tp}, microbatch {chunk}"
            for dp in range(self.n_dp)
            for chunk in sorted(chunks)
            for tp in range(self.n_tp)
            if tp not in cells.get((dp, chunk), {})
        ]
        if missing:
            raise LayoutError(
                "a hook fired on some ranks only",
                where=self.where,
                expected="all ranks that hold the module to run it in every forward",
                found="none on " + "; ".join(missing[:4]),
                remedy="call the model on every rank, the same number of times",
            )

    def _check_alike(self, other: Header) -> None:
        mine, its = self.layout, other.layout
        free = {mine.rows} if mine.rows is not None else set()
        same = (
            (mine.sharded, mine.rows, len(mine.shape), self.first.dtype)
            == (its.sharded, its.rows, len(its.shape), other.dtype)
        ) and all(a == b for dim, (a, b) in enumerate(zip(mine.shape, its.shape)) if dim not in free)
        if not same:
            shapes = sorted({str(header.layout.shape) for _, _, header in self.held})
            kinds = sorted(
                {f"{header.layout.sharded} {header.layout.rows} {header.dtype}" for _, _, header in self.held}
            )
            raise LayoutError(
                "ranks hold activations that cannot be joined to one batch",
                where=self.where,
                expected="the same shape on every rank, the dim of rows aside",
                found=" and ".join(shapes if len(shapes) > 1 else kinds),
                remedy="pad the sequences of all ranks to one length, or sort them so that a step has one length",
            )

    def _check_same(self, headers: Sequence[Header]) -> None:
        """Raise LayoutError if the checksums of copies differ."""
        sums = [header.sums for header in headers if header.sums is not None]
        if not sums:
            return
        numbers = [sum_ for sum_ in sums if not any(math.isnan(value) for value in sum_)]
        scale = max((abs(sum_[1]) for sum_ in numbers), default=0.0)
        spread = max((max(values) - min(values) for values in zip(*numbers, strict=True)), default=0.0)
        if spread > CHECKSUM_TOLERANCE * scale or 0 < len(numbers) < len(sums):
            raise LayoutError(
                "ranks hold tensors of the same shape and of different values",
                where=self.where,
                expected="copies, or shards of one whole",
                found=f"sums of magnitudes {', '.join(f'{sum_[1]:.4g}' for sum_ in sums[:8])}",
                remedy="hook the module around it: inside expert-parallel experts, and before a sum over ranks is"
                " reduced, no rank has the activation",
            )
