"""Logits of a loaded model for rows of a store, from forwards of their documents."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch

from flexcache.errors import AnalysisError
from flexcache.hooks.locate.evaluation_mode import evaluation_mode
from flexcache.store.read.store import Store


class OwnLogits:
    """The logits of a model for rows of a store, each sequence run alone as it was at the capture.

    ::

        OwnLogits(model, store).read_rows(numpy.array([5, 6, 7]))   # float32 (3, vocabulary)

    Raises
    ------
    AnalysisError
        The store packs documents into sequences.
    """

    def __init__(self, model: Any, store: Store) -> None:
        if store.spec.packing is not None:
            raise AnalysisError(
                "the model's own logits need sequences of one document",
                where=str(store.path),
                found="documents packed into sequences",
                remedy="give a lens.Head or a checkpoint folder, which compare with the last layer",
            )
        self.model, self.sequences = model, store.tokens
        self.starts = self.sequences["row_start"].to_numpy()
        self.order = np.argsort(self.starts, kind="stable")
        parameters = inspect.signature(model.forward).parameters
        self._narrow = "logits_to_keep" in parameters
        self._options = {"use_cache": False} if "use_cache" in parameters else {}

    def read_rows(self, rows: np.ndarray) -> np.ndarray:
        """Return the logits of rows in ascending order, float32 (rows, vocabulary)."""
        at = self.order[np.searchsorted(self.starts[self.order], rows, side="right") - 1]
        with evaluation_mode(self.model), torch.inference_mode():
            found = [self._run_sequence(int(line), rows[at == line]) for line in dict.fromkeys(at.tolist())]
            return torch.cat(found).numpy()

    def _run_sequence(self, line: int, rows: np.ndarray) -> torch.Tensor:
        sequence = {name: self.sequences[name][line].as_py() for name in self.sequences.column_names}
        places = torch.from_numpy(rows - sequence["row_start"])
        keep = sequence.get("keep")
        places = places + sequence["keep_start"] if keep is None else torch.tensor(keep)[places]
        device = next(self.model.parameters()).device
        tokens = torch.tensor([sequence["tokens"]], device=device)
        narrow = {"logits_to_keep": places.to(device)} if self._narrow else {}
        logits = self.model(input_ids=tokens, **self._options, **narrow).logits[0]
        return (logits if self._narrow else logits[places.to(device)]).float().cpu()
