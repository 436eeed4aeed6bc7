"""Property tests of the order of an epoch, without a store."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from flexcache.training.order import Order


@st.composite
def orders(draw: st.DrawFn) -> Order:
    n = draw(st.integers(1, 300))
    rows = np.flatnonzero(
        np.random.default_rng(draw(st.integers(0, 99))).random(n) < draw(st.sampled_from([0.2, 0.8, 1]))
    )
    return Order(
        rows=rows.astype(np.int64),
        unit_rows=draw(st.sampled_from([16, 64, 512])),
        run_rows=draw(st.integers(1, 20)),
        pool_rows=draw(st.integers(1, 90)),
        batch_size=draw(st.integers(1, 40)),
        seed=draw(st.integers(0, 5)),
    )


def rows_of(order: Order, epoch: int, consumer: int = 0, consumers: int = 1, first: int = 0) -> list[list[int]]:
    """Return the rows of each batch of a consumer."""
    found = []
    for pool in order.read_pools(epoch, consumer, consumers, first):
        rows = np.concatenate([order.rows[:0], *(order.rows[low:high] for low, high in pool.runs)])
        found += [rows[chosen].tolist() for chosen in pool.batches]
    return found


@settings(max_examples=150, deadline=None)
@given(orders(), st.integers(0, 3))
def test_every_row_is_in_one_batch_and_all_but_the_last_are_whole(order: Order, epoch: int) -> None:
    batches = rows_of(order, epoch)
    assert sorted(row for batch in batches for row in batch) == order.rows.tolist()
    assert {len(batch) for batch in batches[:-1]} <= {order.batch_size}
    assert len(batches) == order.count_batches() == -(-len(order.rows) // order.batch_size)
    assert order.count_batches(drop_last=True) == len(order.rows) // order.batch_size
    for pool in order.read_pools(epoch):
        assert np.diff(pool.runs, axis=1).sum() <= max(order.pool_rows, order.batch_size)


@settings(max_examples=150, deadline=None)
@given(orders(), st.integers(1, 7), st.integers(0, 3), st.integers(0, 9))
def test_batches_are_the_same_for_any_number_of_consumers_and_any_start(
    order: Order, consumers: int, epoch: int, first: int
) -> None:
    """Consumers share each batch, and what one reads is not much more than its share."""
    whole = rows_of(order, epoch)
    shared = [rows_of(order, epoch, consumer, consumers, first) for consumer in range(consumers)]
    joined = [[row for part in parts for row in part] for parts in zip(*shared, strict=True)]
    assert [sorted(batch) for batch in joined] == [sorted(batch) for batch in whole[first:]]
    for consumer in range(consumers):
        given_rows = [len(batch) for batch in rows_of(order, epoch, consumer, consumers)]
        if consumers <= order.batch_size:
            assert sum(map(bool, given_rows)) == order.count_batches(False, consumer, consumers)
        assert max(given_rows, default=0) <= -(-order.batch_size // consumers)
        lanes = -(-order.lanes // consumers) + (order.lanes % consumers > 0)
        for pool in order.read_pools(epoch, consumer, consumers):
            assert np.diff(pool.runs, axis=1).sum() <= lanes * order.lane_rows * order.pool_batches


def test_lanes_divide_among_the_usual_numbers_of_ranks_and_workers() -> None:
    for batch, lanes in ((4096, 64), (96, 48), (12288, 48), (1000, 40), (7, 7), (1, 1)):
        assert Order(np.arange(10), 512, 8, 10**5, batch, seed=0).lanes == lanes
    assert Order(np.arange(10), 512, 100, 800, 4096, seed=0).lanes == 2, "a pool of a lane holds four runs"


@given(orders())
def test_runs_hold_consecutive_rows_of_one_unit(order: Order) -> None:
    for low, high in order.runs:
        rows = order.rows[low:high]
        assert 0 < len(rows) <= order.run_rows
        assert rows[-1] - rows[0] < order.run_rows
        assert len(set(rows // order.unit_rows)) == 1


def test_another_epoch_and_another_seed_have_another_order() -> None:
    order = Order(np.arange(1000), 512, 8, 200, 32, seed=0)
    other = Order(np.arange(1000), 512, 8, 200, 32, seed=1)
    assert rows_of(order, 0) != rows_of(order, 1)
    assert rows_of(order, 0) != rows_of(other, 0)
    assert rows_of(order, 3) == rows_of(order, 3)
