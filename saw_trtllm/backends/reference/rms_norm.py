"""rms_norm in plain PyTorch, in fp32."""

from __future__ import annotations

import torch

from saw_trtllm.backends.reference.gemm import row_sum


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / rms(x) · weight`` over the last axis."""
    return x / torch.sqrt(row_sum(x.square()) / x.shape[-1] + eps) * weight
