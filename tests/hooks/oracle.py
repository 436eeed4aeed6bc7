"""The place of each site in each family, listed by hand and read with plain PyTorch hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

GLU = {"attn_out": "self_attn.o_proj", "mlp_out": "mlp", "mlp_post": "mlp.down_proj"}
FALCON = {"attn_out": "self_attention", "mlp_out": "mlp", "mlp_post": "mlp.dense_4h_to_h"}
BERT = {"attn_out": "attention.output.dense", "mlp_out": "output.dense", "mlp_post": "output.dense"}
GEMMA = {**GLU, "attn_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"}
NEOX = {"attn_out": "attention.dense", "mlp_out": "mlp", "mlp_post": "mlp.dense_4h_to_h"}
OPT = {"attn_out": "self_attn", "mlp_out": "fc2", "mlp_post": "fc2"}
GPT2 = {"attn_out": "attn", "mlp_out": "mlp", "mlp_post": "mlp.c_proj"}
FC = {"attn_out": "self_attn", "mlp_out": "mlp", "mlp_post": "mlp.fc2"}
EXPERTS = {"attn_out": "self_attn.o_proj", "mlp_out": "mlp"}

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
    "mistral": ("model.layers", GLU),
    "qwen2": ("model.layers", GLU),
    "gemma": ("model.layers", GLU),
    "gemma2": ("model.layers", GEMMA),
    "olmo": ("model.layers", GLU),
    "exaone4": ("model.layers", GEMMA),
    "smollm3": ("model.layers", GLU),
    "phi": ("model.layers", FC),
    "stablelm": ("model.layers", GLU),
    "stablelm_parallel": ("model.layers", GLU),
    "starcoder2": ("model.layers", {**FC, "mlp_post": "mlp.c_proj"}),
    "gpt_bigcode": ("transformer.h", GPT2),
    "gpt_bigcode_heads": ("transformer.h", GPT2),
    "gpt_neo": ("transformer.h", GPT2),
    "codegen": ("transformer.h", {**GPT2, "mlp_post": "mlp.fc_out"}),
    "mpt": (
        "transformer.blocks",
        {"attn_out": "attn.out_proj", "mlp_out": "ffn.down_proj", "mlp_post": "ffn.down_proj"},
    ),
    "cohere": ("model.layers", GLU),
    "cohere2": ("model.layers", GLU),
    "nemotron": ("model.layers", GLU),
    "persimmon": ("model.layers", {**FC, "mlp_post": "mlp.dense_4h_to_h"}),
    "helium": ("model.layers", GLU),
    "biogpt": ("biogpt.layers", OPT),
    "xglm": ("model.layers", OPT),
    "qwen3_moe": ("model.layers", EXPERTS),
    "olmoe": ("model.layers", EXPERTS),
    "gpt_oss": ("model.layers", EXPERTS),
    "deepseek_v3": ("model.layers", EXPERTS),
    "electra": ("electra.encoder.layer", BERT),
    "xlm_roberta": ("roberta.encoder.layer", BERT),
    "deberta_v2": ("deberta.encoder.layer", BERT),
    "bert": ("bert.encoder.layer", BERT),
    "roberta": ("roberta.encoder.layer", BERT),
    "distilbert": (
        "distilbert.transformer.layer",
        {"attn_out": "attention.out_lin", "mlp_out": "ffn", "mlp_post": "ffn.lin2"},
    ),
    "t5_encoder": (
        "encoder.block",
        {
            "attn_out": "layer.0.SelfAttention",
            "mlp_out": "layer.1.DenseReluDense",
            "mlp_post": "layer.1.DenseReluDense.wo",
        },
    ),
    "modernbert": ("model.layers", {"attn_out": "attn", "mlp_out": "mlp", "mlp_post": "mlp.Wo"}),
}
"""Of each family: the path of its blocks, and the module of each site in a block."""

APART = {
    "q": ("self_attn.q_proj", "output"),
    "k": ("self_attn.k_proj", "output"),
    "v": ("self_attn.v_proj", "output"),
    "z": ("self_attn.o_proj", "input"),
}
PRE_NORM = {"resid_mid": ("post_attention_layernorm", "input")}
GATE = {"mlp_pre": ("mlp.gate_proj", "output")}
LLAMA = {**APART, **PRE_NORM, **GATE}
FC1 = {"mlp_pre": ("fc1", "output"), "resid_mid": ("final_layer_norm", "input"), **APART}
FC1 |= {"z": ("self_attn.out_proj", "input")}
BERT_INNER = {
    **{name: (f"attention.self.{word}", "output") for name, word in (("q", "query"), ("k", "key"), ("v", "value"))},
    "z": ("attention.output.dense", "input"),
    "mlp_pre": ("intermediate.dense", "output"),
    "resid_mid": ("attention.output", "output"),
}
ROUTED = {**APART, **PRE_NORM, "router_logits": ("mlp.gate", "output")}


def fused(path: str, z: str, *cut: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, tuple]:
    """Return the places of queries, keys and values that one module gives, with the cut of each."""
    return {**{name: (path, "output", one) for name, one in zip("qkv", cut, strict=True)}, "z": (z, "input")}


def thirds(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tensor.split(tensor.shape[-1] // 3, dim=-1)


def by_head(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    heads = tensor.view(*tensor.shape[:-1], 4, 3, 16)
    return tuple(heads[..., which, :].flatten(-2) for which in range(3))


def grouped(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:  # Falcon: two keys, of two queries each
    heads = tensor.view(*tensor.shape[:-1], 2, 4, 16)
    return heads[..., :2, :].flatten(-3), heads[..., 2, :].flatten(-2), heads[..., 3, :].flatten(-2)


def widths(*sizes: int) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
    return lambda tensor: tensor.split(sizes, dim=-1)


def in_fours(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:  # CodeGen, which has values before keys
    query, value, key = tensor.view(*tensor.shape[:-1], 4, 48).split(16, dim=-1)
    return query.flatten(-2), key.flatten(-2), value.flatten(-2)


def cuts(cut: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    return [lambda tensor, which=which: cut(tensor)[which] for which in range(3)]


GPT2_INNER = {
    **fused("attn.c_attn", "attn.c_proj", *cuts(thirds)),
    "mlp_pre": ("mlp.c_fc", "output"),
    "resid_mid": ("ln_2", "input"),
}
NEOX_INNER = {
    **fused("attention.query_key_value", "attention.dense", *cuts(by_head)),
    "mlp_pre": ("mlp.dense_h_to_4h", "output"),
}
GPTJ_INNER = {
    **{name: (f"attn.{name}_proj", "output") for name in "qkv"},
    "z": ("attn.out_proj", "input"),
    "mlp_pre": ("mlp.fc_in", "output"),
}


def falcon(cut: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], **more: tuple) -> dict[str, tuple]:
    inner = fused("self_attention.query_key_value", "self_attention.dense", *cuts(cut))
    return {**inner, "mlp_pre": ("mlp.dense_h_to_4h", "output"), **more}


NO_MIDDLE = {name: place for name, place in LLAMA.items() if name != "resid_mid"}
GEMMA_INNER = {**LLAMA, "resid_mid": ("pre_feedforward_layernorm", "input")}
OLMO2_INNER = {**LLAMA, "resid_mid": ("mlp", "input")}

INNER: dict[str, dict[str, tuple]] = {
    **dict.fromkeys(("llama", "qwen3", "mistral", "qwen2", "gemma", "olmo", "smollm3", "stablelm", "helium"), LLAMA),
    **dict.fromkeys(("stablelm_parallel", "cohere", "cohere2"), NO_MIDDLE),
    **dict.fromkeys(("gemma2", "gemma3"), GEMMA_INNER),
    **dict.fromkeys(("olmo2", "exaone4"), OLMO2_INNER),
    **dict.fromkeys(("opt", "biogpt", "xglm"), FC1),
    **dict.fromkeys(("bert", "roberta", "electra", "xlm_roberta"), BERT_INNER),
    **dict.fromkeys(("mixtral", "qwen3_moe", "olmoe"), ROUTED),
    "gpt_oss": {**ROUTED, "router_logits": ("mlp.router", "output")},
    "opt_post_norm": {**FC1, "resid_mid": ("self_attn_layer_norm", "output")},
    "deberta_v2": {
        **BERT_INNER,
        **{n: (f"attention.self.{w}_proj", "output") for n, w in zip("qkv", ("query", "key", "value"))},
    },
    "nemotron": {**APART, **PRE_NORM, "mlp_pre": ("mlp.up_proj", "output")},
    "glm4": {**APART, **PRE_NORM, "mlp_pre": ("mlp.gate_up_proj", "output", lambda tensor: tensor.chunk(2, -1)[0])},
    "phi3": {
        **fused("self_attn.qkv_proj", "self_attn.o_proj", *cuts(widths(64, 32, 32))),
        **PRE_NORM,
        "mlp_pre": ("mlp.gate_up_proj", "output", lambda tensor: tensor.chunk(2, -1)[0]),
    },
    "phi": {**APART, "z": ("self_attn.dense", "input"), "mlp_pre": ("mlp.fc1", "output")},
    "starcoder2": {**APART, **PRE_NORM, "mlp_pre": ("mlp.c_fc", "output")},
    "gpt2": GPT2_INNER,
    "gpt_bigcode": {**GPT2_INNER, **fused("attn.c_attn", "attn.c_proj", *cuts(widths(64, 16, 16)))},
    "gpt_bigcode_heads": {**GPT2_INNER, **fused("attn.c_attn", "attn.c_proj", *cuts(by_head))},
    "gpt_neox": NEOX_INNER,
    "gpt_neox_sequential": {**NEOX_INNER, **PRE_NORM},
    "gptj": GPTJ_INNER,
    "gpt_neo": {
        **{name: (f"attn.attention.{name}_proj", "output") for name in "qkv"},
        "z": ("attn.attention.out_proj", "input"),
        "mlp_pre": ("mlp.c_fc", "output"),
        "resid_mid": ("ln_2", "input"),
    },
    "codegen": {**GPTJ_INNER, **fused("attn.qkv_proj", "attn.out_proj", *cuts(in_fours))},
    "mpt": {
        **fused("attn.Wqkv", "attn.out_proj", *cuts(thirds)),
        "mlp_pre": ("ffn.up_proj", "output"),
        "resid_mid": ("norm_2", "input"),
    },
    "falcon": falcon(grouped),
    "falcon_parallel": falcon(widths(64, 16, 16)),
    "falcon_sequential": falcon(widths(64, 16, 16), **PRE_NORM),
    "bloom": falcon(by_head, **PRE_NORM),
    "persimmon": {
        **fused("self_attn.query_key_value", "self_attn.dense", *cuts(by_head)),
        **PRE_NORM,
        "mlp_pre": ("mlp.dense_h_to_4h", "output"),
    },
    "deepseek_v3": {**PRE_NORM, "z": ("self_attn.o_proj", "input")},
    "distilbert": {
        **{name: (f"attention.{name}_lin", "output") for name in "qkv"},
        "z": ("attention.out_lin", "input"),
        "mlp_pre": ("ffn.lin1", "output"),
        "resid_mid": ("sa_layer_norm", "output"),
    },
    "t5_encoder": {
        **{name: (f"layer.0.SelfAttention.{name}", "output") for name in "qkv"},
        "z": ("layer.0.SelfAttention.o", "input"),
        "mlp_pre": ("layer.1.DenseReluDense.wi", "output"),
        "resid_mid": ("layer.1.layer_norm", "input"),
    },
    "modernbert": {
        **fused("attn.Wqkv", "attn.Wo", *cuts(thirds)),
        "mlp_pre": ("mlp.Wi", "output", lambda tensor: tensor.chunk(2, -1)[0]),
        "resid_mid": ("mlp_norm", "input"),
    },
}
"""Of each family: module and side of each site inside a block, and which part of it, cut as its own code cuts it."""


def read(
    model: nn.Module, family: str, inner: bool = False, **inputs: torch.Tensor
) -> dict[tuple[str, int], torch.Tensor]:
    """Return clones of all standard sites in one plain forward, by site and layer, in the shapes that modules give."""
    cache = {"use_cache": False} if hasattr(model, "lm_head") else {}
    return read_at(model, *BLOCKS[family], INNER[family] if inner else {}, **inputs, **cache)


def read_at(
    model: nn.Module, path: str, sites: dict[str, str], inner: dict[str, tuple], **inputs: Any
) -> dict[tuple[str, int], torch.Tensor]:
    """Return clones of sites of the blocks at a path, in one plain forward: see `BLOCKS` and `INNER`."""
    found: dict[tuple[str, int], torch.Tensor] = {}
    handles = []

    def before(key: tuple[str, int]):
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
            found[key] = (args[0] if args else kwargs["hidden_states"]).clone()

        return hook

    def after(key: tuple[str, int], cut: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor):
        def hook(_: nn.Module, args: tuple, output: object) -> None:
            found[key] = cut(output[0] if isinstance(output, tuple) else output).clone()

        return hook

    for layer, block in enumerate(model.get_submodule(path)):
        handles.append(block.register_forward_pre_hook(before(("resid_pre", layer)), with_kwargs=True))
        handles.append(block.register_forward_hook(after(("resid_post", layer))))
        for site, (name, side, *cut) in inner.items():
            module, key = block.get_submodule(name), (site, layer)
            if side == "input":
                handles.append(module.register_forward_pre_hook(before(key), with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(after(key, *cut)))
        for site, name in sites.items():
            module, key = block.get_submodule(name), (site, layer)
            if site == "mlp_post":
                handles.append(module.register_forward_pre_hook(before(key), with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(after(key)))
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return found
