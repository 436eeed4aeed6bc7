"""The mesh: the pipeline stage, the rows and the shard of each rank of a process group."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from flexcache.errors import ConfigError


class Coordinate(NamedTuple):
    """The position of a rank on the axes: pipeline stage, data-parallel copy, tensor-parallel shard."""

    pp: int
    dp: int
    tp: int


AXES = Coordinate._fields
ORIGIN = Coordinate(0, 0, 0)

RankAxes = Mapping[str, tuple[int, ...]]
"""The ranks along each axis that a rank's wrappers state, in order, itself among them."""


@dataclass(frozen=True)
class Mesh:
    """Coordinates of all ranks of a process group, by group rank.

    >>> Mesh().sizes
    Coordinate(pp=1, dp=1, tp=1)

    Attributes
    ----------
    ranks
        Global ranks, ascending: by group rank.
    coordinates
        By group rank.
    rank
        This process's group rank.
    """

    ranks: tuple[int, ...] = (0,)
    coordinates: tuple[Coordinate, ...] = (ORIGIN,)
    rank: int = 0

    @property
    def coordinate(self) -> Coordinate:
        """The coordinate of this process."""
        return self.coordinates[self.rank]

    @cached_property
    def sizes(self) -> Coordinate:
        """The length of each axis."""
        return Coordinate(*(max(axis) + 1 for axis in zip(*self.coordinates, strict=True)))

    @cached_property
    def stage_ranks(self) -> tuple[int, ...]:
        """Group ranks of this process's pipeline stage, which together hold its activations."""
        return tuple(rank for rank, at in enumerate(self.coordinates) if at.pp == self.coordinate.pp)


def build_meshes(found: Mapping[int, RankAxes], sizes: Mapping[str, int | None]) -> dict[int, Mesh]:
    """Return the mesh of each rank.

    Axes that the wrappers state are used as they are. The others have the given sizes and are laid over the ranks in
    row-major order of (pp, dp, tp), as FlexModel does. Ranks beyond all axes are independent copies, with a mesh each.

    >>> plain = {rank: {} for rank in range(4)}
    >>> build_meshes(plain, {"dp": 2, "tp": 2})[2].coordinate
    Coordinate(pp=0, dp=1, tp=0)
    >>> build_meshes({0: {"tp": (0, 1)}, 1: {"tp": (0, 1)}, 2: {"tp": (2, 3)}, 3: {"tp": (2, 3)}}, {})[3].ranks
    (2, 3)

    Parameters
    ----------
    found
        By global rank.
    sizes
        As the user gave them; None or absent if not given.

    Raises
    ------
    ConfigError
        A given size differs from the size found, or the sizes do not fit the number of ranks.
    """
    lengths = _lengths(found, sizes)
    unnamed = [axis for axis in AXES if lengths[axis] > 1 and not any(axis in axes for axes in found.values())]
    cells: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for rank in sorted(found):
        cells[tuple(found[rank].get(axis, (rank,)).index(rank) for axis in AXES)].append(rank)
    copies = math.prod(lengths[axis] for axis in unnamed)
    crowd = {len(ranks) for ranks in cells.values()}
    apart = max(crowd) if not unnamed else copies
    if crowd != {apart} or len(cells) * copies != math.prod(lengths.values()):
        raise _misfit(found, lengths)
    meshes: dict[int, dict[int, Coordinate]] = defaultdict(dict)
    for place, ranks in cells.items():
        for number, rank in enumerate(ranks):
            copy, rest = divmod(number, copies)
            meshes[copy][rank] = _coordinate(place, rest, unnamed, lengths)
    made = {}
    for at in meshes.values():
        members = tuple(sorted(at))
        for place_in, rank in enumerate(members):
            made[rank] = Mesh(members, tuple(at[member] for member in members), place_in)
    return made


def _lengths(found: Mapping[int, RankAxes], sizes: Mapping[str, int | None]) -> dict[str, int]:
    lengths = {}
    for axis in AXES:
        seen = sorted({len(axes[axis]) for axes in found.values() if axis in axes})
        given = sizes.get(axis)
        if given is not None and given < 1:
            raise ConfigError(f"{_ARGUMENTS[axis]} is {given}", expected="1 or more")
        if len(seen) > 1 or (seen and given is not None and seen != [given]):
            raise ConfigError(
                f"{_ARGUMENTS[axis]} does not fit the model",
                expected=f"{', '.join(map(str, seen))}, as the model is distributed",
                found=str(given) if len(seen) == 1 else f"sizes {seen} on different ranks",
                remedy=f"leave {_ARGUMENTS[axis]} out: it is found in the model",
            )
        lengths[axis] = seen[0] if seen else given or 1
    return lengths


def _coordinate(place: tuple[int, ...], rest: int, unnamed: Sequence[str], lengths: Mapping[str, int]) -> Coordinate:
    values = dict(zip(AXES, place, strict=True))
    for axis in reversed(unnamed):
        rest, values[axis] = divmod(rest, lengths[axis])
    return Coordinate(**values)


def _misfit(found: Mapping[int, RankAxes], lengths: Mapping[str, int]) -> ConfigError:
    shape = " · ".join(f"{_ARGUMENTS[axis]} {length}" for axis, length in lengths.items())
    return ConfigError(
        "the parallel sizes do not fit the number of processes",
        expected=f"{shape} = {math.prod(lengths.values())} processes",
        found=f"{len(found)} in the process group",
        remedy="give the sizes whose product is the number of processes, or a process_group of as many",
    )


_ARGUMENTS = {"pp": "pipeline_parallel_size", "dp": "data_parallel_size", "tp": "tensor_parallel_size"}
