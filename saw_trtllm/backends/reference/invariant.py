"""Functions of rows whose result for a row does not depend on the rows beside it, down to the last bit.

Sampling follows the last bit, so a text would otherwise change with what else is in the batch. A BLAS sums a row's
products in an order that it chooses by the number of rows, by a row's place among them, by the operands' alignment and
by the number of threads; loops of elementwise functions and of reductions may do likewise. None of that is specified,
and each library does it in another way on each CPU, so nothing here rests on it:

- A matrix product is computed by calls of a few fixed shapes: tiles of contiguous rows at addresses that are multiples
  of 64 bytes, the last one filled up with zeros, of one product or of a few. How many rows there are, or how many
  products, never reaches the library. A shape is taken only after a probe of that very call, on random numbers, has
  given the bits of the first shape at each place in the tile and in the batch. Where no two shapes agree there is one;
  where a row's place matters, it is one row. A sum is the product with a column of ones.
- A transcendental function is computed by calls of a few sizes, probed in the same way.
- All else is addition, subtraction, multiplication, division, square root, comparison and conversion of single
  elements. IEEE 754 has each of them correctly rounded, so that a vector loop and its tail cannot differ.

What is left to the library is to give the same bits for the same call on the same numbers with the same number of
threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache

import torch
import torch.nn.functional as F

#: Rows of the tiles of a product. The first of them that treats all places alike says what the bits are.
_BASE_ROWS = (16, 8, 4, 2, 1)
_MORE_ROWS = (4, 8, 32, 64, 128, 256)
#: Products that one call makes, beside a single one.
_MORE_PRODUCTS = (4, 16, 64)
#: Elements of an elementwise function's tiles, chosen likewise.
_BASE_ELEMENTS = (2048, 256, 16, 1)
_MORE_ELEMENTS = tuple(1 << i for i in range(12, 18))
#: Elements that a probe compares, at least.
_PROBED = 512
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
    if len(x) in sizes:
        out = torch.mm(aligned(x), matrix)
    else:
        out = x.new_empty(len(x), len(weight))
        for tile, target in zip(_tiles(x, sizes), _tiles(out, sizes), strict=True):
            _mm(aligned(tile), matrix, target)
    return out[:n] if bias is None else out[:n] + bias


def products(x: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """The product of all rows with each of several matrices.

    Parameters
    ----------
    x : torch.Tensor
        fp32 ``[..., n, d]``.
    matrices : torch.Tensor
        fp32 ``[..., t, d, m]``, contiguous or of contiguous transposes, at a multiple of 64 bytes; d and m are
        multiples of 16, so that each row is at such an address too.

    Returns
    -------
    torch.Tensor
        fp32 ``[..., t, n, m]``.
    """
    *lead, t, d, m = matrices.shape
    shape = d, m, matrices.stride(-1) != 1, torch.get_num_threads()
    sizes, n = _tile_rows(*shape), x.shape[-2]
    x, matrices = aligned(pad_rows(x, sizes[0])).view(math.prod(lead), -1, d), matrices.flatten(0, -3)
    out = x.new_empty(len(matrices), x.shape[1], m)
    for tile, target in zip(_tiles(x, sizes, dim=1), _tiles(out, sizes, dim=1), strict=True):
        counts = _batches(*shape, tile.shape[1])
        rows = tile.unsqueeze(1).expand(-1, t, -1, -1).flatten(0, 1)
        for part, matrix, result in zip(*(_tiles(y, counts) for y in (rows, matrices, target)), strict=True):
            if len(part) == 1:
                torch.mm(part[0], matrix[0], out=result[0])
            else:
                torch.bmm(part, matrix, out=result)
    return out.view(*lead, t, -1, m)[..., :n, :]


def _mm(x: torch.Tensor, matrix: torch.Tensor, out: torch.Tensor) -> None:
    if out.data_ptr() % _ALIGNMENT == 0:
        torch.mm(x, matrix, out=out)
    else:
        out.copy_(torch.mm(x, matrix))


def exp(x: torch.Tensor) -> torch.Tensor:
    """Element by element."""
    if not x.is_cpu:
        return torch.exp(x)
    n, sizes = x.numel(), _exp_elements(torch.get_num_threads())
    flat = x.reshape(-1)
    flat = F.pad(flat, (0, -n % sizes[0])) if n % sizes[0] else aligned(flat)
    if len(flat) in sizes:
        return torch.exp(flat)[:n].view(x.shape)
    out = torch.empty_like(flat)
    for tile, target in zip(_tiles(flat, sizes), _tiles(out, sizes), strict=True):
        torch.exp(tile, out=target)
    return out[:n].view(x.shape)


def row_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over the last axis, which stays with a length of 1: the product with a column of ones."""
    return linear(x.reshape(-1, x.shape[-1]), _ones(x.shape[-1], x.device)).view(*x.shape[:-1], 1)


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
    rows, matrix = _probes(d, m), _matrices(1, d, m, transposed)[0]

    def found(n: int) -> list[torch.Tensor]:
        return [torch.mm(row.repeat(n, 1), matrix) for row in rows]

    base = next(n for n in _BASE_ROWS if all(_is_alike(y, y[:1]) for y in found(n)))
    expected = [y[:1] for y in found(base)]
    more = _MORE_ROWS if base == _BASE_ROWS[0] else ()
    return tuple(sorted({base, *(n for n in more if all(map(_is_alike, found(n), expected)))}))


@cache
def _batches(d: int, m: int, transposed: bool, num_threads: int, rows: int) -> tuple[int, ...]:
    """Numbers of products of ``[rows, d]`` and ``[d, m]``, rising, that a single call gives with the bits of one."""
    probes, matrix = _probes(d, m), _matrices(1, d, m, transposed)[0]
    expected = [torch.mm(row.repeat(rows, 1), matrix) for row in probes]

    def found(n: int) -> Iterator[torch.Tensor]:
        """Of whole tensors, and of tiles of longer ones."""
        matrices = _matrices(n, d, m, transposed)
        for row in probes:
            x, y = row.repeat(n, 2 * rows, 1), torch.empty(n, 2 * rows, m)
            torch.bmm(x[:, rows:], matrices, out=y[:, rows:])
            y[:, :rows] = torch.bmm(x[:, :rows].contiguous(), matrices)
            yield y.view(2 * n, rows, m)

    return 1, *(n for n in _MORE_PRODUCTS if all(map(_is_alike, found(n), expected)))


def _probes(d: int, m: int) -> Sequence[torch.Tensor]:
    """Rows, whose products have hundreds of elements together: a few can agree by chance."""
    return _random(-(-_PROBED // m), d).split(1)


def _matrices(count: int, d: int, m: int, transposed: bool) -> torch.Tensor:
    return _random(m, d).repeat(count, 1, 1).mT if transposed else _random(d, m).repeat(count, 1, 1)


@cache
def _ones(n: int, device: torch.device) -> torch.Tensor:
    return aligned(torch.ones(1, n, device=device))


def _tiles(x: torch.Tensor, sizes: tuple[int, ...], dim: int = 0) -> Sequence[torch.Tensor]:
    """``x``, whose length along ``dim`` is a multiple of the least of ``sizes``, in tiles of these sizes."""
    n = x.shape[dim]
    return [x] if n in sizes else x.split(_splits(n, sizes), dim)


@cache
def _splits(n: int, sizes: tuple[int, ...]) -> list[int]:
    splits = []
    for size in reversed(sizes):
        splits += [size] * (n // size)
        n %= size
    return splits


@cache
def _exp_elements(num_threads: int) -> tuple[int, ...]:
    """Numbers of elements, rising, of which each has the same bits at any place."""
    values = _random(64)

    def is_alike(n: int, base: int) -> bool:
        return all(_is_alike(torch.exp(v.repeat(n)), torch.exp(v.repeat(base))[:1]) for v in values)

    base = next(n for n in _BASE_ELEMENTS if is_alike(n, n))
    return base, *(n for n in _MORE_ELEMENTS if base == _BASE_ELEMENTS[0] and is_alike(n, base))
