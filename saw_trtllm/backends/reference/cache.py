"""The paged pool and where a step's tokens lie in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from saw_trtllm.backends.reference.int4 import decode_rows, encode_rows
from saw_trtllm.engine.pools import Pool, regions_of
from saw_trtllm.engine.step import PREFILL, SECONDARY_POOL_BIT, RowCopy, StepInputs
from saw_trtllm.format import KVFormat

K, V = 0, 1
#: Keys that attention sums over at a time. A whole number of these, or of blocks, is read.
KEY_TILE = 64
#: Elements of keys that decodes read at a time, 2 MiB of fp32, and as many of values.
_DECODE_ELEMENTS = 1 << 19


class PagedPool:
    """``uint8 [num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, row_bytes]`` and its format.

    Where K's rows are longer than V's, it has another shape; see :mod:`saw_trtllm.format`.

    Parameters
    ----------
    kv_format : KVFormat
        What a row is.
    num_blocks, num_layers, num_kv_heads, tokens_per_block : int
        The pool's shape.

    Attributes
    ----------
    block_elements : int
        Numbers that a layer's keys in a block stand for.
    """

    def __init__(
        self, kv_format: KVFormat, num_blocks: int, num_layers: int, num_kv_heads: int, tokens_per_block: int
    ) -> None:
        self.format = kv_format
        self.tokens_per_block = tokens_per_block
        self.num_layers = num_layers
        self._num_kv_heads = num_kv_heads
        self.block_elements = num_kv_heads * tokens_per_block * kv_format.head_dim
        # Not zeroed: a large pool costs memory only where it is written, and nobody may read what was not.
        shape = kv_format.pool_shape(num_blocks, num_layers, num_kv_heads, tokens_per_block)
        self.data = torch.empty(shape, dtype=torch.uint8)

    def rows(self, which: int) -> torch.Tensor:
        """A view of all rows of K (0) or V (1): ``[num_blocks, num_layers, num_kv_heads, tokens_per_block, bytes]``."""
        count = self._num_kv_heads * self.tokens_per_block
        sizes = [count * self.format.k_row_bytes, count * self.format.row_bytes]
        return (
            self.data.flatten(2)
            .split(sizes, -1)[which]
            .unflatten(-1, (-1, self.tokens_per_block, sizes[which] // count))
        )

    @property
    def _parts(self) -> list[torch.Tensor]:
        """All rows: in one view, K's heads before V's, or in one of K's and one of V's where they have two sizes.

        Most calls take as long for a token's keys as for its keys and values.
        """
        one_size = self.format.k_row_bytes == self.format.row_bytes
        return [self.data.flatten(2, 3)] if one_size else [self.rows(K), self.rows(V)]

    def _wide(self, part: torch.Tensor) -> bool:
        return part.shape[-1] != self.format.row_bytes

    def write(
        self, layer: int, blocks: torch.Tensor, offsets: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Encode and store rotated rows.

        Parameters
        ----------
        layer : int
        blocks, offsets : torch.Tensor
            int64 ``[n]``: block and row within the block of each token.
        keys, values : torch.Tensor
            float ``[n, num_kv_heads, head_dim]``.
        """
        parts = self._parts
        rows = [keys, values] if len(parts) == 2 else [torch.cat([keys, values], dim=1)]
        for part, y in zip(parts, rows, strict=True):
            part[blocks, layer, :, offsets] = encode_rows(y, self.format, wide=self._wide(part))

    def read(
        self, layer: int, blocks: torch.Tensor, used: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Dequantize whole blocks.

        Parameters
        ----------
        layer : int
        blocks : torch.Tensor
            int64 ``[m, n]``.
        used : torch.Tensor, optional
            int32 ``[m, n · tokens_per_block]``: 1 for the rows that are in use. The others, which may hold anything,
            NaN too, come as zeros.

        Returns
        -------
        tuple of torch.Tensor
            Keys and values, each fp32 ``[m, num_kv_heads, n · tokens_per_block, head_dim]``, contiguous.
        """
        parts, found = self._parts, list[torch.Tensor]()
        in_use = None if used is None else used[:, None]
        for part in parts:
            # index_select takes a tenth of the time of an advanced index.
            rows = part[:, layer].index_select(0, blocks.flatten())
            rows = rows.view(*blocks.shape, 2 // len(parts), -1, *rows.shape[2:])
            # One block's rows would be a view in the pool's order, and products take matrices by their layout.
            rows = rows.permute(2, 0, 3, 1, 4, 5).flatten(3, 4).contiguous()
            found += decode_rows(rows, self.format, wide=self._wide(part), used=in_use).unbind()
        keys, values = found
        return keys, values


class PagedCache:
    """The pools of an engine.

    Parameters
    ----------
    pools : sequence of Pool
    num_blocks, num_kv_heads, tokens_per_block : int
        Every pool's shape.

    Attributes
    ----------
    pools : list of PagedPool
        One for each region of memory.
    """

    def __init__(
        self,
        pools: Sequence[Pool],
        num_blocks: int,
        num_kv_heads: int,
        tokens_per_block: int,
    ) -> None:
        self.pools = [
            PagedPool(region.format, num_blocks, region.num_layers, num_kv_heads, tokens_per_block)
            for region in regions_of(pools)
        ]
        self._tables = [pool.table for pool in pools]
        self._places = {
            layer: (self.pools[pool.region], i, pool.table) for pool in pools for i, layer in enumerate(pool.layers)
        }
        self._regions = [pool.region for pool in pools]

    def copy(self, copies: Sequence[RowCopy]) -> None:
        """Copy rows from block to block, in this order."""
        for pool in self.pools:
            for source, target, rows in copies:
                for kind in (pool.rows(K), pool.rows(V)):
                    kind[target, ..., :rows, :] = kind[source, ..., :rows, :]

    def plans(self, step: StepInputs) -> list[StepPlan]:
        """A step's plan for each block table."""
        firsts = [self._tables.index(table) for table in range(max(self._tables) + 1)]
        return [StepPlan.make(step, self.pools[self._regions[first]], first) for first in firsts]

    def place(self, layer: int) -> tuple[PagedPool, int, int]:
        """The memory that holds a layer, the layer's index in it, and its block table."""
        return self._places[layer]


@dataclass(frozen=True)
class Prefill:
    """One prefill of a step: ``tokens`` of the packed step, after ``history`` tokens of the pool's ``blocks``."""

    tokens: slice
    history: int
    blocks: torch.Tensor


@dataclass(frozen=True)
class Decodes:
    """Decodes of a step that are attended to at a time.

    Attributes
    ----------
    tokens : slice
        Of the packed step.
    blocks : torch.Tensor
        int64 ``[m, n]``, n blocks being a whole number of key tiles.
    used : torch.Tensor
        int32 ``[m, n · tokens_per_block]``: 1 for the rows that the decode attends to.
    hidden : torch.Tensor
        The others, bool ``[m, 1, tiles, 1, KEY_TILE]``.
    """

    tokens: slice
    blocks: torch.Tensor
    used: torch.Tensor
    hidden: torch.Tensor


@dataclass(frozen=True)
class StepPlan:
    """Indices of a step, worked out once for all layers.

    Attributes
    ----------
    positions : torch.Tensor
        int64 ``[num_tokens]``, for RoPE.
    slots : torch.Tensor
        int64 ``[num_tokens]``: index of each token in its sequence's cache.
    write_blocks, write_offsets : torch.Tensor
        int64 ``[num_tokens]``: where each token's rows go.
    prefills : list of Prefill
    first_decode : int
        The first of the decodes' tokens, which come after the prefills'.
    decode_lengths : numpy.ndarray
        int64 ``[num_decodes]``: KV length with the current token.
    decode_blocks : numpy.ndarray
        int64 ``[num_decodes, n]``, n blocks being a whole number of key tiles.
    num_keys : int
        Of these blocks.
    group : int
        How many decodes are attended to at a time.
    angles : dict
        By the table of RoPE: what :func:`rope_angles` gives for the tokens.
    """

    positions: torch.Tensor
    slots: torch.Tensor
    write_blocks: torch.Tensor
    write_offsets: torch.Tensor
    prefills: list[Prefill]
    first_decode: int
    decode_lengths: np.ndarray
    decode_blocks: np.ndarray
    num_keys: int
    group: int
    angles: dict[torch.Tensor, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    _decodes: dict[int | None, list[Decodes]] = field(default_factory=dict)

    @classmethod
    def make(cls, step: StepInputs, pool: PagedPool, index: int = 0) -> StepPlan:
        """Resolve block offsets and lengths of ``step`` against its pool of an index; its table is that of others."""
        tokens_per_block = pool.tokens_per_block
        ends, lengths = step.last_token_ids.astype(np.int64), step.sequence_length.astype(np.int64)
        counts = np.diff(ends, prepend=0)
        offsets = step.kv_cache_block_offsets[index, :, K].astype(np.int64) & (SECONDARY_POOL_BIT - 1)
        table = offsets // (2 * pool.num_layers)

        sequence = np.repeat(np.arange(len(counts)), counts)
        slots = np.arange(len(step.input_ids)) - (ends - lengths)[sequence]
        prefills = []
        num_prefills = int((step.host_request_types == PREFILL).sum())
        for i in range(num_prefills):
            history = int(lengths[i] - counts[i])
            used = torch.from_numpy(table[i, : -(-history // tokens_per_block)])
            prefills.append(Prefill(slice(int(ends[i] - counts[i]), int(ends[i])), history, used))
        decode_lengths = lengths[num_prefills:]
        num_blocks = -(-int(decode_lengths.max(initial=0)) // max(tokens_per_block, KEY_TILE))
        num_blocks *= max(1, KEY_TILE // tokens_per_block)
        # Entries after a sequence's own blocks may hold anything: its last block stands in for them.
        last = (decode_lengths - 1) // tokens_per_block
        column = np.minimum(np.arange(num_blocks), last[:, None])
        return cls(
            positions=torch.from_numpy(step.position_ids.astype(np.int64)),
            slots=torch.from_numpy(slots),
            write_blocks=torch.from_numpy(table[sequence, slots // tokens_per_block]),
            write_offsets=torch.from_numpy(slots % tokens_per_block),
            prefills=prefills,
            first_decode=int(ends[num_prefills - 1]) if num_prefills else 0,
            decode_lengths=decode_lengths,
            decode_blocks=np.take_along_axis(table[num_prefills:], column, axis=1),
            num_keys=num_blocks * tokens_per_block,
            group=_fitting(num_blocks * pool.block_elements),
        )

    def decodes(self, window: int | None) -> list[Decodes]:
        """The decodes, for layers of a window: the keys that a query sees, its own among them."""
        if window not in self._decodes:
            self._decodes[window] = self._grouped(window) if len(self.decode_lengths) else []
        return self._decodes[window]

    def _grouped(self, window: int | None) -> list[Decodes]:
        place, lengths = np.arange(self.num_keys), self.decode_lengths[:, None]
        used = place < lengths
        if window is not None:
            used &= place >= lengths - window
        tokens = range(self.first_decode, self.first_decode + len(used))
        hidden = torch.from_numpy(~used).view(len(used), 1, -1, 1, KEY_TILE)
        whole = torch.from_numpy(self.decode_blocks), torch.from_numpy(used.astype(np.int32)), hidden
        groups = zip(tokens[:: self.group], *(x.split(self.group) for x in whole), strict=True)
        return [Decodes(slice(start, start + len(blocks)), blocks, *masks) for start, blocks, *masks in groups]


def _fitting(elements: int) -> int:
    """So many decodes at a time that calls are not too short and that what they read stays in a cache.

    Their number is a power of two, so that few calls make all of their products.
    """
    fitting = max(1, _DECODE_ELEMENTS // max(1, elements))
    return 1 << (fitting.bit_length() - 1)
