"""Token ids that a model knows, and the one for padding."""

from __future__ import annotations

from typing import Any

from torch import nn

from flexcache.hooks.locate.encoder_decoder import get_token_embedding, is_encoder_decoder
from flexcache.hooks.locate.names import unwrap_model


def vocabulary_size(model: nn.Module) -> int | None:
    """Return the number of token ids that the model's embedding has, or None if the model does not state it."""
    count = getattr(get_token_embedding(model), "num_embeddings", None)
    return None if count is None else int(count)


def encoder_vocabulary_size(model: nn.Module) -> int | None:
    """Return the number of token ids that the encoder of an encoder–decoder has; None for other models."""
    if not is_encoder_decoder(model):
        return None
    try:
        return int(unwrap_model(model).get_encoder().get_input_embeddings().num_embeddings)  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None


def pad_token_id(model: nn.Module, tokenizer: Any) -> int:
    """Return the token id for padding; 0 if there is none, since the attention mask hides it."""
    for holder in (tokenizer, getattr(model, "config", None)):
        found = getattr(holder, "pad_token_id", None)
        if isinstance(found, int) and found >= 0:
            return found
    return 0
