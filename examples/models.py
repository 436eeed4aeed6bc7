"""A model for the examples: the one named on the command line, or a tiny random Llama that needs no download."""

from __future__ import annotations

import sys

import torch
import transformers


def model_and_ids() -> tuple[torch.nn.Module, torch.Tensor]:
    """Return a causal language model, and token ids of shape (rows, tokens)."""
    if len(sys.argv) > 1:
        model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
        tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
        texts = ["The capital of France is", "The capital of Spain is"]
        length = min(len(tokenizer(text).input_ids) for text in texts)
        return model.eval(), torch.tensor([tokenizer(text).input_ids[:length] for text in texts])
    return tiny_llama(), torch.randint(3, 257, (2, 12))


def tiny_llama() -> torch.nn.Module:
    """Return a Llama with random weights."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=257, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4
    )
    return transformers.LlamaForCausalLM(config).eval()
