from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexcache.errors import ConfigError
from flexcache.parallel.mesh import AXES, Coordinate, build_meshes

LENGTHS = st.tuples(*[st.integers(1, 3)] * 3).map(Coordinate._make)


def laid_out(lengths: Coordinate, labels: list[int]) -> dict[int, Coordinate]:
    """Return the coordinate of each rank, *labels* in row-major order."""
    places = [Coordinate(p, d, t) for p in range(lengths.pp) for d in range(lengths.dp) for t in range(lengths.tp)]
    return dict(zip(labels, places, strict=True))


def along(at: dict[int, Coordinate], rank: int, axis: str) -> tuple[int, ...]:
    """Return the ranks that share all other coordinates with *rank*, in the order of the axis."""
    mine = at[rank]._replace(**{axis: 0})
    line = [other for other in at if at[other]._replace(**{axis: 0}) == mine]
    return tuple(sorted(line, key=lambda other: getattr(at[other], axis)))


@given(LENGTHS, st.data())
def test_named_axes_are_kept_and_coordinates_are_a_bijection(lengths: Coordinate, data: st.DataObject) -> None:
    world = lengths.pp * lengths.dp * lengths.tp
    at = laid_out(lengths, data.draw(st.permutations(range(world))))
    found = {r: {a: along(at, r, a) for a in AXES if getattr(lengths, a) > 1} for r in range(world)}
    given_sizes = {axis: data.draw(st.sampled_from([None, getattr(lengths, axis)])) for axis in AXES}
    meshes = build_meshes(found, given_sizes)
    for rank, mesh in meshes.items():
        assert mesh.ranks == tuple(range(world))
        assert mesh.ranks[mesh.rank] == rank
        assert mesh.sizes == lengths
        assert dict(zip(mesh.ranks, mesh.coordinates, strict=True)) == at
        assert mesh.coordinate == at[rank]
        assert {mesh.coordinates[r].pp for r in mesh.stage_ranks} == {mesh.coordinate.pp}
        assert len(mesh.stage_ranks) == lengths.dp * lengths.tp


@given(LENGTHS, st.sets(st.sampled_from(AXES)))
def test_axes_that_no_wrapper_states_are_row_major(lengths: Coordinate, named: set[str]) -> None:
    world = lengths.pp * lengths.dp * lengths.tp
    at = laid_out(lengths, list(range(world)))
    found = {r: {a: along(at, r, a) for a in named if getattr(lengths, a) > 1} for r in range(world)}
    sizes = {axis: getattr(lengths, axis) for axis in AXES if axis not in named}
    for rank, mesh in build_meshes(found, sizes).items():
        assert mesh.coordinate == at[rank]


@given(st.integers(2, 3), st.integers(2, 3))
def test_independent_copies_have_separate_meshes(copies: int, tp: int) -> None:
    found = {r: {"tp": tuple(range(r // tp * tp, r // tp * tp + tp))} for r in range(copies * tp)}
    for rank, mesh in build_meshes(found, {}).items():
        assert mesh.ranks == found[rank]["tp"]
        assert mesh.coordinate == Coordinate(0, 0, rank % tp)
    joined = build_meshes(found, {"dp": copies})
    assert joined[tp].ranks == tuple(range(copies * tp))
    assert joined[tp].coordinate == Coordinate(0, 1, 0)


@pytest.mark.parametrize(
    ("found", "sizes", "message"),
    [
        ({0: {}, 1: {}, 2: {}}, {"dp": 2}, r"data_parallel_size 2 · tensor_parallel_size 1 = 2 processes\n.*3 in"),
        ({0: {}}, {"tp": 2}, "= 2 processes"),
        ({0: {}}, {"tp": 0}, "tensor_parallel_size is 0"),
        ({r: {"dp": (0, 1)} for r in range(2)}, {"dp": 1}, r"expected: 2, as the model is distributed\n  found: 1"),
        ({r: {"dp": (0, 1)} for r in range(2)}, {"tp": 2}, "= 4 processes"),
        ({0: {"tp": (0, 1)}, 1: {"tp": (0, 1)}, 2: {"tp": (2,)}}, {}, "on different ranks"),
        ({0: {"tp": (0, 1)}, 1: {"tp": (0, 1)}, 2: {}}, {}, "3 in the process group"),
    ],
)
def test_sizes_that_do_not_fit_raise(found: dict, sizes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_meshes(found, sizes)
