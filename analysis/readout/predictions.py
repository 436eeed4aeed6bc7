"""Predictions of many rows: one matrix product for each block of rows and of the vocabulary, summed as it is made."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
from threadpoolctl import threadpool_limits

from analysis.progress import bar
from analysis.readout.head import Head
from analysis.readout.prediction_sums import PredictionSums

if TYPE_CHECKING:
    from analysis.readout.own_logits import OwnLogits

PRODUCT_ROWS = 512
"""Rows, of all layers together, in one product."""
LAYER_ROWS = 32
"""Largest number of rows of a layer in one product, so that the sums of their logits stay in the cache."""
CHUNK = 8192
"""Tokens of the vocabulary in one product."""


def predict_rows(
    head: Head,
    stack: Sequence[np.ndarray],
    rows: np.ndarray,
    target: np.ndarray,
    reference: int | None = None,
    own_logits: OwnLogits | None = None,
    workers: int | None = None,
    progress: bool = False,
) -> dict[str, np.ndarray]:
    """Return numbers of the next-token distribution of each row of each layer, by name, of shape (lines, rows).

    Lines are the layers, and after them the model's own logits if they are given. Each thread works on its own rows
    with a BLAS of one thread, so that results do not depend on the number of threads.

    Parameters
    ----------
    stack
        Residuals of the rows by layer, each of shape (rows, hidden).
    target
        Next token of each row; -1 if there is none.
    reference
        Line that the divergence is measured from; NaN without it.

    Returns
    -------
    dict
        ``kl``, ``entropy``, ``log_probability`` of the target, ``rank`` of it, and ``best``, the most probable token.
    """
    step = max(1, min(LAYER_ROWS, PRODUCT_ROWS // len(stack)))
    blocks = [slice(start, start + step) for start in range(0, len(rows), step)]
    chunks = range(0, len(head.weight), CHUNK)
    lock = Lock()

    def run(block: slice, advance: Callable[[], None]) -> list[dict[str, np.ndarray]]:
        hidden = head.normalize(np.concatenate([values[block] for values in stack]))
        with lock:  # a model runs one forward at a time
            own = None if own_logits is None else own_logits.read_rows(rows[block])
        return _sum_block(head, hidden, target[block], reference, own, chunks, advance)

    with threadpool_limits(1, "blas"), bar(progress) as bars, ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        task = bars.add_task("logit lens (products)", total=len(blocks) * len(chunks))
        found = list(pool.map(lambda block: run(block, lambda: bars.advance(task)), blocks))
    return {
        name: np.stack([np.concatenate([block[line][name] for block in found]) for line in range(len(found[0]))])
        for name in found[0][0]
    }


def _sum_block(
    head: Head,
    hidden: np.ndarray,
    target: np.ndarray,
    reference: int | None,
    own: np.ndarray | None,
    chunks: range,
    advance: Callable[[], None],
) -> list[dict[str, np.ndarray]]:
    """Return the numbers of a block of rows, for each line."""
    known, token = target >= 0, np.maximum(target, 0)
    layers = len(hidden) // len(target)
    logits = head.token_logits(hidden, np.tile(token, layers)).reshape(layers, -1)
    if own is not None:
        logits = np.concatenate([logits, own[np.arange(len(own)), token][None]])
    sums = [PredictionSums(line, target) for line in logits]
    order = sorted(range(len(sums)), key=lambda line: line != reference)
    for start in chunks:
        tokens = slice(start, start + chunks.step)
        made = [*head.logits(hidden, tokens).reshape(layers, len(target), -1)]
        made += [] if own is None else [own[:, tokens]]
        weights = None
        for line in order:
            found = sums[line].add(made[line], start, weights)
            weights = found if line == reference else weights
        advance()
    final = None if reference is None else sums[reference]
    return [
        {
            "kl": np.full(len(target), np.nan) if final is None else one.divergence(final) * (one is not final),
            "entropy": one.entropy(),
            "log_probability": np.where(known, one.log_probability(), np.nan),
            "rank": np.where(known, one.larger, -1),
            "best": one.best,
        }
        for one in sums
    ]
