from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexcache.plan import Plan, batch_groups, order_batches, padded_sizes, ranges, unit_rows

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=200).map(lambda x: np.array(x, np.int32))


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Documents that keep all, one or some of their rows, alone or as several sequences that are linked."""
    lengths, how = draw(LENGTHS), draw(st.sampled_from(["all", "one", "some"]))
    kept = {"all": lengths, "one": np.ones_like(lengths), "some": 1 + lengths // 3}[how]
    shard_rows = 1 << (8 * int(kept.max()) - 1).bit_length() << draw(st.integers(0, 3))
    linked = None
    if draw(st.booleans()):
        linked = np.array(draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths))))
        linked[0] = False
    batching = draw(st.sampled_from(["padded", "equal_lengths", "single"]))
    groups = batch_groups(batching, np.stack([lengths, np.arange(len(lengths)) % 2], axis=1))
    budget, seed = draw(st.integers(1, 300)), draw(st.integers(0, 5))
    return Plan(lengths, kept, shard_rows, budget, seed, linked=linked, groups=groups)


@given(plans())
def test_every_kept_token_is_exactly_one_row(plan: Plan) -> None:
    seen: list[tuple[int, int]] = []
    for unit in plan.units():
        for sequence, start, count in zip(unit.sequences, unit.skip, unit.n_rows, strict=True):
            seen += [(int(sequence), int(start) + i) for i in range(count)]
    assert sorted(seen) == [(s, t) for s, n in enumerate(plan.kept) for t in range(n)]


@given(plans())
def test_sequences_that_share_a_document_stay_together_in_order(plan: Plan) -> None:
    check_together(plan)


@pytest.mark.parametrize("share", [0.3, 0.7, 0.95, 1.0])
def test_sequences_stay_together_across_many_units(share: float) -> None:
    rng = np.random.default_rng(0)
    lengths, linked = rng.integers(1, 9, 2000).astype(np.int32), rng.random(2000) < share
    linked[0] = False
    plan = Plan(lengths, lengths, 64, 32, 0, linked=linked)
    assert plan.n_units > 100
    check_together(plan)


def check_together(plan: Plan) -> None:
    linked = np.zeros(len(plan.lengths), bool) if plan.linked is None else plan.linked
    order = [int(s) for unit in plan.units() for s, begins in zip(unit.sequences, unit.begins) if begins]
    place = {sequence: at for at, sequence in enumerate(order)}
    assert sorted(order) == list(range(len(plan.lengths)))
    assert all(place[s] == place[s - 1] + 1 for s in np.flatnonzero(linked).tolist())


@given(plans())
def test_units_tile_the_rows_in_the_order_in_which_they_are_computed(plan: Plan) -> None:
    at = 0
    for number, unit in enumerate(plan.units()):
        assert unit.unit == number
        assert at == number * plan.shard_rows
        for start, count in zip(unit.row_start, unit.n_rows, strict=True):
            assert start == at
            at += int(count)
        assert at <= (number + 1) * plan.shard_rows
        assert (np.diff(unit.batches) >= 0).all()
        assert set(unit.batches.tolist()) == set(range(int(unit.batches.max()) + 1))
    assert at == plan.n_rows
    assert plan.n_units == -(-plan.n_rows // plan.shard_rows)


@given(plans())
def test_a_straddling_document_runs_alone_in_both_units_and_keeps_consecutive_rows(plan: Plan) -> None:
    places: dict[int, list[tuple[int, int]]] = {}
    units = list(plan.units())
    for unit in units:
        for line, document in enumerate(unit.sequences.tolist()):
            places.setdefault(document, []).append((unit.unit, line))
    for document, found in places.items():
        assert len(found) <= 2
        if len(found) == 2:
            (first, a), (second, b) = found
            assert second == first + 1
            assert a == len(units[first].sequences) - 1
            assert b == 0
            for number, line in found:
                batch = units[number].batches
                assert (batch == batch[line]).sum() == 1
            assert units[first].begins[a]
            assert not units[second].begins[b]
            assert units[first].row_start[a] + units[first].n_rows[a] == units[second].row_start[b]
        else:
            assert units[found[0][0]].begins[found[0][1]], document


@given(plans())
def test_units_take_documents_in_corpus_order(plan: Plan) -> None:
    highest = -1
    for unit in plan.units():
        new = unit.sequences[unit.begins]
        if len(new):
            assert sorted(new.tolist()) == list(range(highest + 1, highest + 1 + len(new)))
            highest += len(new)
    assert highest == len(plan.lengths) - 1


@given(plans())
def test_a_batch_exceeds_the_budget_only_when_it_is_one_document(plan: Plan) -> None:
    for unit in plan.units():
        lengths = plan.lengths[unit.sequences]
        for batch in set(unit.batches.tolist()):
            members = lengths[unit.batches == batch]
            assert len(members) == 1 or len(members) * members.max() <= plan.batch_tokens


@given(plans())
def test_a_batch_holds_sequences_of_one_group(plan: Plan) -> None:
    for unit in plan.units():
        for batch in set(unit.batches.tolist()):
            members = unit.sequences[unit.batches == batch]
            assert plan.groups is None or len(set(plan.groups[members].tolist())) == 1


def test_batches_of_equal_lengths_are_full() -> None:
    lengths = np.random.default_rng(0).integers(1, 9, 1000).astype(np.int32)
    groups = batch_groups("equal_lengths", lengths[:, None])
    plan = Plan(lengths, lengths, 1 << 13, 100, 0, groups=groups)
    (unit,) = plan.units()
    full = sum(-(-int((lengths == n).sum()) // (100 // n)) for n in range(1, 9))
    assert len(set(unit.batches.tolist())) == full
    assert plan.forwards().run == plan.forwards().padded == lengths.sum()


@given(plans())
def test_tokens_run_count_padding_as_a_plain_loop_does(plan: Plan) -> None:
    run = padded = 0
    for unit in plan.units():
        lengths = plan.lengths[unit.sequences]
        run += int(lengths.sum())
        for batch in set(unit.batches.tolist()):
            members = lengths[unit.batches == batch]
            padded += len(members) * int(members.max())
    assert plan.forwards()[:2] == (run, padded)
    assert padded >= run >= plan.n_rows


@given(LENGTHS, st.integers(1, 300))
def test_batches_come_in_seeded_order_and_lose_no_document(lengths: np.ndarray, budget: int) -> None:
    order, numbers = order_batches(lengths, budget, (3, 4))
    again, same = order_batches(lengths, budget, (3, 4))
    assert (order == again).all()
    assert (numbers == same).all()
    assert sorted(order.tolist()) == list(range(len(lengths)))


def test_batches_are_not_sorted_by_length() -> None:
    lengths = np.arange(1, 401, dtype=np.int32)
    order, numbers = order_batches(lengths, 400, (0, 0))
    firsts = lengths[order][np.flatnonzero(np.diff(numbers, prepend=-1))]
    assert (np.diff(firsts) > 0).any()
    assert (np.diff(firsts) < 0).any()
    other, _ = order_batches(lengths, 400, (1, 0))
    assert (order != other).any()


def test_ragged_texts_pad_little() -> None:
    lengths = np.random.default_rng(0).lognormal(3, 0.6, size=20_000).astype(np.int32) + 1
    plan = Plan(lengths, lengths, 1 << 16, 4096, 0)
    run, padded, _ = plan.forwards()
    assert padded / run < 1.06


def test_a_unit_has_the_rows_that_the_rules_allow() -> None:
    tokens = 100_000 * 500
    assert unit_rows(tokens, 500, tokens, 4096 * 2, 4096) == 32768  # 256 MiB of the widest shard
    assert unit_rows(tokens, 500, tokens, 64, 4096) == 1 << 20  # 2^20 tokens run
    assert unit_rows(500_000, 500, 500_000, 64, 4096) == 16384  # four batches, more than a 32nd
    assert unit_rows(10_100, 10_000, 10_100, 64, 16) == 131072  # eight times the longest document wins


def test_a_billion_tokens_plan_without_python_objects_for_documents() -> None:
    lengths = np.full(2_000_000, 500, np.int32)
    plan = Plan(lengths, lengths, 1 << 20, 65536, 0)
    assert plan.n_rows == 10**9
    first = next(plan.units())
    assert int(first.n_rows.sum()) == 1 << 20


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9)), max_size=30))
def test_ranges_are_concatenated_aranges(pairs: list[tuple[int, int]]) -> None:
    starts = np.array([p[0] for p in pairs], np.int64)
    counts = np.array([p[1] for p in pairs], np.int64)
    expected = [s + i for s, c in pairs for i in range(c)]
    assert ranges(starts, counts).tolist() == expected


@pytest.mark.parametrize("lengths", [[], [3]])
def test_padding_of_few_documents(lengths: list[int]) -> None:
    assert padded_sizes(np.array(lengths, np.int32), np.zeros(len(lengths))).sum() == sum(lengths)
