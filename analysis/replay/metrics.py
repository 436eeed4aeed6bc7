"""Metrics of an edit for each document, from the logits with and without the edit, computed in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from analysis.statistics.divergence import kl_divergence, log_softmax, row_blocks
from flexcache.errors import AnalysisError, FlexCacheError, nearest


@dataclass(frozen=True)
class Outcome:
    """One document with an edit and without, as metrics get it.

    ::

        def entropy(outcome: replay.Outcome) -> float:
            return float(torch.distributions.Categorical(logits=outcome.logits[-1]).entropy())

    Attributes
    ----------
    logits, base : Tensor, float32, shape (read, vocabulary)
        At `positions`, with the edit and without.
    positions : ndarray of int64, shape (read,)
    tokens : ndarray of int32
        The document's token ids.
    answer : tuple of (token, other), or None
    donor : Tensor, float32, shape (vocabulary,), or None
        Logits at the end of the donor's own forward.
    residuals, base_residuals : dict
        Tensors of shape (tokens, features) by site and layer, for the metric's `reads`.
    document : int
        Line in the store.
    """

    logits: torch.Tensor
    base: torch.Tensor
    positions: NDArray[np.int64]
    tokens: NDArray[np.int32]
    answer: tuple[int, int] | None
    donor: torch.Tensor | None
    residuals: Mapping[tuple[str, int | None], torch.Tensor]
    base_residuals: Mapping[tuple[str, int | None], torch.Tensor]
    document: int


@dataclass(frozen=True)
class Metric:
    """A number for each document, computed from its `Outcome`.

    ::

        replay.Metric("top", lambda outcome: float(outcome.logits[-1].max()))

    Parameters
    ----------
    name
        Name in the results.
    function
        Function of an `Outcome`; NaN if it is undefined.
    reads
        Sites and layers whose activations it needs; a negative layer counts from the end.
    answers, donors
        The metric needs answers, or logits of donors.
    one_sided
        The value without an edit is the smallest or the largest possible one, such as 0 for a divergence. Then every
        edit differs from no edit in one direction, and no test compares the two.
    """

    name: str
    function: Callable[[Outcome], float]
    reads: tuple[tuple[str, int | None], ...] = ()
    answers: bool = False
    donors: bool = False
    one_sided: bool = False


TokenMetric = Callable[[Outcome], NDArray[np.float64]]
"""A function from an outcome to a value for each readout token that has one, shape (tokens,)."""


def kl_by_token(outcome: Outcome) -> NDArray[np.float64]:
    """Return KL(before ‖ after) of the next-token distributions at each readout token, in nats, never negative."""
    blocks = row_blocks(*outcome.base.shape)
    found = (kl_divergence(log_softmax(outcome.base[rows]), log_softmax(outcome.logits[rows])) for rows in blocks)
    return _array(found)


def loss_by_token(outcome: Outcome, logits: torch.Tensor | None = None) -> NDArray[np.float64]:
    """Return the loss of the next token with the edit, in nats, at the readout tokens that have a next one.

    Parameters
    ----------
    logits
        Other logits than those with the edit, of equal shape.
    """
    logits = outcome.logits if logits is None else logits
    inside = outcome.positions + 1 < len(outcome.tokens)
    labels = torch.from_numpy(outcome.tokens[outcome.positions[inside] + 1].astype(np.int64)).to(logits.device)
    places = torch.from_numpy(np.flatnonzero(inside)).to(logits.device)
    blocks = row_blocks(len(places), logits.shape[-1])
    loss_of = torch.nn.functional.nll_loss
    return _array(loss_of(log_softmax(logits[places[rows]]), labels[rows], reduction="none") for rows in blocks)


def loss_change_by_token(outcome: Outcome) -> NDArray[np.float64]:
    """Return the loss with the edit less that without, in nats, at the readout tokens that have a next one."""
    return loss_by_token(outcome) - loss_by_token(outcome, outcome.base)


def flips_by_token(outcome: Outcome) -> NDArray[np.float64]:
    """Return 1 for each readout token whose most likely next token changes, else 0."""
    return _array([outcome.logits.argmax(-1) != outcome.base.argmax(-1)])


def token_mean(by_token: TokenMetric, outcome: Outcome) -> float:
    """Return the mean of a metric over the readout tokens; NaN if it has a value at none."""
    values = by_token(outcome)
    return float(values.mean()) if len(values) else float("nan")


def token_sum(by_token: TokenMetric, outcome: Outcome) -> float:
    """Return the sum of a metric over the readout tokens; NaN if it has a value at none."""
    values = by_token(outcome)
    return float(values.sum()) if len(values) else float("nan")


def kl(outcome: Outcome) -> float:
    """Return the mean over the readout tokens of KL(before ‖ after), in nats."""
    return token_mean(kl_by_token, outcome)


def loss(outcome: Outcome) -> float:
    """Return the mean loss of the next token with the edit, in nats; NaN if no readout token has a next one."""
    return token_mean(loss_by_token, outcome)


def loss_change(outcome: Outcome) -> float:
    """Return the mean loss with the edit less that without, in nats."""
    return token_mean(loss_change_by_token, outcome)


def flips(outcome: Outcome) -> float:
    """Return the share of the readout tokens whose most likely next token changes."""
    return token_mean(flips_by_token, outcome)


def logit_diff(outcome: Outcome) -> float:
    """Return the logit of the answer less that of the other token, at the last token, with the edit."""
    return _difference(outcome, outcome.logits[-1])


def logit_diff_change(outcome: Outcome) -> float:
    """Return the logit difference with the edit less that without."""
    return _difference(outcome, outcome.logits[-1]) - _difference(outcome, outcome.base[-1])


def prob(outcome: Outcome) -> float:
    """Return the probability of the answer at the last token, with the edit."""
    return float(log_softmax(outcome.logits[-1])[outcome.answer[0]].exp()) if outcome.answer else float("nan")


def rank(outcome: Outcome) -> float:
    """Return how many tokens are more likely than the answer at the last token, with the edit."""
    if not outcome.answer:
        return float("nan")
    return float((outcome.logits[-1] > outcome.logits[-1, outcome.answer[0]]).sum())


def recovered(outcome: Outcome) -> float:
    """Return the recovered fraction of the change from the document's logit difference to its donor's.

    0 is the logit difference without the edit, 1 the donor's at its own last token (Zhang & Nanda 2023, arXiv
    2309.16042). NaN without a donor, or if both are equal.
    """
    if outcome.donor is None or outcome.answer is None:
        return float("nan")
    base, target = _difference(outcome, outcome.base[-1]), _difference(outcome, outcome.donor)
    return (_difference(outcome, outcome.logits[-1]) - base) / (target - base) if target != base else float("nan")


def cosine(outcome: Outcome) -> float:
    """Return the mean over tokens of the cosine between the last block's outputs with the edit and without."""
    ((key, after),) = ((key, value) for key, value in outcome.residuals.items() if key[0] == "resid_post")
    before = outcome.base_residuals[key][outcome.positions].double()
    return float(torch.nn.functional.cosine_similarity(after[outcome.positions].double(), before).mean())


def projection(name: str, vector: Any, site: str = "resid_post", layer: int = -1, bias: float = 0.0) -> Metric:
    """Return a metric: the value of a linear probe at a later layer, for the last token read, with the edit.

    ::

        replay.projection("sentiment", direction.unit, layer=24)

    Parameters
    ----------
    vector, bias
        Those of the probe for activations that are not normalised: shape (features,).
    """
    weights = torch.as_tensor(np.asarray(vector, np.float64))

    def score(outcome: Outcome) -> float:
        found = next(value for key, value in outcome.residuals.items() if key[0] == site)
        return float(found[outcome.positions[-1]].double() @ weights.to(found.device)) + bias

    return Metric(name, score, ((site, layer),))


BY_TOKEN: dict[str, TokenMetric] = {
    "kl": kl_by_token,
    "loss": loss_by_token,
    "loss_change": loss_change_by_token,
    "flips": flips_by_token,
}
MEANS: dict[str, Callable[[Outcome], float]] = {"kl": kl, "loss": loss, "loss_change": loss_change, "flips": flips}
"""Metrics that are a mean over readout tokens: also called ``kl_mean``; ``kl_sum`` is the sum."""
ONE_SIDED = ("kl", "flips")
NAMED = {
    metric.name: metric
    for metric in (
        *(Metric(name, function, one_sided=name in ONE_SIDED) for name, function in MEANS.items()),
        *(Metric(f"{name}_mean", function, one_sided=name in ONE_SIDED) for name, function in MEANS.items()),
        *(
            Metric(f"{name}_sum", partial(token_sum, by_token), one_sided=name in ONE_SIDED)
            for name, by_token in BY_TOKEN.items()
        ),
        Metric("logit_diff", logit_diff, answers=True),
        Metric("logit_diff_change", logit_diff_change, answers=True),
        Metric("prob", prob, answers=True),
        Metric("rank", rank, answers=True),
        Metric("recovered", recovered, answers=True, donors=True),
        Metric("cosine", cosine, (("resid_post", -1),), one_sided=True),
    )
}


MetricLike = str | Metric | Callable[[Outcome], float]
"""A metric: by name, as a `Metric`, or as a function of an `Outcome`."""


def resolve_metrics(metrics: MetricLike | Sequence[MetricLike], answers: bool) -> tuple[Metric, ...]:
    """Return one or several metrics that are given by name or as functions of an Outcome.

    Raises
    ------
    AnalysisError
        A value is not a metric, two metrics have the same name, or one needs answers and there are none.
    """
    found: list[Metric] = []
    several = isinstance(metrics, Iterable) and not isinstance(metrics, str)
    asked: Any = metrics if several else [metrics]
    for metric in asked:
        if isinstance(metric, str):
            if metric not in NAMED:
                raise AnalysisError(f"there is no metric {metric!r}", remedy=nearest(metric, [*NAMED]))
            found.append(NAMED[metric])
        elif isinstance(metric, Metric):
            found.append(metric)
        elif callable(metric):
            found.append(Metric(getattr(metric, "__name__", type(metric).__name__), metric))
        else:
            raise AnalysisError(
                "this is not a metric",
                expected=f"a function of an Outcome, or one of {', '.join(NAMED)}",
                found=repr(metric)[:80],
            )
    names = [metric.name for metric in found]
    if not names or len(set(names)) < len(names):
        raise AnalysisError("metrics cannot be told apart", expected="at least one, each once", found=str(names))
    needy = [metric.name for metric in found if metric.answers]
    if needy and not answers:
        raise AnalysisError(
            f"metric {needy[0]} needs answers",
            expected="two tokens for each document: the one whose logit counts, and the one it is compared with",
            remedy="give answers=(token, other), or a mapping from document id to such pairs",
        )
    return tuple(found)


def compute_metric(metric: Metric, outcome: Outcome) -> float:
    """Return the value of a metric for one document.

    Raises
    ------
    AnalysisError
        The metric fails, or returns something other than one number.
    """
    try:
        value: Any = metric.function(outcome)
        plain = value.detach().cpu().double().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    except (FlexCacheError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of a user's own function
        raise AnalysisError(
            f"metric {metric.name} failed",
            where=f"document {outcome.document}",
            found=f"{type(error).__name__}: {str(error)[:300]}",
        ) from error
    if plain.ndim or plain.dtype.kind not in "fiub":
        raise AnalysisError(
            f"metric {metric.name} returned something other than a number",
            expected="one number for each document",
            found=f"shape {plain.shape}" if plain.ndim else repr(value)[:80],
        )
    return float(plain)


def _array(parts: Iterable[torch.Tensor]) -> NDArray[np.float64]:
    return np.concatenate([np.zeros(0), *(part.double().cpu().numpy() for part in parts)])


def _difference(outcome: Outcome, logits: torch.Tensor) -> float:
    return float(logits[outcome.answer[0]]) - float(logits[outcome.answer[1]]) if outcome.answer else float("nan")
