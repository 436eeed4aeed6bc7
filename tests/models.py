"""Tiny random-init models of many families, built from configurations in milliseconds; no hub."""

from __future__ import annotations

import torch
import transformers as hf
from torch import nn

VOCABULARY, HIDDEN, DEPTH, NEURONS = 257, 64, 4, 112

_SIZES = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": DEPTH, "num_attention_heads": 4}
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_GROUPED = {"intermediate_size": NEURONS, "num_key_value_heads": 2, "head_dim": 16}
_MLP = {"intermediate_size": NEURONS, "max_position_embeddings": 128}
_BERT = {**_MLP, "attn_implementation": "sdpa"}
_GPT2 = {"n_embd": HIDDEN, "n_layer": DEPTH, "n_head": 4, "n_positions": 128, "n_inner": NEURONS}

FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("LlamaForCausalLM", _GROUPED),
    "gpt2": ("GPT2LMHeadModel", _GPT2),
    "gpt_neox": ("GPTNeoXForCausalLM", _MLP),
    "gpt_neox_sequential": ("GPTNeoXForCausalLM", {**_MLP, "use_parallel_residual": False}),
    "gptj": ("GPTJForCausalLM", {**_GPT2, "rotary_dim": 8}),
    "qwen3": ("Qwen3ForCausalLM", _GROUPED),
    "gemma3": (
        "Gemma3ForCausalLM",
        {**_GROUPED, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "olmo2": ("Olmo2ForCausalLM", _GROUPED),
    "glm4": ("Glm4ForCausalLM", _GROUPED),
    "falcon": ("FalconForCausalLM", {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}),
    "falcon_parallel": (
        "FalconForCausalLM",
        {"new_decoder_architecture": False, "parallel_attn": True, "alibi": False},
    ),
    "falcon_sequential": (
        "FalconForCausalLM",
        {"new_decoder_architecture": False, "parallel_attn": False, "alibi": True},
    ),
    "opt": (
        "OPTForCausalLM",
        {"ffn_dim": NEURONS, "word_embed_proj_dim": HIDDEN, "max_position_embeddings": 128},
    ),
    "opt_post_norm": (
        "OPTForCausalLM",
        {
            "ffn_dim": NEURONS,
            "word_embed_proj_dim": HIDDEN,
            "max_position_embeddings": 128,
            "do_layer_norm_before": False,
        },
    ),
    "bloom": ("BloomForCausalLM", {}),
    "phi3": ("Phi3ForCausalLM", {**_GROUPED, "max_position_embeddings": 128, "original_max_position_embeddings": 128}),
    "mixtral": ("MixtralForCausalLM", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "granite": ("GraniteForCausalLM", {**_GROUPED, "residual_multiplier": 0.22}),
    "mistral": ("MistralForCausalLM", _GROUPED),
    "qwen2": ("Qwen2ForCausalLM", _GROUPED),
    "gemma": ("GemmaForCausalLM", _GROUPED),
    "gemma2": ("Gemma2ForCausalLM", {**_GROUPED, "sliding_window": 8, "query_pre_attn_scalar": 16}),
    "olmo": ("OlmoForCausalLM", _GROUPED),
    "exaone4": ("Exaone4ForCausalLM", {**_GROUPED, "sliding_window": 8, "sliding_window_pattern": 2}),
    "smollm3": ("SmolLM3ForCausalLM", _GROUPED),
    "phi": ("PhiForCausalLM", _MLP),
    "stablelm": ("StableLmForCausalLM", _GROUPED),
    "stablelm_parallel": ("StableLmForCausalLM", {**_GROUPED, "use_parallel_residual": True}),
    "starcoder2": ("Starcoder2ForCausalLM", {**_GROUPED, "sliding_window": 8}),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", {**_GPT2, "multi_query": True}),
    "gpt_bigcode_heads": ("GPTBigCodeForCausalLM", {**_GPT2, "multi_query": False}),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {
            "hidden_size": HIDDEN,
            "num_layers": DEPTH,
            "num_heads": 4,
            "intermediate_size": NEURONS,
            "window_size": 8,
            "max_position_embeddings": 128,
            "attention_types": [[["global", "local"], 2]],
        },
    ),
    "codegen": ("CodeGenForCausalLM", {**_GPT2, "rotary_dim": 8}),
    "mpt": (
        "MptForCausalLM",
        {"d_model": HIDDEN, "n_layers": DEPTH, "n_heads": 4, "max_seq_len": 128, "expansion_ratio": 2},
    ),
    "cohere": ("CohereForCausalLM", {**_GROUPED, "use_qk_norm": True}),
    "cohere2": ("Cohere2ForCausalLM", {**_GROUPED, "sliding_window": 8, "sliding_window_pattern": 2}),
    "nemotron": ("NemotronForCausalLM", _GROUPED),
    "persimmon": ("PersimmonForCausalLM", {**_MLP, "hidden_act": "relu2"}),
    "helium": ("HeliumForCausalLM", _GROUPED),
    "biogpt": ("BioGptForCausalLM", _MLP),
    "xglm": (
        "XGLMForCausalLM",
        {
            "d_model": HIDDEN,
            "num_layers": DEPTH,
            "attention_heads": 4,
            "ffn_dim": NEURONS,
            "max_position_embeddings": 128,
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    ),
    "olmoe": ("OlmoeForCausalLM", {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": (
        "GptOssForCausalLM",
        {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {
            "intermediate_size": NEURONS,
            "moe_intermediate_size": 48,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 24,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "num_key_value_heads": 4,
        },
    ),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        {
            **_GROUPED,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 48,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
    ),
    "mamba": ("MambaForCausalLM", {"state_size": 8}),
    "mamba2": ("Mamba2ForCausalLM", {"state_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 2, "expand": 2}),
    "jamba": (
        "JambaForCausalLM",
        {
            **_GROUPED,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
            "mamba_d_state": 8,
        },
    ),
    "electra": ("ElectraForMaskedLM", {**_BERT, "embedding_size": HIDDEN}),
    "xlm_roberta": ("XLMRobertaForMaskedLM", _BERT),
    "deberta_v2": (
        "DebertaV2ForMaskedLM",
        {**_MLP, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    ),
    "bert": ("BertForMaskedLM", _BERT),
    "roberta": ("RobertaForMaskedLM", _BERT),
    "distilbert": ("DistilBertForMaskedLM", {"dim": HIDDEN, "hidden_dim": NEURONS, "n_layers": DEPTH, "n_heads": 4}),
    "modernbert": ("ModernBertForMaskedLM", {"intermediate_size": NEURONS, "local_attention": 8}),
    "albert": ("AlbertModel", {**_MLP, "embedding_size": 16}),
    "t5_encoder": ("T5EncoderModel", {"d_model": HIDDEN, "d_kv": 16, "d_ff": NEURONS, "num_layers": DEPTH}),
}

_BOTH_T5 = {
    "d_model": HIDDEN,
    "d_kv": 16,
    "d_ff": NEURONS,
    "num_layers": 2,
    "num_decoder_layers": DEPTH,
    "num_heads": 4,
}
_BOTH_BART = {
    "d_model": HIDDEN,
    "encoder_layers": 2,
    "decoder_layers": DEPTH,
    "decoder_start_token_id": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": NEURONS,
    "decoder_ffn_dim": NEURONS,
}
TWO_SIDED: dict[str, tuple[str, dict[str, object]]] = {
    "t5": ("T5ForConditionalGeneration", _BOTH_T5),
    "mt5": ("MT5ForConditionalGeneration", _BOTH_T5),
    "umt5": ("UMT5ForConditionalGeneration", _BOTH_T5),
    "longt5": ("LongT5ForConditionalGeneration", _BOTH_T5),
    "bart": ("BartForConditionalGeneration", _BOTH_BART),
    "mbart": ("MBartForConditionalGeneration", _BOTH_BART),
    "pegasus": ("PegasusForConditionalGeneration", _BOTH_BART),
    "marian": ("MarianMTModel", _BOTH_BART),
    "m2m_100": ("M2M100ForConditionalGeneration", _BOTH_BART),
}
"""Models with an encoder, of 2 blocks, and a decoder."""


_MIXTURE = {
    **_GROUPED,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "topk_group", "first_k_dense_replace"), 1),
    "n_group": 2,
}
"""Sizes of a mixture of experts, under the names of several families."""
_LATENT = {**FAMILIES["deepseek_v3"][1], "n_group": 2, "first_k_dense_replace": 1}
MIXTURES: dict[str, tuple[str, dict[str, object]]] = {
    "mixtral": FAMILIES["mixtral"],
    "qwen2_moe": ("Qwen2MoeForCausalLM", _MIXTURE),
    "qwen3_moe": FAMILIES["qwen3_moe"],
    "qwen3_next": FAMILIES["qwen3_next"],
    "qwen3_5_moe": ("Qwen3_5MoeForCausalLM", FAMILIES["qwen3_next"][1]),
    "olmoe": FAMILIES["olmoe"],
    "flex_olmo": ("FlexOlmoForCausalLM", _MIXTURE),
    "glm4_moe": ("Glm4MoeForCausalLM", _MIXTURE),
    "deepseek_v2": ("DeepseekV2ForCausalLM", _LATENT),
    "deepseek_v3": FAMILIES["deepseek_v3"],
    "gpt_oss": FAMILIES["gpt_oss"],
    "granitemoe": ("GraniteMoeForCausalLM", {**_MIXTURE, "residual_multiplier": 0.22}),
    "granitemoeshared": ("GraniteMoeSharedForCausalLM", _MIXTURE),
    "phimoe": ("PhimoeForCausalLM", _MIXTURE),
    "jamba": FAMILIES["jamba"],
    "minimax": ("MiniMaxForCausalLM", _MIXTURE),
    "minimax_m2": ("MiniMaxM2ForCausalLM", _MIXTURE),
    "ernie4_5_moe": ("Ernie4_5_MoeForCausalLM", _MIXTURE),
    "hunyuan_v1_moe": ("HunYuanMoEV1ForCausalLM", _MIXTURE),
    "dots1": ("Dots1ForCausalLM", _MIXTURE),
    "exaone_moe": ("ExaoneMoeForCausalLM", _MIXTURE),
    "afmoe": ("AfmoeForCausalLM", _MIXTURE),
    "solar_open": ("SolarOpenForCausalLM", _MIXTURE),
    "mimo_v2_flash": ("MiMoV2FlashForCausalLM", _MIXTURE),
    "hy_v3": ("HYV3ForCausalLM", _MIXTURE),
    "laguna": ("LagunaForCausalLM", _MIXTURE),
    "aria": ("AriaTextForCausalLM", _MIXTURE),
    "nemotron_h": (
        "NemotronHForCausalLM",
        {**_MIXTURE, "topk_group": 2, "layers_block_type": ["attention", "moe", "attention", "moe"]},
    ),
    "cohere2_moe": ("Cohere2MoeForCausalLM", _MIXTURE),
    "axk1": ("AXK1ForCausalLM", _LATENT),
    "llama4": ("Llama4ForCausalLM", _MIXTURE),
    "jetmoe": ("JetMoeForCausalLM", _MIXTURE),
}
"""Mixtures of experts, in all blocks or in some."""


def tiny(family: str, dtype: torch.dtype = torch.float32, device: str = "cpu", **overrides: object) -> nn.Module:
    """Return a small model of *family* in eval mode, always with the same weights.

    Norms and biases are perturbed as well, so that leaving one out changes the numbers.
    """
    name, sizes = (FAMILIES | TWO_SIDED | MIXTURES)[family]
    cls = getattr(hf, name)
    own = not {"n_layer", "n_layers", "num_layers", "d_model"}.isdisjoint(sizes)
    settings = {**({"vocab_size": VOCABULARY} if own else _SIZES), **_IDS, **sizes}
    if family == "modernbert":
        settings |= {"cls_token_id": 1, "sep_token_id": 2}
    if "t5" in family:
        settings |= {"decoder_start_token_id": 0, "num_heads": 4}
    settings |= overrides
    attention = settings.pop("attn_implementation", None)
    torch.manual_seed(0)
    with torch.device(device):
        model = cls._from_config(cls.config_class(**settings), attn_implementation=attention, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def token_ids(batch: int = 3, length: int = 7, seed: int = 0) -> torch.Tensor:
    """Return token ids without special ones: int64, shape (batch, length)."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def checkpointed(model: nn.Module, reentrant: bool) -> nn.Module:
    """Turn gradient checkpointing on, under the name that this version of transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    return model
