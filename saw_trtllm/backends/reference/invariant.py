"""Functions of rows whose result for a row does not depend on the rows beside it, down to the last bit.

Sampling follows the last bit, so a text would otherwise change with what else is in the batch. A BLAS sums a row's
products in an order that it chooses by the number of rows, by a row's place among them, by the operands' alignment and
by the number of threads; loops of elementwise functions and of reductions may do likewise. None of that is specified,
and each library does it in another way on each CPU, so nothing here rests on it:

- A matrix product is computed by calls of a few fixed shapes: tiles of contiguous rows at addresses that are multiples
  of 64 bytes, the last one filled up with zeros. How many rows there are, or how many products, never reaches the
  library. A shape is taken only after a probe of that very call, on random numbers, has given the bits of the first
  shape at each place in the tile. Where no two shapes agree there is one; where a row's place matters, it is one row.
- A transcendental function is computed by calls of one size, probed in the same way.
- All else is addition, subtraction, multiplication, division, square root, comparison and conversion of single
  elements. IEEE 754 has each of them correctly rounded, so that a vector loop and its tail cannot differ. Sums are made
  of such additions, in an order that the number of terms gives.

What is left to the library is to give the same bits for the same call on the same numbers with the same number of
threads.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F

#: Rows of the tiles of a product. The first of them that treats all places alike says what the bits are.
_BASE_ROWS = (16, 8, 4, 2, 1)
_MORE_ROWS = (4, 8, 32, 64)
#: Elements of an elementwise function's tile: PyTorch computes so many in one thread.
_ELEMENTS = (2048, 256, 16, 1)
_ALIGNMENT = 64


def aligned(x: torch.Tensor) -> torch.Tensor:
    """``x``, contiguous and at a multiple of 64 bytes."""
    x = x.contiguous()
    return x if x.data_ptr() % _ALIGNMENT == 0 else x.clone()


def pad_rows(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """``x [..., n, d]`` with rows of zeros up to a multiple."""
    lacking = -x.shape[-2] % multiple
    return F.pad(x, (0, 0, 0, lacking)) if lacking else x


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x · weightᵀ + bias``. On a GPU, which has other rules, it is PyTorch's own.

    Parameters
    ----------
    x : torch.Tensor
        fp32 ``[n, in]``.
    weight, bias : torch.Tensor
        fp32 ``[out, in]`` and ``[out]``, at multiples of 64 bytes.

    Returns
    -------
    torch.Tensor
        fp32 ``[n, out]``.
    """
    if not x.is_cpu:
        return F.linear(x, weight, bias)
    matrix, n = weight.mT, len(x)
    sizes = _tile_rows(*matrix.shape, matrix.stride(-1) != 1, torch.get_num_threads())
    x = pad_rows(x, sizes[0])
    # A decode's few rows are often one tile, whose product needs no place of its own.
    out = torch.mm(aligned(x), matrix)[:n] if len(x) in sizes else products(x, matrix[None])[0, :n]
    return out if bias is None else out + bias


def products(x: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """The product of all rows with each of several matrices.

    Parameters
    ----------
    x : torch.Tensor
        fp32 ``[..., n, d]``.
    matrices : torch.Tensor
        fp32 ``[..., t, d, m]``, contiguous or of contiguous transposes, each at a multiple of 64 bytes.

    Returns
    -------
    torch.Tensor
        fp32 ``[..., t, n, m]``.
    """
    *lead, t, d, m = matrices.shape
    sizes = _tile_rows(d, m, matrices.stride(-1) != 1, torch.get_num_threads())
    n = x.shape[-2]
    x = pad_rows(x, sizes[0]).contiguous()
    splits = _splits(x.shape[-2], sizes)
    out = x.new_empty(*lead, t, x.shape[-2], m)
    tiles = [[aligned(tile) for tile in rows.split(splits)] for rows in x.view(-1, x.shape[-2], d).unbind()]
    targets = iter(out.view(-1, m).split(splits * (math.prod(lead) * t)))
    for i, matrix in enumerate(matrices.flatten(0, -3).unbind()):
        for tile in tiles[i // t]:
            _mm(tile, matrix, next(targets))
    return out[..., :n, :]


def _mm(x: torch.Tensor, matrix: torch.Tensor, out: torch.Tensor) -> None:
    if out.data_ptr() % _ALIGNMENT == 0:
        torch.mm(x, matrix, out=out)
    else:
        out.copy_(torch.mm(x, matrix))


def exp(x: torch.Tensor) -> torch.Tensor:
    """Element by element."""
    if not x.is_cpu:
        return torch.exp(x)
    size = _exp_elements()
    flat = aligned(pad_rows(x.reshape(-1, 1), size)).view(-1)
    if len(flat) == size:
        return torch.exp(flat)[: x.numel()].view(x.shape)
    out = torch.empty_like(flat)
    for tile, target in zip(flat.split(size), out.split(size), strict=True):
        torch.exp(tile, out=target)
    return out[: x.numel()].view(x.shape)


def row_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over the last axis, which stays with a length of 1: halves are added until one element is left."""
    while (n := x.shape[-1]) > 1:
        if n % 2:
            x, n = F.pad(x, (0, 1)), n + 1
        low, high = x.split(n // 2, dim=-1)
        x = low + high
    return x


def silu(x: torch.Tensor) -> torch.Tensor:
    """``x · sigmoid(x)``."""
    return x / (1 + exp(-x))


def gelu(x: torch.Tensor) -> torch.Tensor:
    """``x · Φ(x)`` by its approximation with tanh (Hendrycks and Gimpel, arXiv 1606.08415)."""
    return 0.5 * x * (1 + tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))))


def tanh(x: torch.Tensor) -> torch.Tensor:
    """Within a few roundings of 1, not of the result, of which a small one has fewer digits."""
    return 1 - 2 / (exp(2 * x) + 1)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _is_alike(y: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(y, expected.expand_as(y))


@cache
def _tile_rows(d: int, m: int, transposed: bool, num_threads: int) -> tuple[int, ...]:
    """Numbers of rows, rising, of which each row's product with ``[d, m]`` has the same bits at any place."""
    row, matrix = _random(1, d), _random(m, d).mT if transposed else _random(d, m)
    found = {n: torch.mm(row.repeat(n, 1), matrix) for n in {*_BASE_ROWS, *_MORE_ROWS}}
    base = next(n for n in _BASE_ROWS if _is_alike(found[n], found[n][:1]))
    more = _MORE_ROWS if base == _BASE_ROWS[0] else ()
    return tuple(sorted({base, *(n for n in more if _is_alike(found[n], found[base][:1]))}))


@cache
def _splits(n: int, sizes: tuple[int, ...]) -> list[int]:
    """``n`` rows, a multiple of the least of ``sizes``, as tiles of these sizes, each a multiple of the next."""
    splits = []
    for size in reversed(sizes):
        splits += [size] * (n // size)
        n %= size
    return splits


@cache
def _exp_elements() -> int:
    values = _random(64)
    return next(n for n in _ELEMENTS if all(_is_alike(y := torch.exp(v.repeat(n)), y[:1]) for v in values))
