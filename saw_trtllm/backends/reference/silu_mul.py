"""What gates an MLP, in plain PyTorch, in fp32: ``activation(x) · gate``, of which these are the activations."""

from __future__ import annotations

import math

import torch

from saw_trtllm.backends.reference.invariant import exp, tanh


def silu(x: torch.Tensor) -> torch.Tensor:
    """``x · sigmoid(x)``."""
    return x / (1 + exp(-x))


def gelu(x: torch.Tensor) -> torch.Tensor:
    """``x · Φ(x)`` by its approximation with tanh (Hendrycks and Gimpel, arXiv 1606.08415)."""
    return 0.5 * x * (1 + tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))))
