"""How far fp32 arithmetic may be from exact arithmetic, or from itself in another order."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from saw_trtllm.backends.reference.int4 import TORCH_DTYPES, decode_rows
from saw_trtllm.format import ROW_TAIL_BYTES, KVFormat

EPS = float(np.finfo(np.float32).eps)
#: Products that are summed on the way to a logit of a model of hf_models, 3 layers of at most about 1,100 each: QKV,
#: scores, values, the output projection, both of the MLP's.
_MODEL_TERMS = 3300
#: The same of the example's 4 layers, with scores and values of up to 512 tokens.
_EXAMPLE_TERMS = 4 * (128 + 128 + 512 + 512 + 128 + 256)


def sum_rounding(terms: int, largest: float) -> float:
    """Bound of an fp32 sum's rounding, in any order, of so many terms of at most ``largest``: n · eps · max|term|.

    Each addition rounds a partial sum by eps / 2 of it at most; that all partial sums are of the size of n terms, with
    all roundings of one sign, is never near, which leaves room for several such sums in a row.
    """
    return terms * EPS * largest


def chain_rounding(terms: int, largest: float) -> float:
    """Of sums that feed each other, of so many terms together: 8 · eps · sqrt(n) of the largest result.

    Roundings of eps have signs of their own and add up as the steps of a random walk do; 8 is for what nonlinear
    functions between the sums make of them, and for the largest of many results.
    """
    return 8 * EPS * terms**0.5 * largest


def tensor_core_rounding(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Of ``x · weightᵀ`` in fp64, what a GPU sums in fp32: ceil(n / 16) · eps · 6 · sqrt(Σ term²), an element each.

    Tensor cores add 16 products at once to the sum so far and cut off, toward zero, what its 24 bits do not hold (Fasi
    et al., PeerJ Computer Science 7:e330), so that their errors add up. A sum so far of terms whose signs are random is
    within six sigma, which are the root of the terms' squares, of zero.
    """
    steps = -(-x.shape[-1] // 16)
    return 6 * steps * EPS * (x.square() @ weight.square().T).sqrt()


def model_rounding(logits: Any) -> float:
    """Of logits, an array or a tensor, of a random model of hf_models."""
    return chain_rounding(_MODEL_TERMS, float(abs(logits).max()))


def example_rounding(logits: Any) -> float:
    """Of logits, or log-probabilities, of the example model."""
    return chain_rounding(_EXAMPLE_TERMS, float(abs(logits).max()))


def rotated_rounding(order: int, largest: Any) -> Any:
    """Of two computations of a key or value, rotated by a transform of this order: (log2(order) + 5) · eps · largest.

    RoPE rounds three times, the center and the transform's factor once each, and each of the butterfly's log2(order)
    stages once, all by eps / 2 of the row's largest number; the two computations have the same bound.
    """
    return (math.log2(order) + 5) * EPS * largest


#: Of (y - lo) / scale up to 15: two roundings.
CODE_ROUNDING = 16 * EPS


def stored_rounding(exact: Any, dtype: torch.dtype, error: Any = 0.0) -> Any:
    """Of a number that had this ``error`` in fp32 and was rounded to ``dtype``: error + u · (abs(exact) + error).

    u is half a unit in the last place, and the least number of the dtype stands for those that are subnormal.
    """
    info = torch.finfo(dtype)
    return error + info.eps / 2 * (abs(exact) + error) + info.smallest_normal * info.eps / 2


def attention_rounding(context: torch.Tensor, dtype: torch.dtype, largest: Any) -> Any:
    """Of attention's output, whose weights and output are rounded to ``dtype``: u · (abs(context) + 2 · largest).

    Each weight is off by u of itself and they add up to 1, so that the sum of weights times values is off by u of the
    largest value at most; a value of 4 bits is code · scale beside lo, and the two together may be twice as large.
    """
    return torch.finfo(dtype).eps / 2 * (abs(context.double()) + 2 * largest)


def spacing(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """From each number to the next one of its dtype."""
    info = torch.finfo(dtype)
    return 2.0 ** x.abs().clamp_min(info.smallest_normal).log2().floor() * info.eps


def changed_share(error: torch.Tensor, steps: torch.Tensor | float) -> float:
    """Share of numbers that two computations may round differently: mean(error / step), and four sigma.

    A number that lies anywhere between two neighbours, a step apart, is on the other side of their middle with this
    probability.
    """
    share = float((error / steps).clamp(max=1).mean())
    return share + 4 * math.sqrt(share / error.numel()) + 1 / error.numel()


def changed_bytes(rows: torch.Tensor, fmt: KVFormat) -> float:
    """How many bytes of so many rows of a pool, uint8 ``[..., row_bytes]``, two writes may give differently.

    That is the sum over all bytes of error / step, as in :func:`changed_share`, for the error that is to be expected:
    roundings have signs of their own and are of a number of usual size, eps · sqrt(log2(order) + 5) · rms. A scale or a
    lo that is rounded to the other side changes all of its row at most, a code that lies between two changes one byte.
    """
    y = decode_rows(rows, fmt).double()
    error = EPS * math.sqrt(math.log2(fmt.hadamard_order) + 5) * y.square().mean(-1, keepdim=True).sqrt()
    if not fmt.quantized:
        return 2 * float((error / spacing(y, TORCH_DTYPES[fmt.dtype])).clamp(max=1).sum())
    tail = rows[..., -ROW_TAIL_BYTES:].contiguous().view(torch.float16).double()
    of_tail = (torch.cat([error * 2 / 15, error], dim=-1) / spacing(tail, torch.float16)).sum(-1).clamp(max=1)
    of_code = CODE_ROUNDING + error[..., 0] / tail[..., 0]
    return float((of_tail * rows.shape[-1] + of_code * fmt.head_dim).sum())


def most_changed_bytes(expected: float, fmt: KVFormat) -> float:
    """Four sigma above: an event changes one row at most."""
    return expected + 4 * math.sqrt(expected * fmt.row_bytes) + 1
