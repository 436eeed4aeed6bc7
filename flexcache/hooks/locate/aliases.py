"""What the parts of a block are called in the models of the field: one table, checked by `hooks.identity`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from flexcache.hooks.locate.attention import APART, PLACES, find_projection
from flexcache.hooks.locate.fused_projection import FusedProjectionSlice
from flexcache.hooks.locate.names import inner
from flexcache.site import PATTERN, Side

ATTENTION = ("self_attn", "self_attention", "attention", "attn", "linear_attn", "layer.0.SelfAttention")
CROSS_ATTENTION = ("encoder_attn", "crossattention", "layer.1.EncDecAttention")
ATTENTION_OUT = (
    *("o_proj", "out_proj", "c_proj", "dense", "Wo", "out_lin", "o"),
    *("projection", "projection_layer"),  # of vision transformers: BLIP, InternVL
)
MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "layer.1.DenseReluDense", "layer.2.DenseReluDense")
MLP_DOWN = ("down_proj", "c_proj", "dense_4h_to_h", "fc_out", "fc2", "Wo", "lin2", "w2", "wo", "weights_out")
ACTIVATION = ("act_fn", "act", "activation_fn", "activation", "gelu_impl")
ROUTER = ("gate", "router")

ATTENTION_POST_NORM = ("post_self_attn_layernorm", "post_attention_layernorm")
MLP_POST_NORM = ("post_feedforward_layernorm", "post_mlp_layernorm")
ATTENTION_SCALE, MLP_SCALE = "layer_scale1", "layer_scale2"
"""What DINOv2 and DINOv3 scale the results of attention and MLP by, feature by feature, before they are added."""

NORM_PAIRS = (
    ("attention.output.LayerNorm", "output.LayerNorm"),
    ("sa_layer_norm", "output_layer_norm"),
    ("self_attn_layer_norm", "final_layer_norm"),
)
"""Norms *on* the residual stream, after attention and after the MLP, of blocks that normalize last (BERT)."""
CROSS_NORMS = {
    "attention.output.LayerNorm": "crossattention.output.LayerNorm",
    "self_attn_layer_norm": "encoder_attn_layer_norm",
}
"""The norm after cross-attention, by that after attention."""
NORMALIZE_LAST = ("Bart", "PLBart", "Mvp", "Marian", "BlenderbotSmall", "LED")
"""Families of blocks that do so under names under which others (mBART, Pegasus, XGLM) normalize first."""

MIDDLE_NORM = (
    *("pre_feedforward_layernorm", "pre_mlp_layernorm", "ln_2", "norm_2", "mlp_norm", "ff_norm", "layernorm_after"),
    *("post_attention_layernorm", "final_layer_norm", "layer.1.layer_norm", "layer_norm2", "norm2", "rms_norm2"),
)
"""Norms that read the residual stream between attention and MLP, of blocks that normalize first."""

FINAL_NORM = (
    *("norm", "ln_f", "norm_f", "final_layer_norm", "final_layernorm", "final_norm", "layer_norm", "layernorm"),
    *("post_layernorm", "rms_norm"),  # of vision transformers; CLIP's reads the class token alone, and is refused
)
"""Norms beside the blocks, after the last of them."""


class Place(NamedTuple):
    """Where a site is in a block: a relative path, ``""`` for the block itself, a side, and which of the features."""

    path: str
    side: Side
    slots: FusedProjectionSlice | None = None


def part(block: nn.Module, path: str) -> nn.Module | None:
    """Return the module at a path relative to *block*, looking through wrappers; None where there is none."""
    current = inner(block)
    for name in path.split("."):
        child = current._modules.get(name)
        if child is None:
            return None
        current = inner(child)
    return current


def find_part(block: nn.Module, site: str, crossed: bool = False) -> Place | None:
    """Return where a standard site is in *block*; None where the block has no such site.

    *crossed* says that an encoder's states are given to it: a block may have cross-attention, and not run it.
    """
    if site == "resid_pre":
        return Place("", "input")
    if site == "resid_post":
        return Place("", "output")
    if site in APART:
        return _projection(block, site)
    if site == "resid_mid":
        return _middle(block, crossed)
    if site == "cross_attn_out" and not crossed:
        return None
    candidates, side = _candidates(block, site), _SIDES.get(site, "output")
    found = next((path for path in candidates if part(block, path) is not None), None)
    return None if found is None else Place(found, side)


_SIDES: dict[str, Side] = {"mlp_post": "input", "mlp_pre": "input", "z": "input", PATTERN: "pattern"}


def _candidates(block: nn.Module, site: str) -> Iterator[str]:
    """Yield the paths to try, in order.

    A projection goes before the whole module, since some modules (Bloom) add the residual stream themselves.
    """
    post_norm = [name for name in MLP_POST_NORM if part(block, name) is not None]
    bare = not any(part(block, module) is not None for module in MLP)  # BERT's and OPT's MLP lies in the block itself
    if site == PATTERN:
        yield from ATTENTION
    elif site in ("attn_out", "z"):
        # Llama's post_attention_layernorm is the norm before its MLP: without one after the MLP, it is no post-norm.
        yield from ATTENTION_POST_NORM if post_norm and site == "attn_out" else ()
        yield from (ATTENTION_SCALE,) if site == "attn_out" else ()
        yield "attention.output.dense"
        yield from (f"{module}.{out}" for module in (*ATTENTION, "attn.attention") for out in ATTENTION_OUT)
        yield from ATTENTION if site == "attn_out" else ()
    elif site == "cross_attn_out":
        yield "crossattention.output.dense"
        yield from (f"{module}.{out}" for module in CROSS_ATTENTION for out in ATTENTION_OUT)
    elif site == "mlp_pre":
        yield from (f"{module}.{activation}" for module in MLP for activation in ACTIVATION)
        yield from ("intermediate.intermediate_act_fn", *ACTIVATION) if bare else ()
    elif site == "router_logits":
        yield from (f"{module}.{router}" for module in MLP for router in ROUTER)
    else:
        yield from (*post_norm, MLP_SCALE) if site == "mlp_out" else ()
        yield from (f"{module}.{down}" for module in MLP for down in MLP_DOWN)
        yield from ("output.dense", "fc2") if bare else ()
        yield from MLP if site == "mlp_out" else ()


def _projection(block: nn.Module, site: str) -> Place | None:
    for path in PLACES:
        attention = part(block, path)
        found = None if attention is None else find_projection(attention, site)
        if found is not None:
            return Place(f"{path}.{found[0]}", "output", found[1])
    return None


def _middle(block: nn.Module, crossed: bool) -> Place | None:
    """Return where the residual stream is between attention and MLP, or cross-attention where that comes next.

    Where a block normalizes last, that is what its first norm gives, and where it normalizes only what it adds
    (OLMo 2), what its MLP reads.
    """
    parallel = getattr(inner(block), "use_parallel_residual", False)
    if parallel or find_part(block, "attn_out") is None or find_part(block, "mlp_out") is None:
        return None
    first = next((first for first, last in NORM_PAIRS if _normalizes_last(block, first, last)), None)
    if first is not None:
        return Place(first, "output")
    crossing = ("encoder_attn_layer_norm", "ln_cross_attn") if crossed else ()
    pre_norm = [name for name in (*crossing, *MIDDLE_NORM) if part(block, name) is not None]
    if any(part(block, name) is not None for name in MLP_POST_NORM) and pre_norm[:1] == ["post_attention_layernorm"]:
        glm4 = part(block, "post_self_attn_layernorm") is not None
        return Place("post_attention_layernorm", "input") if glm4 else Place("mlp", "input")
    return Place(pre_norm[0], "input") if pre_norm else None


def _normalizes_last(block: nn.Module, first: str, last: str) -> bool:
    # Blocks of OPT say where their norms are; of others with the same names, some (XGLM, BioGPT) normalize first.
    kind = type(inner(block)).__name__
    first_by_name = first.startswith("self_attn") and not kind.startswith(NORMALIZE_LAST)
    says = getattr(inner(block), "do_layer_norm_before", first_by_name)
    return not says and part(block, first) is not None and part(block, last) is not None
