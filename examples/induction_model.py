"""A two-layer attention-only transformer that learns induction heads in seconds.

Two layers are the fewest in which a head can read what another head wrote, and induction heads are made of such a
pair: Elhage et al., "A Mathematical Framework for Transformer Circuits" (2021); Olsson et al., "In-context Learning
and Induction Heads" (2022, arXiv 2209.11895). Positions are added to queries and keys alone, as in Press et al.,
"Shortformer" (2020, arXiv 2012.15832), so that the residual stream carries tokens and no positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flexcache.errors import ConfigError

STEPS, BATCH, WARMUP = 1500, 32, 50
SHORTEST, LONGEST = 8, 32
"""Shortest and longest half in training, in tokens."""
FIRST_HALF = 0.1
"""Weight of the loss on the first half."""


@dataclass(frozen=True)
class AttentionOnlyConfig:
    """Configuration of an `AttentionOnly` model."""

    vocab_size: int = 64
    hidden_size: int = 64
    num_attention_heads: int = 4
    num_hidden_layers: int = 2
    max_position_embeddings: int = 128

    def __post_init__(self) -> None:
        """Raise ConfigError if the hidden size is odd or not divisible by the number of heads."""
        if self.hidden_size % self.num_attention_heads or self.hidden_size % 2:
            raise ConfigError(
                "the hidden size does not fit the heads",
                expected=f"an even multiple of {self.num_attention_heads}, the number of heads",
                found=str(self.hidden_size),
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


class CausalOutput(NamedTuple):
    """The output of the model.

    Attributes
    ----------
    logits : Tensor, shape (sequences, longest, vocabulary)
    attentions : tuple of Tensor, one a layer, shape (sequences, heads, queries, keys)
    """

    logits: Tensor
    attentions: tuple[Tensor, ...]


class Attention(nn.Module):
    """Causal attention with positions in queries and keys, and not in values."""

    def __init__(self, config: AttentionOnlyConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(config.hidden_size, config.hidden_size, bias=False) for _ in range(4)
        )

    def forward(self, hidden_states: Tensor, positions: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output (sequences, longest, hidden) and probabilities (sequences, heads, queries, keys)."""
        placed = hidden_states + positions
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.q_proj(placed), self.k_proj(placed), self.v_proj(hidden_states))
        )
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        probabilities = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1)
        return self.o_proj((probabilities @ v).transpose(1, 2).flatten(2)), probabilities


class Block(nn.Module):
    """Attention, added to the residual stream; there is no MLP."""

    def __init__(self, config: AttentionOnlyConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size)
        self.self_attn = Attention(config)

    def forward(self, hidden_states: Tensor, positions: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
        """Return the residual stream after the block, shape (sequences, longest, hidden), and the probabilities."""
        added, probabilities = self.self_attn(self.input_layernorm(hidden_states), positions, allowed)
        return hidden_states + added, probabilities


class AttentionOnly(nn.Module):
    """A causal language model of embeddings, attention blocks and an unembedding, as `flexcache.capture` takes it."""

    positions: Tensor

    def __init__(self, config: AttentionOnlyConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("positions", sinusoids(config), persistent=False)

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the embedding of token ids."""
        return self.embed_tokens

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False) -> CausalOutput:
        """Return logits and probabilities for ids of shape (sequences, longest); a zero in the mask hides a key.

        There is no cache; *use_cache* is taken for the sake of callers that set it.
        """
        length = input_ids.shape[1]
        allowed = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()
        if attention_mask is not None:
            allowed = allowed & attention_mask.bool()[:, None, None, :]
        hidden_states = self.embed_tokens(input_ids)
        attentions: list[Tensor] = []
        for layer in self.layers:
            hidden_states, probabilities = layer(hidden_states, self.positions[:length], allowed)
            attentions.append(probabilities)
        return CausalOutput(self.lm_head(self.norm(hidden_states)), tuple(attentions))


def sinusoids(config: AttentionOnlyConfig) -> Tensor:
    """Return sines and cosines of the positions, shape (positions, hidden)."""
    place = torch.arange(config.max_position_embeddings)[:, None]
    rate = torch.exp(torch.arange(0, config.hidden_size, 2) * (-math.log(10_000) / config.hidden_size))
    return torch.stack(((place * rate).sin(), (place * rate).cos()), -1).flatten(1)


def repeated(sequences: int, length: int, vocabulary: int, generator: torch.Generator) -> Tensor:
    """Draw random tokens and write each row of them twice: ids of shape (sequences, 2 · length)."""
    half = torch.randint(vocabulary, (sequences, length), generator=generator)
    return torch.cat((half, half), 1)


def train(
    seed: int = 0, steps: int = STEPS, lr: float = 1e-2, progress: Callable[[int, float], None] | None = None
) -> AttentionOnly:
    """Train a model on repeated random tokens; equal arguments give equal weights on one machine.

    Halves have random lengths, so that no fixed distance predicts the copy. Tokens of the first half, and the first
    one of the copy, cannot be foreseen. They weigh only `FIRST_HALF`: with 0 the model would guess wildly there, and
    with 1 the heads form later.

    Parameters
    ----------
    steps
        Steps of AdamW, each on `BATCH` new sequences.
    lr
        Learning rate, after `WARMUP` steps and before the last third, in which it falls to 0.
    progress
        Called after each step with the number of steps done and the loss on the second half, in nats a token.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = AttentionOnly(AttentionOnlyConfig())
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / WARMUP, 3 * (steps - step) / steps)
        length = int(torch.randint(SHORTEST, LONGEST + 1, (), generator=generator))
        ids = repeated(BATCH, length, model.config.vocab_size, generator)
        losses = cross_entropy(model(ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        copied = losses[:, length:].mean()
        optimizer.zero_grad()
        (copied + FIRST_HALF * losses[:, :length].mean()).backward()
        optimizer.step()
        if progress is not None:
            progress(step + 1, copied.item())
    return model.eval()
