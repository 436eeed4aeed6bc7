"""Whole tensors are cut into the pieces of ranks, and assembled again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexcache.errors import LayoutError
from flexcache.parallel.assembly import Assembly, assemble
from flexcache.parallel.header import ActivationKey, Header
from flexcache.parallel.layout import Layout
from flexcache.parallel.mesh import Coordinate
from flexcache.parallel.shard_group import join_parts, select_part

KEY = ActivationKey(0, 0)
Held = tuple[list[list[Header]], list[list[torch.Tensor]]]


def shares(total: int, n: int) -> list[int]:
    """Sizes of shards, by the convention of torch.chunk, empty ones included."""
    sizes = [chunk.numel() for chunk in torch.arange(total).chunk(n)]
    return sizes + [0] * (n - len(sizes))


@st.composite
def wholes(draw: st.DrawFn) -> tuple[torch.Tensor, Held, list[Coordinate], int | None]:
    """Return a whole, what each rank holds of it, the mesh, and the dim of rows."""
    dp, tp, chunks, pp = (draw(st.integers(1, 3)) for _ in range(4))
    stage = draw(st.integers(0, pp - 1))
    dims = draw(st.integers(1, 3))
    rows = draw(st.none() | st.integers(0, dims - 1))
    sharded = draw(st.none() | st.sampled_from([d for d in range(dims) if d != rows] or [None]))
    shape = [draw(st.integers(1, 5)) for _ in range(dims)]
    counts = [[draw(st.integers(1, 3)) for _ in range(chunks)] for _ in range(dp)]
    if rows is not None:
        shape[rows] = sum(map(sum, counts))
    whole = torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    coordinates = [Coordinate(p, d, t) for p in range(pp) for d in range(dp) for t in range(tp)]
    coordinates = draw(st.permutations(coordinates))
    headers, tensors = [], []
    for at in coordinates:
        held, pieces = [], []
        for chunk in draw(st.permutations(range(chunks))) if at.pp == stage else []:
            piece = whole
            if rows is not None:
                start = sum(map(sum, counts[: at.dp])) + sum(counts[at.dp][:chunk])
                piece = piece.narrow(rows, start, counts[at.dp][chunk])
            full = tuple(piece.shape)
            if sharded is not None:
                sizes = shares(shape[sharded], tp)
                piece = piece.narrow(sharded, sum(sizes[: at.tp]), sizes[at.tp])
            layout = Layout(full, sharded, rows)
            sums = (float(piece.sum()), float(piece.abs().sum())) if piece.numel() else None
            held.append(Header(KEY, chunk, tuple(piece.shape), "torch.float64", layout, sums))
            pieces.append(piece)
        headers.append(held)
        tensors.append(pieces)
    return whole, (headers, tensors), coordinates, rows


def together(
    assembly: Assembly, tensors: list[list[torch.Tensor]], receiver: int, gradient: bool = False
) -> torch.Tensor:
    parts = assembly.addends if gradient else assembly.parts
    places = [(part, tensors[(giver := part.holder(receiver))[0]][giver[1]]) for part in parts]
    return join_parts(assembly.shape, places, added=gradient and assembly.addends != assembly.parts)


@given(wholes())
def test_pieces_make_the_whole_on_every_rank(drawn: tuple) -> None:
    whole, (headers, tensors), coordinates, _ = drawn
    (assembly,) = assemble(headers, coordinates, ["site"])
    assert assembly.shape == tuple(whole.shape)
    for receiver in range(len(coordinates)):
        assert torch.equal(together(assembly, tensors, receiver), whole)
    covered = torch.zeros(assembly.shape)
    for part in assembly.parts:
        select_part(covered, part).add_(1)
        for rank, number in part.holders:
            assert torch.equal(tensors[rank][number], select_part(whole, part)), "each holder holds that very piece"
    assert (covered == 1).all()


@given(wholes())
def test_gradients_of_shared_tensors_are_added(drawn: tuple) -> None:
    whole, (headers, tensors), coordinates, rows = drawn
    headers = [[replace(h, layout=replace(h.layout, gradient=True)) for h in held] for held in headers]
    copies = len({(at.dp, h.chunk) for at, held in zip(coordinates, headers, strict=True) for h in held})
    (assembly,) = assemble(headers, coordinates, ["site"])
    assert torch.equal(together(assembly, tensors, 0, gradient=True), whole if rows is not None else copies * whole)


def test_activations_are_in_the_order_of_their_keys() -> None:
    layout = Layout((2,), None, 0)
    keys = [ActivationKey(1, 0), ActivationKey(0, 1), ActivationKey(0, 0)]
    held = [Header(key, 0, (2,), "torch.float32", layout) for key in keys]
    assert [a.key for a in assemble([held], [Coordinate(0, 0, 0)], ["a", "b"])] == sorted(keys)


def pair(**second: object) -> list[list[Header]]:
    """Two data-parallel ranks that hold two rows each, the second changed."""
    first = Header(KEY, 0, (2, 6), "torch.float32", Layout((2, 6), None, 0))
    return [[first], [replace(first, **second)]]


DATA = [Coordinate(0, 0, 0), Coordinate(0, 1, 0)]
TENSOR = [Coordinate(0, 0, 0), Coordinate(0, 0, 1)]
SHARD = Header(KEY, 0, (2, 3), "torch.float32", Layout((2, 6), 1, 0))


@pytest.mark.parametrize(
    ("headers", "mesh", "message"),
    [
        ([pair()[0], []], DATA, "fired on some ranks only.*data-parallel rank 1, tensor-parallel rank 0, microbatch 0"),
        ([[pair()[0][0], replace(pair()[0][0], chunk=1)], pair()[1]], DATA, "data-parallel rank 1.*microbatch 1"),
        (pair(shape=(2, 9), layout=Layout((2, 9), None, 0)), DATA, r"found: \(2, 6\) and \(2, 9\)"),
        (pair(dtype="torch.bfloat16"), DATA, "cannot be joined to one batch.*bfloat16"),
        (pair(shape=(2,), layout=Layout((2,), None, 0)), DATA, "cannot be joined to one batch"),
        ([[SHARD], [replace(SHARD, shape=(2, 2))]], TENSOR, r"add up.*expected: 6 along dim 1\n.*found: 3 \+ 2"),
        ([[replace(h[0], sums=(s, s))] for h, s in zip(pair(), (1.0, 1.1))], TENSOR, "different values"),
        ([[replace(h[0], sums=(s, s))] for h, s in zip(pair(), (1.0, float("nan")))], TENSOR, "different values"),
        (
            [[replace(h[0], layout=Layout((2, 6), None, None), sums=(s, 2.0))] for h, s in zip(pair(), (1.0, 1.5))],
            DATA,
            "different values",
        ),
    ],
)
def test_pieces_that_do_not_fit_raise(headers: list, mesh: list, message: str) -> None:
    with pytest.raises(LayoutError, match=f"(?s)site.*|{message}") as caught:
        assemble(headers, mesh, ["the site"])
    import re

    assert re.search(f"(?s){message}", str(caught.value)), str(caught.value)
    assert "where: the site" in str(caught.value)


def test_copies_may_differ_by_rounding() -> None:
    headers = [[replace(h[0], sums=(s, 1.0))] for h, s in zip(pair(), (1.0, 1.0001))]
    assemble(headers, TENSOR, ["site"])
