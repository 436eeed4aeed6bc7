"""Estimators that follow the conventions of scikit-learn."""

from __future__ import annotations

from analysis.probes.estimators.centroids import LDA, MassMean, NearestCentroid
from analysis.probes.estimators.inlp import INLP
from analysis.probes.estimators.linear import LinearProbe
from analysis.probes.estimators.logistic import Logistic
from analysis.probes.estimators.neural import MLP, AttentionPooled
from analysis.probes.estimators.ridge import Ridge

__all__ = [
    "INLP",
    "LDA",
    "MLP",
    "AttentionPooled",
    "LinearProbe",
    "Logistic",
    "MassMean",
    "NearestCentroid",
    "Ridge",
]
