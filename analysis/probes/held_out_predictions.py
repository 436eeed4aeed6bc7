"""Out-of-fold predictions of a sweep, by which sweeps are compared sample by sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from analysis.dataset.probe_dataset import ProbeDataset
from analysis.probes.evaluation.score import Prediction


@dataclass(frozen=True)
class HeldOutPredictions:
    """Predictions of every sample by the probes that were fitted without its fold.

    Attributes
    ----------
    key : (n_samples,) uint64
        Hash of the id of each sample's document.
    y, fold, group : (n_samples,)
        Codes of classes, or values; test fold; number of the group.
    predicted, decision : (n_layers, n_samples)
        See `score.Prediction`.
    probability : (n_layers, n_samples, n_classes), or None
    """

    key: NDArray[np.uint64]
    y: NDArray[Any]
    fold: NDArray[np.int64]
    group: NDArray[np.int64]
    predicted: NDArray[Any]
    decision: NDArray[np.float64]
    probability: NDArray[np.float64] | None = None

    @classmethod
    def of_layers(cls, dataset: ProbeDataset, fold: NDArray[np.int64], layers: Sequence[Prediction]) -> Self:
        """Return the predictions of the layers of a sweep."""
        table = dataset.store.documents
        ids = table["id"].to_pylist() if "id" in table.column_names else range(len(table))
        hashed = [blake2b(str(ids[row]).encode(), digest_size=8).digest() for row in dataset.source]
        key = np.frombuffer(b"".join(hashed), np.uint64)[dataset.document]
        chances = [prediction.probability for prediction in layers]
        return cls(
            key,
            dataset.y,
            fold,
            dataset.group,
            np.stack([prediction.predicted for prediction in layers]),
            np.stack([prediction.decision for prediction in layers]),
            None if any(chance is None for chance in chances) else np.stack(chances),  # type: ignore[arg-type]
        )

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, NDArray[Any]]) -> Self | None:
        """Return the predictions among saved tensors; None if there are none."""
        found = {field.name: tensors[field.name] for field in fields(cls) if field.name in tensors}
        return cls(**found) if "key" in found else None

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Return the arrays by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: np.ascontiguousarray(values) for name, values in named.items() if values is not None}

    def predict(self, layer: int | NDArray[np.int64]) -> Prediction:
        """Return the predictions of the layer at an index; or of one index for each fold."""
        at = np.broadcast_to(layer, (int(self.fold.max()) + 1,))[self.fold], np.arange(len(self.y))
        return Prediction(
            self.predicted[at], self.decision[at], None if self.probability is None else self.probability[at]
        )
