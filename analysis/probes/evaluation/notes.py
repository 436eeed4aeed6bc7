"""Notes of a sweep: limits of the data that a reader of the scores should know."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from analysis.dataset.probe_dataset import ProbeDataset
from analysis.probes.evaluation.pooled_metrics import RATE

FEW = 10
"""A class in fewer groups than this is named."""
UNEVEN = 5
"""Ratio of the largest class to the smallest one at which the smallest is named."""


def dataset_notes(dataset: ProbeDataset) -> list[str]:
    """Return warnings about the data that a reader of the scores should know."""
    found = []
    if dataset.groups is None and dataset.n_documents < dataset.n_samples:
        found.append(
            "Rows of one document are in both training and test folds: the scores may measure how well a "
            "document is recognised, not the target."
        )
    if dataset.n_samples <= dataset.features:
        found.append(
            f"{dataset.n_samples} samples of {dataset.features} features: any labels can be fitted, so the score "
            "depends on the strength of the penalty."
        )
    if dataset.classes:
        pairs = np.unique(np.stack([dataset.y, dataset.group]), axis=1)
        small = [str(dataset.classes[c]) for c, size in enumerate(np.bincount(pairs[0])) if size < FEW]
        if small:
            found.append(f"Classes in fewer than {FEW} groups: {', '.join(small[:5])}.")
    if dataset.texts is not None:
        owner: dict[str, int] = {}
        documents, first = np.unique(dataset.document, return_index=True)
        shared = sum(
            owner.setdefault(dataset.texts[document], int(dataset.group[at])) != dataset.group[at]
            for document, at in zip(documents, first)
        )
        if shared:
            found.append(
                f"{shared} documents have the same text as a document of another group, possibly across folds."
            )
    return found


def size_notes(dataset: ProbeDataset, metrics: Sequence[str]) -> list[str]:
    """Return notes about classes of different size, and about too few negatives for recall@1%."""
    if not dataset.classes:
        return []
    found, size = [], np.bincount(dataset.y, minlength=len(dataset.classes))
    if size.max() >= UNEVEN * size.min():
        rare, share = dataset.classes[int(size.argmin())], size.max() / size.sum()
        found.append(
            f"Classes of very different size: {size.min():,} of {size.sum():,} samples are {rare}. The largest class "
            f"alone has an accuracy of {share:.3f}: look at AUROC or balanced accuracy, and give the classes equal "
            'weight with Logistic(class_weight="balanced") if they matter equally.'
        )
    groups = len(np.unique(dataset.group[dataset.y == 0]))
    if "recall@1%" in metrics and groups < 1 / RATE:
        found.append(
            f"recall@1%: {size[0]:,} negatives in {groups:,} groups. With fewer than {1 / RATE:.0f}, 1 % is less than "
            "one of them: the value is at a larger rate than 1 %, and the interval is wide."
        )
    return found
