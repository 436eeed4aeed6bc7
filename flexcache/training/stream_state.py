"""Check a saved position before a stream or loader resumes from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexcache.errors import ConfigError
from flexcache.spec import is_whole

IDENTITY = {
    "seed": "seed",
    "batch_rows": "number of rows in a batch of all ranks together (batch_size × ranks)",
    "run_rows": "size of runs, in rows (run_bytes)",
    "pool_rows": "size of pools, in rows (pool_bytes)",
    "unit_rows": "number of rows in a unit of the store",
    "rows_xxh3_128": "set of rows, by digest",
    "drop_last": "drop_last",
    "worker": "worker, or number of workers",
}
"""Entries of a state that must equal those of the stream, with their names in messages."""


def check_state(state: Any) -> None:
    """Raise ConfigError if a value is not the state of a stream."""
    names = ("epoch", "batches", "seed", "batch_rows", "worker")
    missing = [name for name in names if not isinstance(state, Mapping) or name not in state]
    if isinstance(state, Mapping) and missing == ["batch_rows", "worker"]:
        raise ConfigError(
            "the state is of an earlier version, which gave the rows in another order",
            remedy=f"start with an epoch: stream.epoch = {state['epoch']!r}, where the state was saved",
        )
    counts = () if missing else (state["epoch"], state["batches"])
    if missing or not all(is_whole(count) and count >= 0 for count in counts):
        found = f"{type(state).__name__} {state!r}"
        raise ConfigError(
            "that is not a state to resume from",
            expected=f"what state_dict() returned: a dict with {', '.join(names)}",
            found=found if len(found) <= 200 else f"{found[:200]}…",
            remedy="save state_dict() of the stream or loader, and load the same",
        )


def check_same_order(state: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Raise ConfigError if an entry of *state* differs from *mine*."""
    for name, value in mine.items():
        if state[name] != value:
            raise ConfigError(
                f"the state is of another {IDENTITY[name]}",
                expected=f"{state[name]}, as in the state",
                found=str(value),
                remedy="make the stream and its loader with the rows and arguments of when the state was saved",
            )
