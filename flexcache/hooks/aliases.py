"""What the parts of a block are called in the models of the field: one table, checked by `hooks.identity`."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from flexcache.hooks.names import inner
from flexcache.site import PATTERN, Side

ATTENTION = ("self_attn", "self_attention", "attention", "attn", "linear_attn")
ATTENTION_OUT = ("o_proj", "out_proj", "c_proj", "dense", "Wo", "out_lin")
MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
MLP_DOWN = ("down_proj", "c_proj", "dense_4h_to_h", "fc_out", "fc2", "Wo", "lin2", "w2")

ATTENTION_POST_NORM = ("post_self_attn_layernorm", "post_attention_layernorm")
MLP_POST_NORM = ("post_feedforward_layernorm", "post_mlp_layernorm")

NORM_PAIRS = (
    ("attention.output.LayerNorm", "output.LayerNorm"),
    ("sa_layer_norm", "output_layer_norm"),
    ("self_attn_layer_norm", "final_layer_norm"),
)
"""Norms *on* the residual stream, after attention and after the MLP, of blocks that normalize last (BERT)."""


def part(block: nn.Module, path: str) -> nn.Module | None:
    """Return the module at a path relative to *block*, looking through wrappers; None where there is none."""
    current = inner(block)
    for name in path.split("."):
        child = current._modules.get(name)
        if child is None:
            return None
        current = inner(child)
    return current


def find_part(block: nn.Module, site: str) -> tuple[str, Side] | None:
    """Return where a standard site is in *block*: a relative path, ``""`` for the block itself, and a side.

    None where the block has no such site.
    """
    if site == "resid_pre":
        return "", "input"
    if site == "resid_post":
        return "", "output"
    if site == PATTERN:
        found = next((path for path in ATTENTION if part(block, path) is not None), None)
        return None if found is None else (found, "pattern")
    side: Side = "input" if site == "mlp_post" else "output"
    found = next((path for path in _candidates(block, site) if part(block, path) is not None), None)
    return None if found is None else (found, side)


def _candidates(block: nn.Module, site: str) -> Iterator[str]:
    """Yield the paths to try, in order.

    A projection goes before the whole module, since some modules (Bloom) add the residual stream themselves.
    """
    post_norm = [name for name in MLP_POST_NORM if part(block, name) is not None]
    if site == "attn_out":
        # Llama's post_attention_layernorm is the norm before its MLP: without one after the MLP, it is no post-norm.
        yield from ATTENTION_POST_NORM if post_norm else ()
        yield "attention.output.dense"
        yield from (f"{module}.{out}" for module in ATTENTION for out in ATTENTION_OUT)
        yield from ATTENTION
    else:
        yield from post_norm if site == "mlp_out" else ()
        yield from (f"{module}.{down}" for module in MLP for down in MLP_DOWN)
        if not any(part(block, module) is not None for module in MLP):
            yield from ("output.dense", "fc2")  # BERT's and OPT's lie in the block itself
        yield from MLP if site == "mlp_out" else ()
