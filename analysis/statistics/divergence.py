"""Compute divergence and entropy of next-token distributions in float64, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

BLOCK_BYTES = 16 << 20
"""Bytes of float64 logits in memory at once; a few temporary tensors have the same size."""


def row_blocks(rows: int, vocabulary: int) -> Iterator[slice]:
    """Yield slices of rows whose logits take about `BLOCK_BYTES` as float64.

    >>> next(row_blocks(10, vocabulary=50_000))
    slice(0, 41, None)
    """
    size = max(1, BLOCK_BYTES // (8 * vocabulary))
    return (slice(start, start + size) for start in range(0, rows, size))


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Return log-probabilities in float64.

    >>> log_softmax(torch.zeros(1, 2)).exp().tolist()
    [[0.5, 0.5]]
    """
    return torch.log_softmax(logits, -1, dtype=torch.float64)


def kl_divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Return KL(p ‖ q) of each row in nats, float64, never negative; infinite if q lacks a token of p.

    Summed as Σ q − p − p log(q / p), which equals KL because both sum to 1. No term is negative, so that the result is
    accurate even for distributions that hardly differ. Tokens of probability 0 in both contribute nothing.

    >>> p = log_softmax(torch.tensor([[0.0, 1.0]]))
    >>> kl_divergence(p, p).tolist()
    [0.0]

    Parameters
    ----------
    log_p, log_q
        Log-probabilities in float64, shape (rows, vocabulary).
    """
    p, q, ratio = log_p.exp(), log_q.exp(), log_q - log_p
    near = p * (torch.expm1(ratio) - ratio)
    far = torch.where(p > 0, q - p - p * ratio, q)
    return torch.where(ratio.abs() < 1, near, far).clamp_min_(0).sum(-1)


def entropy(log_p: torch.Tensor) -> torch.Tensor:
    """Return the entropy of each row in nats, shape (rows,), from log-probabilities in float64.

    >>> round(entropy(log_softmax(torch.zeros(1, 2))).item(), 4)
    0.6931
    """
    return -torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p).sum(-1)
