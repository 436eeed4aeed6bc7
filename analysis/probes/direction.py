"""A direction found by a probe: it scores activations, and is used to steer or erase."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from analysis.dataset.readable import Readable
from flexcache.errors import AnalysisError, nearest
from flexcache.identity import differences, has_weight_digests
from flexcache.paths import local_path
from flexcache.store.format.model_record import OTHERS, SAMPLE
from flexcache.store.format.provenance import recorded_model
from flexcache.store.storage.atomic_files import write_durably

FORMAT = "flexcache direction 1"


@dataclass(frozen=True)
class Direction:
    """A vector in the units of the activations of one site and layer, with its provenance.

    ::

        direction = sweep.to_direction()
        direction.score_store(store, rows=slice(0, 100))
        direction.save("direction.safetensors")

    Attributes
    ----------
    vector : ndarray of float64, (features,)
        The score of an activation *x* is ``x @ vector + bias``; with two classes, positive scores mean the second.
    bias : float
    site : str
    layer : int, or None
    provenance : dict
        Target, classes, probe, model and similar facts about the sweep.
    """

    vector: NDArray[np.float64]
    bias: float
    site: str
    layer: int | None
    provenance: Mapping[str, Any]

    @property
    def unit(self) -> NDArray[np.float64]:
        """The vector, scaled to length 1."""
        return np.asarray(self.vector / np.linalg.norm(self.vector))

    def score(self, activations: ArrayLike) -> NDArray[np.float64]:
        """Return the scores of activations, (…, features) to (…)."""
        return np.asarray(np.asarray(activations, np.float64) @ self.vector + self.bias)

    def score_store(self, store: Readable, rows: Any = slice(None), block: int = 8192) -> NDArray[np.float64]:
        """Return the scores of rows of a store, all by default, shape (rows,); *block* rows are in memory at a time.

        Raises
        ------
        AnalysisError
            The store comes from another model, or does not hold the site and layer.
        """
        self.check(store)
        numbers = np.arange(int(getattr(store, "n_rows", 0)))[rows] if isinstance(rows, slice) else np.asarray(rows)
        found = np.empty(len(numbers))
        for first in range(0, len(numbers), block):
            part = slice(first, first + block)
            found[part] = self.score(store.read(self.site, layer=self.layer, rows=numbers[part]))
        return found

    def score_model(
        self, model: Any, tokenizer: Any, texts: Sequence[str], *, allow_changed_model: bool = False
    ) -> list[NDArray[np.float64]]:
        """Run a live model on texts, one by one, and return the scores of their tokens, (tokens,) each; needs torch.

        Raises
        ------
        SiteError
            The model has no such site.
        AnalysisError
            The model computes something else than the model of the probe, and *allow_changed_model* is False.
        """
        import torch

        from flexcache import hooks
        from flexcache.hooks.locate.evaluation_mode import evaluation_mode
        from flexcache.hooks.read.activation_hooks import ActivationHooks
        from flexcache.identity.describe import describe_model
        from flexcache.recording.run.fingerprint import fingerprint
        from flexcache.site import Site

        if not allow_changed_model:
            self._check_record(describe_model(model, fingerprint(model)), "the model", "pass allow_changed_model=True")
        points = hooks.find_hook_points(model, Site.parse(self.site), "all" if self.layer is None else self.layer)
        found: list[NDArray[np.float64]] = []

        def keep(_: Any, values: torch.Tensor) -> None:
            found.append(self.score(values[0].float().cpu().numpy().reshape(values.shape[1], -1)))

        with torch.no_grad(), evaluation_mode(model), ActivationHooks(model, points, keep) as running:
            for text in texts:
                running.forward(**tokenizer(text, return_tensors="pt").to(next(model.parameters()).device))
        return found

    def check(self, store: Readable, other_model: bool = False) -> None:
        """Raise AnalysisError if a store lacks the site or, without *other_model*, another model computed it."""
        if self.site not in store.sites:
            raise AnalysisError(f"the store has no site {self.site!r}", remedy=nearest(self.site, tuple(store.sites)))
        if not other_model:
            remedy = "fit the probe to a store of this model; or compare models: other_model=True (--other-model)"
            self._check_record(recorded_model(store), "the store", remedy)

    def _check_record(self, theirs: Mapping[str, Any], what: str, remedy: str) -> None:
        mine = self.provenance.get("model_record") or {SAMPLE: self.provenance.get("weights")}
        shared = {name: theirs[name] for name in theirs if name in mine or name == OTHERS}
        if has_weight_digests(mine) and has_weight_digests(theirs) and (found := differences(mine, shared)):
            raise AnalysisError(
                f"{what} comes from another model than the one that the probe was fitted to",
                expected=str(self.provenance.get("model")),
                found="\n    ".join(["", *found]),
                remedy=remedy,
            )

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file with vector and bias as tensors and the rest as metadata; return its path."""
        told = {"site": self.site, "layer": self.layer, "provenance": dict(self.provenance)}
        target = local_path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"vector": np.ascontiguousarray(self.vector), "bias": np.array([self.bias])}
        write_durably(target, save(tensors, {"format": FORMAT, "direction": json.dumps(told)}))
        return target

    def __repr__(self) -> str:
        place = self.site if self.layer is None else f"{self.site}, layer {self.layer}"
        return f"<Direction of {self.provenance.get('target')} at {place}: {len(self.vector)} features>"


def load_direction(path: str | Path) -> Direction:
    """Load a direction that `Direction.save` wrote.

    ::

        direction = probes.load_direction("direction.safetensors")
        direction.score(activations)

    Raises
    ------
    AnalysisError
        The file holds no direction, or cannot be read.
    """
    try:
        with safe_open(local_path(path), "np") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise AnalysisError(
                    "the file holds no direction", where=str(path), expected=FORMAT, found=str(metadata.get("format"))
                )
            told = json.loads(metadata["direction"])
            vector, bias = file.get_tensor("vector"), float(file.get_tensor("bias")[0])
            return Direction(vector, bias, told["site"], told["layer"], told["provenance"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise AnalysisError("the direction cannot be read", where=str(path), found=str(error)) from error
