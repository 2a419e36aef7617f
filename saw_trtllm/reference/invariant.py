"""Operations whose result for a row does not depend on the rows beside it, down to the last bit.

Sampling follows the last bit, so a text would otherwise change with what else is in the batch. Two things must not vary
with the batch: a matrix product's row count below a multiple of 8, where the CPU's GEMM sums in other orders, and the
place of an element in a vector register, where a transcendental function may be computed in two ways.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

ROW_MULTIPLE = 8


def pad_rows(x: torch.Tensor, multiple: int = ROW_MULTIPLE) -> torch.Tensor:
    """``x [..., n, d]`` with rows of zeros up to a multiple."""
    lacking = -x.shape[-2] % multiple
    return F.pad(x, (0, 0, 0, lacking)) if lacking else x


def silu(x: torch.Tensor) -> torch.Tensor:
    """``x · sigmoid(x)``. PyTorch's own computes the last elements of a vector loop another way; its exp does not."""
    return x / (1 + torch.exp(-x))
