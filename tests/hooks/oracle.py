"""Where each site is, written down by hand for each family, and read with plain PyTorch hooks."""

from __future__ import annotations

import torch
from torch import nn

GLU = {"attn_out": "self_attn.o_proj", "mlp_out": "mlp", "mlp_post": "mlp.down_proj"}
FALCON = {"attn_out": "self_attention", "mlp_out": "mlp", "mlp_post": "mlp.dense_4h_to_h"}
BERT = {"attn_out": "attention.output.dense", "mlp_out": "output.dense", "mlp_post": "output.dense"}
GEMMA = {**GLU, "attn_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"}
NEOX = {"attn_out": "attention.dense", "mlp_out": "mlp", "mlp_post": "mlp.dense_4h_to_h"}
OPT = {"attn_out": "self_attn", "mlp_out": "fc2", "mlp_post": "fc2"}

BLOCKS = {
    "llama": ("model.layers", GLU),
    "gpt2": ("transformer.h", {"attn_out": "attn", "mlp_out": "mlp", "mlp_post": "mlp.c_proj"}),
    "gpt_neox": ("gpt_neox.layers", NEOX),
    "gpt_neox_sequential": ("gpt_neox.layers", NEOX),
    "gptj": ("transformer.h", {"attn_out": "attn", "mlp_out": "mlp", "mlp_post": "mlp.fc_out"}),
    "qwen3": ("model.layers", GLU),
    "gemma3": ("model.layers", GEMMA),
    "olmo2": ("model.layers", GEMMA),
    "glm4": (
        "model.layers",
        {**GLU, "attn_out": "post_self_attn_layernorm", "mlp_out": "post_mlp_layernorm"},
    ),
    "falcon": ("transformer.h", FALCON),
    "falcon_parallel": ("transformer.h", FALCON),
    "falcon_sequential": ("transformer.h", FALCON),
    "opt": ("model.decoder.layers", OPT),
    "opt_post_norm": ("model.decoder.layers", OPT),
    "bloom": (
        "transformer.h",
        {"attn_out": "self_attention.dense", "mlp_out": "mlp.dense_4h_to_h", "mlp_post": "mlp.dense_4h_to_h"},
    ),
    "phi3": ("model.layers", GLU),
    "mixtral": ("model.layers", {"attn_out": "self_attn.o_proj", "mlp_out": "mlp"}),
    "bert": ("bert.encoder.layer", BERT),
    "roberta": ("roberta.encoder.layer", BERT),
    "distilbert": (
        "distilbert.transformer.layer",
        {"attn_out": "attention.out_lin", "mlp_out": "ffn", "mlp_post": "ffn.lin2"},
    ),
    "modernbert": ("model.layers", {"attn_out": "attn", "mlp_out": "mlp", "mlp_post": "mlp.Wo"}),
}
"""Of each family: the path of its blocks, and the module of each site in a block."""


def read(model: nn.Module, family: str, **inputs: torch.Tensor) -> dict[tuple[str, int], torch.Tensor]:
    """Return clones of all standard sites in one plain forward, by site and layer, in the shapes that modules give."""
    path, sites = BLOCKS[family]
    found: dict[tuple[str, int], torch.Tensor] = {}
    handles = []

    def before(key: tuple[str, int]):
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
            found[key] = (args[0] if args else kwargs["hidden_states"]).clone()

        return hook

    def after(key: tuple[str, int]):
        def hook(_: nn.Module, args: tuple, output: object) -> None:
            found[key] = (output[0] if isinstance(output, tuple) else output).clone()

        return hook

    for layer, block in enumerate(model.get_submodule(path)):
        handles.append(block.register_forward_pre_hook(before(("resid_pre", layer)), with_kwargs=True))
        handles.append(block.register_forward_hook(after(("resid_post", layer))))
        for site, name in sites.items():
            module, key = block.get_submodule(name), (site, layer)
            if site == "mlp_post":
                handles.append(module.register_forward_pre_hook(before(key), with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(after(key)))
    with torch.no_grad():
        model(**inputs, **({"use_cache": False} if hasattr(model, "lm_head") else {}))
    for handle in handles:
        handle.remove()
    return found
