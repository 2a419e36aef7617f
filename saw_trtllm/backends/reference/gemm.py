"""Matrix products whose result for a row does not depend on the rows beside it (:mod:`invariant`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
import torch.nn.functional as F

from saw_trtllm.backends.reference.invariant import ALIGNMENT, aligned, is_alike, pad_rows, random_values, tiles
from saw_trtllm.backends.reference.threads import all_threads, thread_counts

#: Rows of the tiles of a product. The first of them that treats all places alike says what the bits are.
_BASE_ROWS = (16, 8, 4, 2, 1)
_MORE_ROWS = (4, 8, 32, 64, 128, 256, 512, 1024)
#: Products that one call makes, beside a single one.
_MORE_PRODUCTS = (2, 4, 8, 16, 32, 64)
#: Multiplications of a product that all threads share, 0.35 ms of one core.
_SHARED = 1 << 24
#: Elements that a probe compares, at least.
_PROBED = 512


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x · weightᵀ + bias``. On a GPU, which has other rules, it is PyTorch's own.

    Parameters
    ----------
    x : torch.Tensor
        fp32 ``[n, in]``.
    weight, bias : torch.Tensor
        fp32 ``[out, in]``, contiguous or the transpose of such, and ``[out]``, at multiples of 64 bytes.

    Returns
    -------
    torch.Tensor
        fp32 ``[n, out]``.
    """
    if not x.is_cpu:
        return F.linear(x, weight, bias)
    matrix, n = weight.mT, x.shape[0]
    sizes = _tile_rows(*matrix.shape, matrix.stride(-1) != 1, thread_counts(), _ceiling(n))
    x = pad_rows(x, sizes[0])
    padded = x.shape[0]
    if padded in sizes:
        out = _call(torch.mm, aligned(x), matrix)
    else:
        out = x.new_empty(padded, matrix.shape[1])
        for tile, target in zip(tiles(x, sizes), tiles(out, sizes), strict=True):
            _mm(aligned(tile), matrix, target)
    if padded != n:
        out = out[:n]
    return out if bias is None else out + bias


def least_rows(weight: torch.Tensor) -> int:
    """:func:`linear` adds rows to its input up to a multiple of so many."""
    matrix = weight.mT
    return _tile_rows(*matrix.shape, matrix.stride(-1) != 1, thread_counts(), _ceiling(1))[0]


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
    shape = d, m, matrices.stride(-1) != 1, thread_counts()
    n = x.shape[-2]
    sizes = _tile_rows(*shape, _ceiling(n))
    x, matrices = aligned(pad_rows(x, sizes[0])).view(math.prod(lead), -1, d), matrices.flatten(0, -3)
    out = x.new_empty(len(matrices), x.shape[1], m)
    for tile, target in zip(tiles(x, sizes, dim=1), tiles(out, sizes, dim=1), strict=True):
        counts = _batches(*shape, tile.shape[1])
        rows = tile.unsqueeze(1).expand(-1, t, -1, -1).flatten(0, 1)
        for part, matrix, result in zip(*(tiles(y, counts) for y in (rows, matrices, target)), strict=True):
            if len(part) == 1:
                _call(torch.mm, part[0], matrix[0], result[0])
            else:
                _call(torch.bmm, part, matrix, result)
    return out.view(*lead, t, -1, m)[..., :n, :]


def _mm(x: torch.Tensor, matrix: torch.Tensor, out: torch.Tensor) -> None:
    if out.data_ptr() % ALIGNMENT == 0:
        _call(torch.mm, x, matrix, out)
    else:
        out.copy_(_call(torch.mm, x, matrix))


def _call(
    product: Callable[..., torch.Tensor], x: torch.Tensor, matrix: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """``torch.mm`` or ``torch.bmm``, by as many threads as its shape gives it."""
    if x.shape[-2] * matrix.numel() < _SHARED:
        return product(x, matrix, out=out)
    with all_threads():
        return product(x, matrix, out=out)


def row_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over the last axis, which stays with a length of 1: the product with a column of ones."""
    return linear(x.reshape(-1, x.shape[-1]), _ones(x.shape[-1], x.device)).view(*x.shape[:-1], 1)


def _ceiling(n: int) -> int:
    """The least power of two, from 16 on, that is not below ``n``: longer tiles need not be probed."""
    return max(_BASE_ROWS[0], 1 << (n - 1).bit_length())


@cache
def _tile_rows(d: int, m: int, transposed: bool, threads: tuple[int, int], limit: int) -> tuple[int, ...]:
    """Numbers of rows, rising, of which each row's product with ``[d, m]`` has the same bits at any place.

    None but the first is above ``limit``.
    """
    base = next(n for n in _BASE_ROWS if all(is_alike(y, y[:1]) for y in _repeated(n, d, m, transposed)))
    more = [n for n in _MORE_ROWS if n <= limit] if base == _BASE_ROWS[0] else []
    return tuple(sorted({base, *(n for n in more if _has_the_bits_of(base, n, d, m, transposed, threads))}))


@cache
def _has_the_bits_of(base: int, n: int, d: int, m: int, transposed: bool, threads: tuple[int, int]) -> bool:
    """Whether each of ``n`` equal rows has the product that each of ``base`` has."""
    found, expected = _repeated(n, d, m, transposed), _repeated(base, d, m, transposed)
    return all(is_alike(y, due[:1]) for y, due in zip(found, expected, strict=True))


def _repeated(n: int, d: int, m: int, transposed: bool) -> Iterator[torch.Tensor]:
    """Products of ``n`` equal rows."""
    matrix = _matrices(1, d, m, transposed)[0]
    return (_call(torch.mm, row.repeat(n, 1), matrix) for row in _probes(d, m))


@cache
def _batches(d: int, m: int, transposed: bool, threads: tuple[int, int], rows: int) -> tuple[int, ...]:
    """Numbers of products of ``[rows, d]`` and ``[d, m]``, rising, that a single call gives with the bits of one."""
    probes, matrix = _probes(d, m), _matrices(1, d, m, transposed)[0]
    expected = [_call(torch.mm, row.repeat(rows, 1), matrix) for row in probes]

    def found(n: int) -> Iterator[torch.Tensor]:
        """Of whole tensors, and of tiles of longer ones."""
        matrices = _matrices(n, d, m, transposed)
        for row in probes:
            x, y = row.repeat(n, 2 * rows, 1), torch.empty(n, 2 * rows, m)
            _call(torch.bmm, x[:, rows:], matrices, y[:, rows:])
            y[:, :rows] = _call(torch.bmm, x[:, :rows].contiguous(), matrices)
            yield y.view(2 * n, rows, m)

    return 1, *(n for n in _MORE_PRODUCTS if all(map(is_alike, found(n), expected)))


def _probes(d: int, m: int) -> Sequence[torch.Tensor]:
    """Rows, whose products have hundreds of elements together: a few can agree by chance."""
    return random_values(-(-_PROBED // m), d).split(1)


def _matrices(count: int, d: int, m: int, transposed: bool) -> torch.Tensor:
    return random_values(m, d).repeat(count, 1, 1).mT if transposed else random_values(d, m).repeat(count, 1, 1)


@cache
def _ones(n: int, device: torch.device) -> torch.Tensor:
    return aligned(torch.ones(1, n, device=device))
