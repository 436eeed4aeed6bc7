"""Property tests of the order of an epoch, without a store."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from flexcache.training.order import Order, turns


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


@settings(max_examples=150, deadline=None)
@given(orders(), st.integers(1, 3), st.integers(1, 4), st.integers(0, 3))
def test_every_row_goes_to_one_consumer_once(order: Order, ranks: int, workers: int, epoch: int) -> None:
    consumers, seen = ranks * workers, []
    for consumer in range(consumers):
        pools = order.pools_of(epoch, consumer, consumers)
        rows = [
            np.concatenate([order.rows[low:high] for low, high in order.runs[pool]])[
                order.mixing_order(epoch, consumer, number, int(np.diff(order.runs[pool], axis=1).sum()))
            ]
            for number, pool in enumerate(pools)
        ]
        seen += rows
        count = sum(map(len, rows))
        assert order.count_batches(epoch, consumer, consumers) == -(-count // order.batch_size)
        assert order.count_batches(epoch, consumer, consumers, drop_last=True) == count // order.batch_size
        for pool in rows:
            assert len(pool) <= max(order.pool_rows, order.run_rows)
    assert np.array_equal(np.sort(np.concatenate([*seen, np.zeros(0, np.int64)])), order.rows)


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
    assert not np.array_equal(order.runs_of(0, 0, 1), order.runs_of(1, 0, 1))
    assert not np.array_equal(order.runs_of(0, 0, 1), other.runs_of(0, 0, 1))
    assert np.array_equal(order.runs_of(3, 1, 4), order.runs_of(3, 1, 4))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 50))
def test_workers_take_turns_and_finished_ones_are_skipped(totals: list[int], given_in_all: int) -> None:
    done, left = [0] * len(totals), given_in_all
    while left and done != totals:
        for worker in range(len(totals)):
            if left and done[worker] < totals[worker]:
                done[worker] += 1
                left -= 1
    assert turns(totals, given_in_all) == done
