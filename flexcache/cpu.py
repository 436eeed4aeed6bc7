"""Facts about the processor of this machine."""

from __future__ import annotations


def has_native_bfloat16() -> bool:
    """Return True if torch has bfloat16 matrix kernels for this processor.

    They need AVX-512, AMX, or the ARM equivalents. Without them a forward in bfloat16 takes about 40 times as long as
    one in float32.
    """
    import torch

    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # a build without oneDNN
        return False
