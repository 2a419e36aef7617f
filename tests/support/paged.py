"""Steps and pools for the GPU tests: shuffled blocks, poison where nobody may read, canaries where nobody may write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from saw_trtllm.backends.reference.int4 import decode_rows, encode_rows
from saw_trtllm.format import KVFormat

NUM_LAYERS, LAYER = 3, 1
K, V = 0, 1
SECONDARY_BIT = -(1 << 31)
#: Beyond any pool, with and without bit 31.
POISON_ENTRIES = (0x7FFFFFFF, -1)


@dataclass(frozen=True)
class Table:
    """Blocks of a step's sequences.

    Attributes
    ----------
    offsets : torch.Tensor
        int32 ``[num_sequences, 2, max_blocks]`` as the kernels take it, poisoned beyond each sequence's blocks.
    blocks : torch.Tensor
        int64 ``[num_sequences, max_blocks]``: the block behind each entry, 0 for the poisoned.
    num_blocks : int
        Of the pool: every second one belongs to nobody.
    """

    offsets: torch.Tensor
    blocks: torch.Tensor
    num_blocks: int

    @classmethod
    def make(cls, lengths: Sequence[int], tokens_per_block: int, rng: torch.Generator) -> Table:
        used = [-(-n // tokens_per_block) for n in lengths]
        num_blocks = 2 * sum(used) + 2
        order = torch.randperm(num_blocks, generator=rng)
        shape = len(lengths), max(used) + 2
        blocks = torch.zeros(shape, dtype=torch.int64)
        poison = torch.tensor(POISON_ENTRIES, dtype=torch.int32)
        offsets = poison[torch.randint(len(poison), (shape[0], 2, shape[1]), generator=rng)]
        first = 0
        for s, n in enumerate(used):
            mine = order[first : first + n]
            first += n
            blocks[s, :n] = mine
            bit = torch.randint(2, (n,), generator=rng, dtype=torch.int32) * SECONDARY_BIT
            for which in (K, V):
                offsets[s, which, :n] = (mine * NUM_LAYERS * 2 + which).int() | bit
        return cls(offsets, blocks, num_blocks)


def random_pool(kv_format: KVFormat, num_blocks: int, num_kv_heads: int, tokens_per_block: int, rng: torch.Generator):
    """Random bytes: whatever a kernel does not write must stay what it is."""
    shape = kv_format.pool_shape(num_blocks, NUM_LAYERS, num_kv_heads, tokens_per_block)
    return torch.randint(256, shape, generator=rng, dtype=torch.uint8)


def rows_of(pool: torch.Tensor, kv_format: KVFormat, which: int) -> torch.Tensor:
    """A view of all rows of K or of V: ``[num_blocks, NUM_LAYERS, num_kv_heads, tokens_per_block, bytes]``."""
    num_kv_heads, tokens_per_block = pool.shape[-3:-1]
    sizes = [num_kv_heads * tokens_per_block * size for size in (kv_format.k_row_bytes, kv_format.row_bytes)]
    return pool.flatten(2).split(sizes, -1)[which].unflatten(-1, (num_kv_heads, tokens_per_block, -1))


def wide(kv_format: KVFormat, which: int) -> bool:
    """Whether codes of K or of V have 8 bits."""
    return which == K and kv_format.k_row_bytes != kv_format.row_bytes


def poison(rows: torch.Tensor) -> None:
    """Make rows ``[..., n, bytes]`` such as decode to NaN, infinity or huge numbers."""
    rows[:] = 0xFF  # as float16 and as bfloat16, and as scale and lo: NaN
    rows[..., ::3, -3] = 0x7B  # scale and lo near 65504, or an element near it
    rows[..., 1::3, -3:] = torch.tensor([0x7C, 0x00, 0xFC], dtype=torch.uint8)  # scale inf, lo -inf


def poisoned_before(pool: torch.Tensor, table: Table, firsts: Sequence[int], kv_format: KVFormat) -> torch.Tensor:
    """A copy of a pool whose rows before the first one that each sequence still sees are another's: poison."""
    result = pool.cpu().clone()
    tokens_per_block = pool.shape[-2]
    for s, first in enumerate(firsts):
        position = torch.arange(max(first, 0))
        block, row = table.blocks[s, position // tokens_per_block], position % tokens_per_block
        for which in (K, V):
            rows = rows_of(result, kv_format, which)
            hidden = rows[block, LAYER, :, row].transpose(0, 1).contiguous()
            poison(hidden)
            rows[block, LAYER, :, row] = hidden.transpose(0, 1)
    return result.to(pool.device)


def poisoned_pool(
    kv_format: KVFormat, table: Table, lengths: Sequence[int], num_kv_heads: int, tokens_per_block: int, rng
) -> torch.Tensor:
    """Sequences of random rows in layer LAYER; every other row is poison."""
    shape = kv_format.pool_shape(table.num_blocks, NUM_LAYERS, num_kv_heads, tokens_per_block)
    pool = torch.empty(shape, dtype=torch.uint8)
    for which in (K, V):
        poison(rows_of(pool, kv_format, which))
    for s, length in enumerate(lengths):
        if length == 0:
            continue
        position = torch.arange(length)
        block, row = table.blocks[s, position // tokens_per_block], position % tokens_per_block
        for which in (K, V):
            spread = torch.rand(1, num_kv_heads, 1, generator=rng) * 2 + 0.25
            x = torch.randn(length, num_kv_heads, kv_format.head_dim, generator=rng) * spread + (which == K) * 0.5
            rows_of(pool, kv_format, which)[block, LAYER, :, row] = encode_rows(
                x, kv_format, wide=wide(kv_format, which)
            )
    return pool


def dense_rows(
    pool: torch.Tensor, table: Table, lengths: torch.Tensor, which: int, kv_format: KVFormat
) -> torch.Tensor:
    """Dequantized float64 ``[num_sequences, num_kv_heads, longest, head_dim]``, zeros beyond each length."""
    tokens_per_block = pool.shape[-2]
    longest = max(int(lengths.max()), 1)
    position = torch.arange(longest, device=pool.device)
    block = table.blocks.to(pool.device)[:, position // tokens_per_block]
    # [num_sequences, longest, num_kv_heads, bytes]
    rows = rows_of(pool, kv_format, which)[block, LAYER, :, position % tokens_per_block]
    unused = position >= lengths.to(pool.device)[:, None]
    rows = rows.masked_fill(unused[:, :, None, None], 0)
    return decode_rows(rows, kv_format, wide=wide(kv_format, which)).double().transpose(1, 2)
