from __future__ import annotations

import numpy as np
import pytest
import torch

from analysis.readout import lens
from analysis.replay import metrics
from analysis.replay.metrics import Outcome
from analysis.statistics import divergence


def exact(logits: torch.Tensor) -> np.ndarray:
    """Return log-probabilities in extended precision."""
    wide = logits.numpy().astype(np.longdouble)
    wide = wide - wide.max(-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(-1, keepdims=True)))


def outcome(logits: torch.Tensor, base: torch.Tensor) -> Outcome:
    places = np.arange(len(base))
    return Outcome(logits, base, places, places.astype(np.int32), (3, 5), None, {}, {}, 0)


def pair(apart: float, seed: int, vocabulary: int = 3000) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    base = 3 * torch.randn(6, vocabulary, generator=random)
    return base + apart * torch.randn(base.shape, generator=random), base


@pytest.mark.parametrize("apart", [1e-6, 1e-4, 1e-2, 1.0, 30.0])
def test_metrics_of_close_and_far_distributions_are_exact(apart: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "BLOCK_BYTES", 2 * 8 * 3000)
    for seed in range(5):
        logits, base = pair(apart, seed)
        p, q = exact(base), exact(logits)
        made = outcome(logits, base)
        kl = (np.exp(p) * (p - q)).sum(-1).mean()
        assert metrics.kl(made) == pytest.approx(float(kl), rel=1e-3, abs=0)
        assert metrics.kl(made) > 0
        labels = np.arange(1, 6)
        change = (p - q)[labels - 1, labels].mean()
        assert metrics.loss_change(made) == pytest.approx(float(change), rel=1e-6, abs=1e-14)
        assert metrics.loss(made) == pytest.approx(-float(q[labels - 1, labels].mean()), rel=1e-12)
        assert metrics.prob(made) == pytest.approx(float(np.exp(q[-1, 3])), rel=1e-12)
        before, after = (values[-1, 3].double() - values[-1, 5].double() for values in (base, logits))
        assert metrics.logit_diff_change(made) == float(after - before)
        np.testing.assert_allclose(
            divergence.entropy(divergence.log_softmax(logits)),
            -(np.exp(q) * q).sum(-1).astype(float),
            rtol=1e-12,
            atol=1e-15,
        )


def test_a_logit_that_moves_by_one_bit_is_seen() -> None:
    _, base = pair(0, 0)
    for token in range(0, 3000, 300):
        logits = base[:1].clone()
        logits[0, token] = torch.nextafter(logits[0, token], torch.tensor(torch.inf))
        share = float(base[0].double().softmax(-1)[token])
        moved = float(logits[0, token].double() - base[0, token].double())
        assert metrics.kl(outcome(logits, base[:1])) == pytest.approx(
            share * (1 - share) * moved**2 / 2, rel=1e-3, abs=0
        )


def test_equal_distributions_have_a_divergence_of_zero() -> None:
    _, base = pair(0, 0)
    assert metrics.kl(outcome(base + 2.5, base)) == pytest.approx(0, abs=1e-13)
    assert metrics.kl(outcome(base, base)) == 0


def test_tokens_of_probability_zero_give_no_divergence_or_an_infinite_one() -> None:
    base = torch.tensor([[0.0, 1.0, -torch.inf, -1000.0]])
    other = torch.tensor([[1.0, 0.0, -torch.inf, 5.0]])
    p, q = (values.double()[:, [0, 1, 3]].log_softmax(-1) for values in (base, other))
    assert metrics.kl(outcome(other, base)) == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-12)
    assert metrics.kl(outcome(torch.tensor([[1.0, -torch.inf, 0.0, 0.0]]), base)) == np.inf
    assert float(divergence.entropy(divergence.log_softmax(base))) == pytest.approx(float(-(p.exp() * p).sum()))


def test_the_cosine_and_a_probe_are_computed_in_double() -> None:
    random = torch.Generator().manual_seed(0)
    before = 100 + torch.randn(4, 4096, generator=random)
    after = before + 1e-3 * torch.randn(before.shape, generator=random)
    key = ("resid_post", 1)
    made = Outcome(before, before, np.arange(4), np.arange(4), None, None, {key: after}, {key: before}, 0)
    a, b = (values.numpy().astype(np.longdouble) for values in (after, before))
    cosine = ((a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))).mean()
    assert 1 - metrics.cosine(made) == pytest.approx(float(1 - cosine), rel=1e-4)
    vector = np.random.default_rng(0).normal(size=4096)
    assert metrics.projection("p", vector).function(made) == pytest.approx(float(a[-1] @ vector), rel=1e-12)


def test_the_lens_of_two_layers_that_hardly_differ_is_not_negative() -> None:
    random = torch.Generator().manual_seed(0)
    head = lens.Head(torch.nn.Identity(), torch.randn(5000, 16, generator=random))
    last = torch.randn(8, 16, generator=random).numpy()
    near = last + 1e-5 * torch.randn(8, 16, generator=random).numpy()
    guess, final = (head.log_probabilities(values) for values in (near, last))
    found = divergence.kl_divergence(final, guess)
    p, q = (exact(torch.from_numpy(values) @ head.weight.T) for values in (last, near))
    assert final.dtype == torch.float64
    assert (found > 0).all()
    np.testing.assert_allclose(found, (np.exp(p) * (p - q)).sum(-1).astype(float), rtol=0.01)
