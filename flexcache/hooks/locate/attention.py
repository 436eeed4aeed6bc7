"""Queries, keys and values of a block's attention: separate projections, or slices of a fused one."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from flexcache.hooks.locate.fused_projection import FusedProjectionSlice
from flexcache.hooks.locate.names import unwrap_module

ATTENTION_PATHS = (
    *("self_attn", "self_attention", "attention.self", "attention.attention", "attn.attention", "attention", "attn"),
    *("linear_attn", "layer.0.SelfAttention", "SelfAttention", "temporal_block"),
)
"""Paths in a block of the module that holds the projections; deeper paths first."""

PROJECTIONS = {
    "q": ("q_proj", "query", "q_lin", "q", "query_proj"),
    "k": ("k_proj", "key", "k_lin", "k", "key_proj"),
    "v": ("v_proj", "value", "v_lin", "v", "value_proj"),
}
FUSED = ("c_attn", "query_key_value", "qkv_proj", "Wqkv", "qkv")
CODEGEN_GROUPS = 4
"""CodeGen's fused projection has four groups of queries, values and keys, on any number of devices."""


class Heads(NamedTuple):
    """Numbers of heads of an attention module: of queries, and of keys and values."""

    queries: int
    keys: int


def find_heads(attention: nn.Module) -> Heads | None:
    """Return the heads of an attention module, from its attributes or configuration; None if neither states them."""
    queries = _number(attention, "num_heads", "num_attention_heads", "n_heads", "n_head")
    if queries is None:
        return None
    if getattr(attention, "multi_query", False) and not getattr(attention, "new_decoder_architecture", False):
        return Heads(queries, 1)
    if hasattr(attention, "new_decoder_architecture") and not attention.new_decoder_architecture:
        return Heads(
            queries, queries
        )  # Falcon's configuration states a number of groups that its old architecture ignores
    keys = _number(attention, "num_key_value_heads", "num_kv_heads", "kv_heads")
    return Heads(queries, keys or queries)


def find_projection(attention: nn.Module, site: str) -> tuple[str, FusedProjectionSlice | None] | None:
    """Return the name of the child that computes ``q``, ``k`` or ``v``, and its slice if fused; None without one."""
    children = unwrap_module(attention)._modules
    own = next((name for name in PROJECTIONS[site] if children.get(name) is not None), None)
    if own is not None:
        return own, None
    fused = next((name for name in FUSED if children.get(name) is not None), None)
    heads = find_heads(attention)
    if fused is None or heads is None:
        return None
    size = _head_size(attention, heads)
    return None if size is None else (fused, _slots(attention, fused, heads, size, "qkv".index(site)))


def _slots(attention: nn.Module, fused: str, heads: Heads, size: int, which: int) -> FusedProjectionSlice:
    """Return the slots of queries, keys or values (0, 1, 2) in the layout of the model's family."""
    queries, keys = heads
    by_head = fused == "query_key_value" or getattr(attention, "multi_query", None) is False
    if fused == "qkv_proj" and hasattr(attention, "embed_positions"):
        each = queries // CODEGEN_GROUPS
        place = (0, 2, 1)[which]
        return FusedProjectionSlice(CODEGEN_GROUPS, 3 * each, place * each, (place + 1) * each, size)
    if by_head:
        each = queries // keys
        start, stop = ((0, each), (each, each + 1), (each + 1, each + 2))[which]
        return FusedProjectionSlice(keys, each + 2, start, stop, size)
    ends = (0, queries, queries + keys, queries + 2 * keys)
    return FusedProjectionSlice(1, ends[3], ends[which], ends[which + 1], size)


def _head_size(attention: nn.Module, heads: Heads) -> int | None:
    own = _number(attention, "head_dim", "head_size", "attention_head_size")
    hidden = _number(attention, "hidden_size", "embed_dim", "all_head_size", "n_embd", "dim")
    return own or (None if hidden is None else hidden // heads.queries)


def _number(attention: nn.Module, *names: str) -> int | None:
    holders: tuple[Any, ...] = (attention, getattr(attention, "config", None))
    found = (getattr(holder, name, None) for holder in holders for name in names)
    return next((value for value in found if isinstance(value, int) and not isinstance(value, bool)), None)
