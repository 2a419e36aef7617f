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

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F

#: Elements of an elementwise function's tiles. The first of them that treats all places alike says what the bits are.
_BASE_ELEMENTS = (2048, 256, 16, 1)
_MORE_ELEMENTS = tuple(1 << i for i in range(12, 18))
#: Bytes; of tiles' addresses.
ALIGNMENT = 64


def aligned(x: torch.Tensor) -> torch.Tensor:
    """``x``, contiguous and at a multiple of 64 bytes."""
    x = x.contiguous()
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()


def pad_rows(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """``x [..., n, d]`` with rows of zeros up to a multiple."""
    lacking = -x.shape[-2] % multiple
    return F.pad(x, (0, 0, 0, lacking)) if lacking else x


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
    for tile, target in zip(tiles(flat, sizes), tiles(out, sizes), strict=True):
        torch.exp(tile, out=target)
    return out[:n].view(x.shape)


def tanh(x: torch.Tensor) -> torch.Tensor:
    """Within a few roundings of 1, not of the result, of which a small one has fewer digits."""
    return 1 - 2 / (exp(2 * x) + 1)


def random_values(*shape: int) -> torch.Tensor:
    """Numbers that a call is probed with, the same each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def is_alike(y: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether all rows, or all elements, have the bits of the one expected."""
    return torch.equal(y, expected.expand_as(y))


def tiles(x: torch.Tensor, sizes: tuple[int, ...], dim: int = 0) -> Sequence[torch.Tensor]:
    """``x``, whose length along ``dim`` is a multiple of the least of ``sizes``, in tiles of these sizes."""
    n = x.shape[dim]
    return [x] if n in sizes else x.split_with_sizes(_splits(n, sizes), dim)


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
    values = random_values(64)

    def agree(n: int, base: int) -> bool:
        return all(is_alike(torch.exp(v.repeat(n)), torch.exp(v.repeat(base))[:1]) for v in values)

    base = next(n for n in _BASE_ELEMENTS if agree(n, n))
    return base, *(n for n in _MORE_ELEMENTS if base == _BASE_ELEMENTS[0] and agree(n, base))
