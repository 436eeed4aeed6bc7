"""Names of the sites of a block in the models of the field: one table, checked by `hooks.checks`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from flexcache.hooks.locate.attention import ATTENTION_PATHS, PROJECTIONS, find_projection
from flexcache.hooks.locate.experts import has_neurons, takes_choice
from flexcache.hooks.locate.fused_projection import FusedProjectionSlice
from flexcache.hooks.locate.names import unwrap_module
from flexcache.site import EXPERT_SIDES, PATTERN, Side

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
MIXTURE = (*MLP, "mixer")
"""Modules that may hold a router, and in ``experts`` one module that computes all experts."""

ATTENTION_POST_NORM = ("post_self_attn_layernorm", "post_attention_layernorm")
MLP_POST_NORM = ("post_feedforward_layernorm", "post_mlp_layernorm")
ATTENTION_SCALE, MLP_SCALE = "layer_scale1", "layer_scale2"
"""Modules with which DINOv2 and DINOv3 scale the outputs of attention and MLP, feature by feature, before the sum."""

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
"""The norm after cross-attention, by the norm after attention."""
NORMALIZE_LAST = ("Bart", "PLBart", "Mvp", "Marian", "BlenderbotSmall", "LED")
"""Families of blocks that normalize last, with names of norms that other families (mBART, Pegasus, XGLM) use first."""

MIDDLE_NORM = (
    *("pre_feedforward_layernorm", "pre_mlp_layernorm", "ln_2", "norm_2", "mlp_norm", "ff_norm", "layernorm_after"),
    *("post_attention_layernorm", "final_layer_norm", "layer.1.layer_norm", "layer_norm2", "norm2", "rms_norm2"),
)
"""Norms that read the residual stream between attention and MLP, in blocks that normalize first."""

FINAL_NORM = (
    *("norm", "ln_f", "norm_f", "final_layer_norm", "final_layernorm", "final_norm", "layer_norm", "layernorm"),
    *("post_layernorm", "rms_norm"),  # of vision transformers; CLIP's reads the class token alone, and fails the check
)
"""Norms next to the list of blocks, applied after the last block."""


class BlockSite(NamedTuple):
    """A site in a block: a relative path (``""`` is the block itself), a side, and a slice of the features."""

    path: str
    side: Side
    fused_slice: FusedProjectionSlice | None = None


def find_submodule(block: nn.Module, path: str) -> nn.Module | None:
    """Return the module at a path relative to *block*, looking inside wrappers; None if there is none."""
    current = unwrap_module(block)
    for name in path.split("."):
        child = current._modules.get(name)
        if child is None:
            return None
        current = unwrap_module(child)
    return current


def find_block_site(block: nn.Module, site: str, crossed: bool = False) -> BlockSite | None:
    """Return the place of a standard site in *block*, or None if the block does not have it.

    *crossed* is True if the block receives the states of an encoder: a block may have cross-attention and not run it.
    """
    if site == "resid_pre":
        return BlockSite("", "input")
    if site == "resid_post":
        return BlockSite("", "output")
    if site in PROJECTIONS:
        return _projection(block, site)
    if site == "resid_mid":
        return _middle(block, crossed)
    if site == "cross_attn_out" and not crossed:
        return None
    found = next((path for path in _candidates(block, site) if find_submodule(block, path) is not None), None)
    if found is not None:
        return BlockSite(found, _SIDES.get(site, "output"))
    return _experts(block, site) if site in EXPERT_SIDES else None


_SIDES: dict[str, Side] = {"mlp_post": "input", "mlp_pre": "input", "z": "input", PATTERN: "pattern"}


def _candidates(block: nn.Module, site: str) -> Iterator[str]:
    """Yield the paths to try, in order.

    A projection comes before the module that holds it, since some modules (Bloom) add the residual stream themselves.
    """
    post_norm = [name for name in MLP_POST_NORM if find_submodule(block, name) is not None]
    bare = not any(
        find_submodule(block, module) is not None for module in MLP
    )  # in BERT and OPT the block itself holds the layers of the MLP
    if site == PATTERN:
        yield from ATTENTION
    elif site in ("attn_out", "z"):
        # In Llama post_attention_layernorm is the norm before the MLP. It is a post-norm only if the MLP has one too.
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
        yield from (f"{module}.{router}" for module in MIXTURE for router in ROUTER)
    elif site in ("mlp_out", "mlp_post"):
        yield from (*post_norm, MLP_SCALE) if site == "mlp_out" else ()
        yield from (f"{module}.{down}" for module in MLP for down in MLP_DOWN)
        yield from ("output.dense", "fc2") if bare else ()
        yield from MLP if site == "mlp_out" else ()


def _experts(block: nn.Module, site: str) -> BlockSite | None:
    for path in (f"{module}.experts" for module in MIXTURE):
        experts = find_submodule(block, path)
        if experts is not None and takes_choice(experts) and (site != "mlp_post" or has_neurons(experts)):
            return BlockSite(path, EXPERT_SIDES[site])
    return None


def _projection(block: nn.Module, site: str) -> BlockSite | None:
    for path in ATTENTION_PATHS:
        attention = find_submodule(block, path)
        found = None if attention is None else find_projection(attention, site)
        if found is not None:
            return BlockSite(f"{path}.{found[0]}", "output", found[1])
    return None


def _middle(block: nn.Module, crossed: bool) -> BlockSite | None:
    """Return the place of the residual stream between attention and MLP, or cross-attention if that comes next.

    It is the output of the first norm if the block normalizes last, and the input of the MLP if the block normalizes
    only what it adds (OLMo 2).
    """
    parallel = getattr(unwrap_module(block), "use_parallel_residual", False)
    if parallel or find_block_site(block, "attn_out") is None or find_block_site(block, "mlp_out") is None:
        return None
    first = next((first for first, last in NORM_PAIRS if _normalizes_last(block, first, last)), None)
    if first is not None:
        return BlockSite(first, "output")
    crossing = ("encoder_attn_layer_norm", "ln_cross_attn") if crossed else ()
    pre_norm = [name for name in (*crossing, *MIDDLE_NORM) if find_submodule(block, name) is not None]
    if any(find_submodule(block, name) is not None for name in MLP_POST_NORM) and pre_norm[:1] == [
        "post_attention_layernorm"
    ]:
        glm4 = find_submodule(block, "post_self_attn_layernorm") is not None
        return BlockSite("post_attention_layernorm", "input") if glm4 else BlockSite("mlp", "input")
    return BlockSite(pre_norm[0], "input") if pre_norm else None


def _normalizes_last(block: nn.Module, first: str, last: str) -> bool:
    # Blocks of OPT state where their norms are. Some others with the same names (XGLM, BioGPT) normalize first.
    kind = type(unwrap_module(block)).__name__
    first_by_name = first.startswith("self_attn") and not kind.startswith(NORMALIZE_LAST)
    normalizes_first = getattr(unwrap_module(block), "do_layer_norm_before", first_by_name)
    return not normalizes_first and find_submodule(block, first) is not None and find_submodule(block, last) is not None
