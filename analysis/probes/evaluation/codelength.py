"""Online coding: the bits that a probe needs for the labels, when each part is coded by a probe of the parts before."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from analysis.dataset.probe_dataset import ProbeDataset

if TYPE_CHECKING:
    from analysis.probes.evaluation.crossfit import FittedProbes

LEAST = 8
"""Samples of each class from which a probe codes the labels; earlier labels get a uniform code."""
SHARES = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Prefixes:
    """Growing prefixes of the samples, by whole groups in random order.

    Attributes
    ----------
    sets : (parts, n_samples)
        Training set of each part; the first one gets a uniform code.
    nexts : (parts, n_samples)
        Samples that are coded by the probe of each training set.
    uniform : float
        Bits of all labels if every class is equally likely.
    """

    sets: NDArray[np.bool_]
    nexts: NDArray[np.bool_]
    y: NDArray[np.int64]
    uniform: float

    def bits(self, fitted: FittedProbes) -> float:
        """Return the codelength of the labels in bits, by probes that were fitted to `sets` at each strength.

        Several strengths are mixed: each label is coded by the mean of their probabilities, weighted by how well a
        strength coded the labels before (a Bayesian mixture code, Grünwald 2007, section 6.3). So no strength is chosen
        by labels that are still to be coded; the code is at most log2(strengths) bits longer than that of the best one.
        """
        alone = np.zeros(len(fitted.strengths))
        for number, following in enumerate(self.nexts):
            at = np.flatnonzero(following)
            for strength in range(len(alone)):
                probability = fitted.predict(number, strength, at).probability
                assert probability is not None
                likelihood = probability[np.arange(len(at)), self.y[at]]
                alone[strength] -= np.log(np.maximum(likelihood, np.finfo(np.float64).tiny)).sum()
        mixed = np.log(len(alone)) - logsumexp(-alone)
        return float(self.sets[0].sum() * np.log2(fitted.classes) + mixed / np.log(2))


def prefixes(dataset: ProbeDataset, seed: int) -> Prefixes | None:
    """Return the prefixes of Voita & Titov (2020, arXiv 2003.12298), starting with `LEAST` samples of every class."""
    order = np.random.default_rng(seed).permutation(dataset.n_groups)
    rank = np.empty(dataset.n_groups, np.int64)
    rank[order] = np.arange(dataset.n_groups)
    place = rank[dataset.group]
    ends = sorted({max(1, round(share * dataset.n_groups)) for share in SHARES})
    sets = [place < end for end in ends]
    whole = [held for held in sets if np.bincount(dataset.y[held], minlength=len(dataset.classes)).min() >= LEAST]
    if len(whole) < 2:
        return None
    nexts = [later & ~held for held, later in pairwise(whole)]
    return Prefixes(
        np.stack(whole[:-1]), np.stack(nexts), dataset.y, float(dataset.n_samples * np.log2(len(dataset.classes)))
    )
