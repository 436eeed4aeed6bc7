"""Context of an edit: the tokens that it changes, and the rows of their store."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from flexcache.errors import AnalysisError, FlexCacheError, nearest
from flexcache.store.read.store import Store

MEAN_BLOCK = 8192
"""Rows in memory at once when a mean is computed."""


class StoreRows:
    """The rows of a store by document, and means over its rows; a mean is computed once and kept.

    Attributes
    ----------
    row_start, lengths : ndarray of int64, shape (documents,)
        First row and number of tokens of each document.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        table = store.documents
        self.row_start: NDArray[np.int64] = table["row_start"].to_numpy().astype(np.int64)
        self.lengths: NDArray[np.int64] = table["n_tokens"].to_numpy().astype(np.int64)
        self._means: dict[tuple[str, int | None, int | None], torch.Tensor] = {}

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Line of each document in the store's table, by id."""
        return {str(name): line for line, name in enumerate(self.store.documents["id"].to_pylist())}

    def check_documents(self, ids: Iterable[str], where: str, kind: type[FlexCacheError] = AnalysisError) -> None:
        """Raise AnalysisError, or *kind*, if the store lacks a document of *ids*."""
        unknown = [str(name) for name in ids if str(name) not in self.numbers]
        if unknown:
            raise kind(
                f"the store has no document {unknown[0]!r}",
                where=where,
                found=f"{len(unknown)} unknown ids" if len(unknown) > 1 else None,
                remedy=nearest(unknown[0], [*self.numbers]),
            )

    def read_rows(self, site: str, layer: int | None, rows: NDArray[np.int64]) -> torch.Tensor:
        """Return rows in their storage dtype, or in float32 if that is int8: shape (rows, features).

        Raises
        ------
        AnalysisError
            The store does not hold this site and layer.
        """
        if site not in self.store.arrays or (layer is not None and layer not in self.store.layers(site)):
            raise AnalysisError(
                "an edit needs activations that the store does not hold",
                where=f"{site}, layer {layer}",
                expected=f"one of {', '.join(self.store.sites)}",
                remedy="capture this site as well, or edit at a site that was captured",
            )
        return stored_tensor(self.store.read(site, layer, rows, raw=self.store.arrays[site].dtype != "int8"))

    def mean_row(self, site: str, layer: int | None, position: int | None) -> torch.Tensor:
        """Return the mean over all committed rows, or over those of one position: float32, shape (features,)."""
        key = (site, layer, position)
        if key not in self._means:
            rows = self.store.committed_rows
            if position is not None:
                rows = rows[np.asarray(self.store.coordinates["position"].values)[rows] == position]
            total: Any = 0.0
            for start in range(0, len(rows), MEAN_BLOCK):
                total = total + self.read_rows(site, layer, rows[start : start + MEAN_BLOCK]).double().sum(0)
            self._means[key] = (total / len(rows)).float()
        return self._means[key]


@dataclass
class EditContext:
    """The tokens that one edit changes in one forward.

    Attributes
    ----------
    site, layer, module
        Where in the model.
    lines, documents, positions : ndarray of int64, shape (tokens,)
        For each token: the line of the forward, the document's line in the store, the position in the document.
    seed : int
        Seed of random draws. A token gets the same draw whatever else is in the batch.
    left_out : set of int
        Lines of the forward in which the edit could not be made, such as a document without a donor.
    """

    source: StoreRows
    site: str
    layer: int | None
    module: nn.Module
    lines: NDArray[np.int64]
    documents: NDArray[np.int64]
    positions: NDArray[np.int64]
    seed: int = 0
    left_out: set[int] = field(default_factory=set)

    def document_lengths(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of tokens of each document."""
        return self.source.lengths[documents]

    def read_activations(
        self, documents: NDArray[np.int64], positions: NDArray[np.int64], like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the stored activations of other documents at this site and layer.

        A document of −1, or a position that the document does not have, adds the line of its token to `left_out`.

        Returns
        -------
        values : Tensor of the shape and dtype of *like*; zeros where not known
        known : Tensor of bool, shape (tokens,)
        """
        known = (documents >= 0) & (positions >= 0)
        known[known] = positions[known] < self.source.lengths[documents[known]]
        self.left_out.update(self.lines[~known].tolist())
        values = torch.zeros_like(like)
        if known.any():
            rows = self.source.row_start[documents[known]] + positions[known]
            values[torch.from_numpy(known).to(like.device)] = self.source.read_rows(self.site, self.layer, rows).to(
                like.device, like.dtype
            )
        return values, torch.from_numpy(known).to(like.device)

    def store_mean(self, over: str, like: torch.Tensor) -> torch.Tensor:
        """Return the store's mean for each token: over ``"all"`` rows, or over those of the same ``"position"``."""
        positions = [None] * len(self.positions) if over == "all" else self.positions.tolist()
        return torch.stack([self.source.mean_row(self.site, self.layer, position) for position in positions]).to(like)

    def unit_noise(self, like: torch.Tensor, salt: int = 0) -> torch.Tensor:
        """Return a direction of length 1 for each token, uniform on the sphere, of the shape and dtype of *like*."""
        drawn = [
            np.random.default_rng([self.seed, salt, int(d), int(p)]).standard_normal(like.shape[-1])
            for d, p in zip(self.documents, self.positions, strict=True)
        ]
        noise = torch.from_numpy(np.stack(drawn))
        return (noise / noise.norm(dim=-1, keepdim=True)).to(like)


def stored_tensor(values: NDArray[Any]) -> torch.Tensor:
    """Return stored values as a tensor of the same dtype, including bfloat16."""
    if values.dtype.itemsize == 2 and values.dtype != np.float16:
        return torch.from_numpy(np.ascontiguousarray(values).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(values))
