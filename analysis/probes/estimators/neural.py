"""Probes trained by gradient descent in torch: a multilayer perceptron, and attention over the tokens of a document."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from flexcache.errors import AnalysisError

if TYPE_CHECKING:
    import torch


class _Neural(ClassifierMixin, BaseEstimator):
    """Base of networks on standardised features, trained by AdamW with early stopping on held-out training samples."""

    classes_: NDArray[Any]

    def __init__(
        self,
        hidden: int = 64,
        *,
        epochs: int = 200,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.1,
        batch_size: int = 128,
        patience: int = 20,
        held_out: float = 0.1,
        seed: int = 0,
    ) -> None:
        self.hidden = hidden
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.patience = patience
        self.held_out = held_out
        self.seed = seed

    def _train(self, network: torch.nn.Module, inputs: Inputs, codes: NDArray[np.int64]) -> None:
        import torch

        rng, generator = np.random.default_rng(self.seed), torch.Generator().manual_seed(self.seed)
        order = rng.permutation(len(codes))
        held = order[: max(1, round(self.held_out * len(codes)))]
        rest = order[len(held) :]
        labels = torch.from_numpy(codes)
        optimizer = torch.optim.AdamW(network.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        best, kept, worse = float("inf"), {k: v.clone() for k, v in network.state_dict().items()}, 0
        self.n_iter_ = 0
        for _ in range(self.epochs):
            network.train()
            shuffled = rest[torch.randperm(len(rest), generator=generator).numpy()]
            for first in range(0, len(shuffled), self.batch_size):
                part = shuffled[first : first + self.batch_size]
                loss = torch.nn.functional.cross_entropy(network(*inputs.to_tensors(part)), labels[part])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            network.eval()
            self.n_iter_ += 1
            with torch.no_grad():
                now = float(torch.nn.functional.cross_entropy(network(*inputs.to_tensors(held)), labels[held]))
            if now < best - 1e-4:
                best, kept, worse = now, {k: v.clone() for k, v in network.state_dict().items()}, 0
            else:
                worse += 1
                if worse > self.patience:
                    break
        network.load_state_dict(kept)
        self.network_, self.validation_loss_ = network, best
        if not np.isfinite(best):
            raise AnalysisError(
                "the probe did not converge",
                where=type(self).__name__,
                found=f"a loss of {best} after {self.n_iter_} epochs",
                remedy="lower learning_rate",
            )

    def _probabilities(self, inputs: Inputs) -> NDArray[np.float64]:
        import torch

        with torch.no_grad():
            found = [torch.softmax(self.network_(*inputs.to_tensors(part)).double(), -1) for part in inputs.parts(1024)]
        return torch.cat(found).numpy()


class Inputs:
    """Standardised features of samples: one vector each, or a padded matrix of tokens each."""

    def __init__(self, X: NDArray[np.floating], lengths: NDArray[np.int64] | None = None) -> None:
        self.X = X.astype(np.float32)
        self.lengths = lengths
        self.starts = None if lengths is None else np.cumsum(lengths) - lengths

    def __len__(self) -> int:
        return len(self.X) if self.lengths is None else len(self.lengths)

    def parts(self, size: int) -> Iterator[NDArray[np.int64]]:
        """Yield the indices of all samples, at most *size* at a time."""
        for first in range(0, len(self), size):
            yield np.arange(first, min(first + size, len(self)))

    def to_tensors(self, part: NDArray[np.int64]) -> tuple[torch.Tensor, ...]:
        """Return the network inputs of some samples."""
        import torch

        if self.lengths is None or self.starts is None:
            return (torch.from_numpy(self.X[part]),)
        counts = self.lengths[part]
        padded = np.zeros((len(part), int(counts.max()), self.X.shape[1]), np.float32)
        mask = np.arange(padded.shape[1]) < counts[:, None]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        padded[mask] = self.X[np.repeat(self.starts[part], counts) + within]
        return torch.from_numpy(padded), torch.from_numpy(mask)


class MLP(_Neural):
    """A perceptron with one hidden layer of ReLUs, for labels that no linear probe can read (classes only).

    It is more expressive than a linear probe, so check its selectivity as well (Hewitt & Liang 2019, 1909.03368).

    ::

        probes.sweep(store, "label", "resid_post", probes.MLP(hidden=32))

    Parameters
    ----------
    hidden
        Units of the hidden layer.
    epochs, learning_rate, weight_decay, batch_size
        Settings of AdamW.
    patience, held_out
        Training stops after *patience* epochs without a better loss on the share *held_out* of the training samples,
        and restores the best weights.
    seed
        Seed of the weights, the batches and the held-out samples.

    Attributes
    ----------
    classes_ : ndarray, (n_classes,)
    network_ : torch.nn.Module
    n_iter_ : int
        Number of epochs.
    validation_loss_ : float
    """

    def fit(self, X: NDArray, y: NDArray) -> Self:
        """Fit to ``(n_samples, n_features)`` and classes ``(n_samples,)``."""
        import torch
        from torch import nn

        X, y = validate_data(self, X, y, dtype=np.float64)
        self.classes_, codes = np.unique(y, return_inverse=True)
        self.mean_, self.scale_ = X.mean(0), np.where((deviation := X.std(0)) > 0, deviation, 1.0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            network = nn.Sequential(
                nn.Linear(X.shape[1], self.hidden), nn.ReLU(), nn.Linear(self.hidden, len(self.classes_))
            )
        self._train(network, Inputs((X - self.mean_) / self.scale_), codes)
        return self

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """Return the probability of each class, ``(n_samples, n_classes)``."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64)
        return self._probabilities(Inputs((X - self.mean_) / self.scale_))

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Return the most likely class of each sample."""
        return np.asarray(self.classes_[self.predict_proba(X).argmax(1)])


class AttentionPooled(_Neural):
    """A linear probe on a weighted mean of the tokens of a document, with learned weights (classes only).

    Each head scores every token with one vector, and pools the tokens by the softmax of the scores; a linear map reads
    the pooled vectors. A sample is a matrix, (tokens, n_features): use ``rows="tokens"`` in a sweep.

    ::

        probes.sweep(store, "label", "resid_post", probes.AttentionPooled(), rows="tokens")

    Parameters
    ----------
    hidden
        Number of heads.

    Other parameters and the attributes are those of `MLP`.
    """

    pooled: ClassVar[bool] = True
    """Samples are the matrices of all tokens of a document."""

    def __init__(
        self,
        hidden: int = 1,
        *,
        epochs: int = 200,
        learning_rate: float = 3e-3,
        weight_decay: float = 0.1,
        batch_size: int = 128,
        patience: int = 20,
        held_out: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(
            hidden,
            epochs=epochs,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            batch_size=batch_size,
            patience=patience,
            held_out=held_out,
            seed=seed,
        )

    def fit(self, X: Sequence[NDArray], y: NDArray) -> Self:
        """Fit to matrices of tokens, and classes ``(n_samples,)``."""
        import torch

        self.classes_, codes = np.unique(y, return_inverse=True)
        flat = np.concatenate(list(X)).astype(np.float64)
        self.mean_, self.scale_ = flat.mean(0), np.where((deviation := flat.std(0)) > 0, deviation, 1.0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            network = _pooling(flat.shape[1], self.hidden, len(self.classes_))
        self._train(network, self._inputs(X), codes)
        return self

    def predict_proba(self, X: Sequence[NDArray]) -> NDArray[np.float64]:
        """Return the probability of each class, ``(n_samples, n_classes)``."""
        check_is_fitted(self)
        return self._probabilities(self._inputs(X))

    def predict(self, X: Sequence[NDArray]) -> NDArray[Any]:
        """Return the most likely class of each sample."""
        return np.asarray(self.classes_[self.predict_proba(X).argmax(1)])

    def _inputs(self, X: Sequence[NDArray]) -> Inputs:
        flat = (np.concatenate(list(X)).astype(np.float64) - self.mean_) / self.scale_
        return Inputs(flat, np.array([len(tokens) for tokens in X], np.int64))


def _pooling(features: int, heads: int, classes: int) -> torch.nn.Module:
    """Return the network of `AttentionPooled`; torch is imported here so that importing probes does not need it."""
    import torch
    from torch import nn

    class Pooling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Linear(features, heads, bias=False)
            self.read = nn.Linear(features * heads, classes)

        def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            scores = self.query(tokens).masked_fill(~mask[..., None], float("-inf")).softmax(1)
            pooled = torch.einsum("bth,btf->bhf", scores, tokens)
            return self.read(pooled.flatten(1))

    return Pooling()
