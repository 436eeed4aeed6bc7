"""Names of metrics in charts."""

from __future__ import annotations

NAMES = {
    "kl": "KL divergence, nats",
    "kl_mean": "KL divergence, nats, mean of the tokens",
    "kl_sum": "KL divergence, nats, sum of the tokens",
    "loss": "loss, nats",
    "loss_mean": "loss, nats, mean of the tokens",
    "loss_sum": "loss, nats, sum of the tokens",
    "loss_change": "change of loss, nats",
    "loss_change_mean": "change of loss, nats, mean of the tokens",
    "loss_change_sum": "change of loss, nats, sum of the tokens",
    "logit_diff": "logit difference",
    "logit_diff_change": "change of logit difference",
    "prob": "probability of the answer",
    "rank": "rank of the answer",
    "flips": "share of changed next tokens",
    "flips_mean": "share of changed next tokens",
    "flips_sum": "changed next tokens",
    "recovered": "recovered fraction",
    "cosine": "cosine of the last residual",
}
