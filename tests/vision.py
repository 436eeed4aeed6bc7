"""Tiny random-init vision transformers, and images to give them; no hub."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers as hf
from torch import nn

HIDDEN, DEPTH, NEURONS, SIDE, PATCH = 48, 3, 80, 24, 8
GRID = SIDE // PATCH

_SIZES: dict[str, object] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 3,
    "intermediate_size": NEURONS,
    "image_size": SIDE,
    "patch_size": PATCH,
    "num_channels": 3,
}

VISION: dict[str, tuple[str, dict[str, object]]] = {
    "vit": ("ViTModel", {}),
    "deit": ("DeiTModel", {}),
    "beit": ("BeitModel", {"use_relative_position_bias": True}),
    "dinov2": ("Dinov2Model", {"layerscale_value": 0.5}),
    "dinov2_swiglu": ("Dinov2Model", {"layerscale_value": 0.5, "use_swiglu_ffn": True}),
    "dinov2_registers": ("Dinov2WithRegistersModel", {"layerscale_value": 0.5, "num_register_tokens": 2}),
    "dinov3": ("DINOv3ViTModel", {"layerscale_value": 0.5, "num_register_tokens": 2}),
    "clip_vision": ("CLIPVisionModel", {}),
    "siglip_vision": ("SiglipVisionModel", {}),
    "vit_msn": ("ViTMSNModel", {}),
    "ijepa": ("IJepaModel", {}),
    "yolos": (
        "YolosModel",
        {"image_size": [SIDE, SIDE], "num_detection_tokens": 5, "use_mid_position_embeddings": False},
    ),
    "aimv2_vision": ("Aimv2VisionModel", {}),
    "data2vec_vision": ("Data2VecVisionModel", {}),
}
SPECIALS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(VISION, ("cls",)),
    **dict.fromkeys(("siglip_vision", "ijepa", "aimv2_vision"), ()),
    **dict.fromkeys(("dinov2_registers", "dinov3"), ("cls", "register_0", "register_1")),
    "deit": ("cls", "distillation"),
}
"""The special tokens in front of the patches."""


def tiny_vision(family: str, dtype: torch.dtype = torch.float32, device: str = "cpu", **overrides: object) -> nn.Module:
    """Return a small model of *family* in eval mode, always with the same weights, norms and biases perturbed."""
    name, sizes = VISION[family]
    cls = getattr(hf, name)
    torch.manual_seed(0)
    with torch.device(device):
        model = cls._from_config(cls.config_class(**{**_SIZES, **sizes, **overrides}), dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or name.endswith(("cls_token", "position_embeddings", "register_tokens")):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def noise(images: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return pixels: shape (images, 3, side, side)."""
    return torch.randn((images, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(1)).to(dtype)


def processor(**changes: Any) -> Any:
    """Return an image processor that resizes to what the tiny models read."""
    return hf.ViTImageProcessorPil(**{"size": {"height": SIDE, "width": SIDE}, **changes})


def arrays(count: int, seed: int = 0) -> list[np.ndarray]:
    """Return pictures of several sizes: uint8, (height, width, 3)."""
    generator = np.random.default_rng(seed)
    return [
        generator.integers(0, 256, (*generator.integers(17, 41, 2).tolist(), 3), dtype=np.uint8) for _ in range(count)
    ]


def image_documents(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return documents of pictures, with an id and a label each."""
    return [
        {"id": f"picture-{number}", "image": image, "bright": bool(image.mean() > 127)}
        for number, image in enumerate(arrays(count, seed))
    ]
