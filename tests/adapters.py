"""Folders of tiny base models and of LoRA adapters with random weights, as PEFT saves them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers


def save_adapter(base: Path, folder: Path, seed: int, **options: Any) -> Path:
    """Save a random LoRA adapter of the model in *base*, of rank 4 on q and v by default."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    given = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    config: Any = options.pop("config", None) or peft.LoraConfig(**{**given, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names of transformers that peft still uses
        peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


def load_with_peft(base: Path, adapter: Path) -> Any:
    """Load an adapter as PEFT itself does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), adapter).eval()
