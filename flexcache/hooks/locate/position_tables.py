"""Limits on the length of a model's input, from its tables of position embeddings."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from flexcache.hooks.locate.encoder_decoder import is_encoder_decoder
from flexcache.hooks.locate.names import unwrap_model
from flexcache.hooks.locate.vision import reads_images

POSITIONS = re.compile(r"(wpe|position_embeddings?|embed_positions?|positions_embed|pos_embed|pos_encoding)")
"""Names of modules and buffers that hold one row for each position."""
OTHER_INPUTS = ("vision", "visual", "image", "audio")


def longest_input(model: nn.Module, tokenizer: Any) -> int | None:
    """Return the largest number of tokens that the model can read; None if nothing limits it, or for image models."""
    if reads_images(model):
        return None
    config = getattr(model, "config", None)
    limits = [getattr(config, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None)]
    known = [int(limit) for limit in limits if isinstance(limit, int) and 0 < limit < 10**9]
    known += [limit for limit in count_positions(model) if limit is not None]
    return min(known, default=None)


def count_positions(model: nn.Module) -> tuple[int | None, int | None]:
    """Return the positions in the table of a model, and in that of its encoder if it has one; None without a table.

    Rotary positions, relative positions and ALiBi are computed for any length, whatever the configuration states.
    MPT is the exception: its biases are made for a fixed length.
    """
    root: Any = unwrap_model(model)
    if reads_images(root):
        return None, None
    if is_encoder_decoder(root) and hasattr(root, "get_encoder") and hasattr(root, "get_decoder"):
        return _count_table_rows(root.get_decoder()), _count_table_rows(root.get_encoder())
    return _count_table_rows(root), None


def _count_table_rows(root: nn.Module) -> int | None:
    config: Any = getattr(root, "config", None)
    found = [int(config.max_seq_len)] if getattr(config, "model_type", None) == "mpt" else []
    for path, module in root.named_modules():
        if any(word in path for word in OTHER_INPUTS) or not POSITIONS.fullmatch(path.rpartition(".")[2]):
            continue
        count, padding = getattr(module, "num_embeddings", None), getattr(module, "padding_idx", None)
        if count is not None and path.endswith("position_embeddings") and padding is not None:
            found.append(int(count) - int(padding) - 1)  # RoBERTa counts positions from there
        elif count is not None:
            found.append(int(count) - int(getattr(module, "offset", 0)))
    for path, buffer in root.named_buffers():
        if POSITIONS.fullmatch(path.rpartition(".")[2]) and buffer.ndim > 1:
            found.append(int(buffer.shape[-2]))
    return min(found, default=None)
