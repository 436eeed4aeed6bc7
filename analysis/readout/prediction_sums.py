"""Sums over the vocabulary from which entropy, divergence and rank of next-token predictions follow."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

LEAST = float(np.finfo(np.float32).min)


class ReferenceWeights(NamedTuple):
    """Unnormalised probabilities of the reference in one block of the vocabulary, and how earlier blocks change."""

    values: np.ndarray
    factor: np.ndarray
    mass_before: np.ndarray


class PredictionSums:
    """Running sums of the predictions of some rows, which are given one block of the vocabulary at a time.

    Logits are shifted by their largest value so far, and sums are rescaled when it grows (the online softmax of Milakov
    & Gimelshein 2018, arXiv 1805.02867), so that no more than one block of logits is in memory. Sums are float64.

    >>> sums = PredictionSums(np.float32([2]), np.array([2]))
    >>> for start in (0, 2):
    ...     _ = sums.add(np.float32([[0, 1, 2, 3]])[:, start : start + 2], start)
    >>> sums.best.tolist(), sums.larger.tolist(), round(sums.entropy().item(), 3)
    ([3], [1], 0.948)

    Parameters
    ----------
    own, token
        Logit, float32 (rows,), and number, int64 (rows,), of the token whose rank is counted; the token is not counted
        itself.
    """

    def __init__(self, own: np.ndarray, token: np.ndarray) -> None:
        self.own, self.token = own, token
        self.peak = np.full(len(own), LEAST)
        self.mass, self.energy, self.cross = np.zeros((3, len(own)))
        self.best, self.larger = np.zeros((2, len(own)), np.int64)

    def add(self, logits: np.ndarray, start: int, reference: ReferenceWeights | None = None) -> ReferenceWeights:
        """Add the logits of the tokens from *start* on, float32 (rows, tokens), and return their weights.

        Parameters
        ----------
        reference
            What `add` returned for the same rows and tokens of the reference.
        """
        top = logits.max(1)
        grown = top > self.peak
        self.best[grown] = logits[grown].argmax(1) + start
        larger = logits > self.own[:, None]
        place = self.token - start
        held = np.flatnonzero((place >= 0) & (place < logits.shape[1]))
        larger[held, place[held]] = False
        self.larger += larger.sum(1, dtype=np.int32)
        peak = np.maximum(self.peak, top)
        shift, self.peak = self.peak - peak, peak
        shifted = np.subtract(logits, peak[:, None], dtype=np.float64)
        np.maximum(shifted, LEAST, out=shifted)  # a bias of -inf excludes a token, and 0 · inf is NaN
        weights = np.exp(shifted)
        factor = np.exp(shift)
        found = ReferenceWeights(weights, factor, self.mass * factor)
        if reference is not None:
            moved = reference.mass_before * shift
            self.cross = reference.factor * self.cross + moved + np.einsum("rt,rt->r", reference.values, shifted)
        self.energy = factor * self.energy + found.mass_before * shift + np.einsum("rt,rt->r", weights, shifted)
        self.mass = found.mass_before + weights.sum(1)
        return found

    def entropy(self) -> np.ndarray:
        """Return the entropy of each prediction in nats."""
        return np.asarray(np.log(self.mass) - self.energy / self.mass)

    def log_probability(self) -> np.ndarray:
        """Return the log-probability of the token whose logit is `own`."""
        return np.asarray(self.own - self.peak - np.log(self.mass))

    def divergence(self, reference: PredictionSums) -> np.ndarray:
        """Return KL(reference ‖ prediction) of each row in nats, to about 1e-14, never negative."""
        found = np.log(self.mass) - self.cross / reference.mass - reference.entropy()
        return np.asarray(np.maximum(found, 0))
