"""Rotate, quantize and pack rows: :mod:`saw_trtllm.format` in PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache

import torch

from saw_trtllm import format as fmt
from saw_trtllm.backends.reference.gemm import linear
from saw_trtllm.format import KVFormat

TORCH_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_FP16_MAX = torch.finfo(torch.float16).max


@lru_cache(maxsize=16)
def _hadamard(order: int, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(fmt.hadamard(order)).to(device)


def rotate(x: torch.Tensor, order: int) -> torch.Tensor:
    """``x · B`` over the last axis ``[..., n]``, in fp32. B is its own inverse: apply it twice to come back."""
    x = x.float()
    if order == 1:
        return x
    return linear(x.reshape(-1, order), _hadamard(order, x.device)).view(x.shape)


def quantize(
    y: torch.Tensor, range_factor: float = 1.0, end_cuts: Sequence[float] = (), code_max: int = fmt.CODE_MAX
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Asymmetric codes over the last axis.

    Parameters
    ----------
    y : torch.Tensor
        Rotated rows, any float dtype, ``[..., head_dim]``.
    range_factor : float
        γ: the share of each row's range that the codes span.
    end_cuts : sequence of float
        Shares of the range that may be cut off either end: those of least squared error are, in place of γ.
    code_max : int
        The largest code.

    Returns
    -------
    tuple of torch.Tensor
        Codes, uint8 ``[..., head_dim]`` from 0; scale and lo, fp16 ``[...]``.
    """
    y = y.float()
    lowest, highest = y.amin(-1), y.amax(-1)
    width = highest - lowest
    if not end_cuts:
        width = range_factor * width
        return _encode(y, (lowest + highest - width) / 2, width, code_max)
    best = _encode(y, lowest + end_cuts[0] * width, (1 - 2 * end_cuts[0]) * width, code_max)
    least = torch.full_like(width, torch.inf)
    for low, high in itertools.product(end_cuts, repeat=2):
        found = _encode(y, lowest + low * width, (1 - low - high) * width, code_max)
        error = (dequantize(*found) - y).square().sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        codes = torch.where(better[..., None], found[0], best[0])
        best = (codes, torch.where(better, found[1], best[1]), torch.where(better, found[2], best[2]))
    return best


def _encode(
    y: torch.Tensor, lowest: torch.Tensor, width: torch.Tensor, code_max: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scale and lo of rows ``y`` between ``lowest`` and ``lowest + width``."""
    lo = lowest.clamp(-_FP16_MAX, _FP16_MAX).half()
    scale = (width.clamp_min(code_max * fmt.MIN_SCALE) / code_max).clamp_max(_FP16_MAX).half()
    codes = (y - lo.float()[..., None]).div_(scale.float()[..., None]).round_().clamp_(0, code_max)
    return codes.to(torch.uint8), scale, lo


def dequantize(codes: torch.Tensor, scale: torch.Tensor, lo: torch.Tensor) -> torch.Tensor:
    """``codes · scale + lo`` in fp32: ``[..., head_dim]``."""
    return codes.float().mul_(scale.float()[..., None]).add_(lo.float()[..., None])


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Codes uint8 ``[..., head_dim]`` to bytes ``[..., head_dim / 2]``: even dims in the low nibbles."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Undo :func:`pack`."""
    # Each byte becomes the two bytes of an int16, least significant first: half the time of two arrays interleaved.
    wide = packed.to(torch.int16)
    return (wide << 4).bitwise_or_(wide).bitwise_and_(0x0F0F).view(torch.uint8)


def quantize_8bit(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The 8-bit codes of rows of keys, from their least number to their largest."""
    return quantize(y, code_max=fmt.CODE_MAX_8)


def encode_rows(y: torch.Tensor, kv_format: KVFormat, *, wide: bool = False) -> torch.Tensor:
    """Rotated rows ``[..., head_dim]`` to the pool's bytes, uint8 ``[..., row_bytes]``; ``wide`` ones have 8 bits."""
    if not kv_format.quantized:
        return y.to(TORCH_DTYPES[kv_format.dtype]).contiguous().view(torch.uint8)
    codes, scale, lo = quantize_8bit(y) if wide else quantize(y, kv_format.range_factor)
    tail = torch.stack([scale, lo], dim=-1).view(torch.uint8)
    return torch.cat([codes if wide else pack(codes), tail], dim=-1)


def decode_rows(
    rows: torch.Tensor, kv_format: KVFormat, *, wide: bool = False, used: torch.Tensor | None = None
) -> torch.Tensor:
    """The pool's bytes, uint8 ``[..., row_bytes]``, to rotated rows in fp32, ``[..., head_dim]``.

    Where ``used``, int32 that broadcasts to ``[...]``, has 0 in place of 1, a row of zeros comes of whatever is there.
    """
    if not kv_format.quantized:
        numbers = rows.contiguous().view(TORCH_DTYPES[kv_format.dtype]).float()
        return numbers if used is None else numbers.masked_fill_(used[..., None] == 0, 0)
    codes, tail = rows.split_with_sizes([rows.shape[-1] - fmt.ROW_TAIL_BYTES, fmt.ROW_TAIL_BYTES], -1)
    # Scale and lo in one number: a row of which both are 0 is one of zeros.
    tail = tail.contiguous().view(torch.int32)
    if used is not None:
        tail = tail * used[..., None]
    scale, lo = tail.view(torch.float16).float().unbind(-1)
    return dequantize(codes if wide else unpack(codes), scale, lo)
