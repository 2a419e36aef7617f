"""The tensors of one engine step, named and shaped as TensorRT-LLM's executor feeds them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np

PREFILL, DECODE = 0, 1
#: TensorRT-LLM marks a block of its secondary (host) pool in this bit of an offset.
SECONDARY_POOL_BIT = 1 << 31


@dataclass(eq=False, slots=True)
class StepSequence:
    """What one sequence computes in a step.

    Attributes
    ----------
    token_ids : sequence of int
        The tokens to compute: a prefill's chunk, or a decode's one token.
    start : int
        Position of the first of them: the number of tokens already in the cache.
    prompt_len : int
        Length of the sequence's prompt.
    kind : int
        :data:`PREFILL` or :data:`DECODE`.
    block_table : sequence of int
        Blocks that hold the sequence, at least up to its last token of this step: its first block of each block table,
        then its second of each, and so on. Those that nothing reads any more may be anyone's. One and the same object
        from step to step has only grown.
    """

    token_ids: Sequence[int]
    start: int
    prompt_len: int
    kind: int
    block_table: Sequence[int]


class RowCopy(NamedTuple):
    """Rows to copy: the first ``rows`` of the keys and values of each layer and head of a block."""

    source: int
    target: int
    rows: int


class PoolLayout(NamedTuple):
    """How the pools' block offsets come from blocks.

    Attributes
    ----------
    num_layers : sequence of int
        Layers that a block has room for, of each pool.
    tables : sequence of int
        The block table of each pool; by default one is that of all.
    """

    num_layers: Sequence[int]
    tables: Sequence[int] = ()

    @property
    def num_tables(self) -> int:
        """Block tables of a sequence."""
        return 1 + max(self.tables, default=0)

    @property
    def first_pools(self) -> list[int]:
        """The first pool of each table."""
        return [self.tables.index(table) for table in range(self.num_tables)] if self.tables else [0]

    @property
    def per_block(self) -> np.ndarray:
        """Offsets of a block in each pool: int32 ``[num_pools]``."""
        return 2 * np.array(self.num_layers, dtype=np.int32)

    def entries(self, blocks: Iterable[int]) -> list[int]:
        """Entries of a sequence's block tables: of the pool's blocks so many in a row for each of these."""
        return [int(block) * self.num_tables + table for block in blocks for table in range(self.num_tables)]

    def offsets(self, blocks: np.ndarray) -> np.ndarray:
        """``kv_cache_block_offsets`` of the entries of block tables: int32 ``[B, blocks · num_tables]``."""
        by_pool = blocks[None]
        if self.num_tables > 1:
            by_pool = blocks.reshape(len(blocks), -1, self.num_tables).transpose(2, 0, 1)[list(self.tables)]
        offsets = np.empty((len(self.num_layers), len(blocks), 2, by_pool.shape[-1]), dtype=np.int32)
        np.multiply(by_pool, self.per_block[:, None, None], out=offsets[:, :, 0])
        np.add(offsets[:, :, 0], 1, out=offsets[:, :, 1])
        return offsets


@dataclass(frozen=True)
class StepInputs:
    """B sequences, prefills first, packed without padding. All arrays are int32.

    Attributes
    ----------
    input_ids, position_ids : ``[num_tokens]``
        A negative id stands for a token that is not known yet; see :class:`saw_trtllm.runtime.executor.Executor`.
    last_token_ids : ``[B]``
        Inclusive prefix sum of the tokens per sequence.
    sequence_length : ``[B]``
        KV length of each sequence with this step's tokens.
    context_lengths : ``[B]``
        Prefill: tokens of this chunk. Decode: the prompt's length.
    host_request_types : ``[B]``
        0 prefill, 1 decode.
    kv_cache_block_offsets : ``[num_pools, B, 2, max_blocks_per_seq]``
        ``block · num_layers · 2 + (0 K, 1 V)``, num_layers being those that a block of the pool has room for; entries
        beyond a sequence's blocks, and behind its window, are not read.
    copies : sequence of RowCopy
        To be made in this order, before the step.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    last_token_ids: np.ndarray
    sequence_length: np.ndarray
    context_lengths: np.ndarray
    host_request_types: np.ndarray
    kv_cache_block_offsets: np.ndarray
    copies: Sequence[RowCopy] = ()

    @classmethod
    def pack(cls, sequences: Sequence[StepSequence], *num_layers: int) -> StepInputs:
        """Pack a step's sequences, prefills first, for pools of so many layers each, and one block table."""
        return StepPacker(PoolLayout(num_layers)).pack(sequences)


class StepPacker:
    """Packs step after step. Of a block table that is in its old row only what is new is converted.

    Parameters
    ----------
    layout : PoolLayout
    """

    def __init__(self, layout: PoolLayout) -> None:
        self._layout = layout
        self._blocks = np.zeros((0, 0), dtype=np.int32)
        self._tables: list[Sequence[int]] = []
        self._known: list[int] = []  # how many entries of each are in its row

    def pack(self, sequences: Sequence[StepSequence], copies: Sequence[RowCopy] = ()) -> StepInputs:
        """Pack a step's sequences, prefills first, and what is to be copied before it."""
        counts = np.array([len(s.token_ids) for s in sequences], dtype=np.int32)
        starts = np.array([s.start for s in sequences], dtype=np.int32)
        kinds = np.array([s.kind for s in sequences], dtype=np.int32)
        prompts = np.array([s.prompt_len for s in sequences], dtype=np.int32)
        ends = np.cumsum(counts, dtype=np.int32)
        first = starts - (ends - counts)  # position of a sequence's token less its place in the step
        return StepInputs(
            input_ids=np.array(list(chain.from_iterable([s.token_ids for s in sequences])), dtype=np.int32),
            position_ids=np.arange(ends[-1], dtype=np.int32) + np.repeat(first, counts),
            last_token_ids=ends,
            sequence_length=starts + counts,
            context_lengths=np.where(kinds == PREFILL, counts, prompts),
            host_request_types=kinds,
            kv_cache_block_offsets=self._offsets([s.block_table for s in sequences]),
            copies=copies,
        )

    def _offsets(self, tables: list[Sequence[int]]) -> np.ndarray:
        count, widest = len(tables), max(map(len, tables))
        if count > len(self._blocks) or widest > self._blocks.shape[-1]:
            rows, width = max(count, len(self._blocks)), max(widest + 16, self._blocks.shape[-1])
            self._blocks = np.zeros((rows, width), dtype=np.int32)
            self._tables, self._known = [()] * rows, [0] * rows
        for i, table in enumerate(tables):
            if table is not self._tables[i]:
                self._tables[i], self._known[i] = table, 0
            if self._known[i] != len(table):
                self._blocks[i, self._known[i] : len(table)] = table[self._known[i] :]
                self._known[i] = len(table)
        return self._layout.offsets(self._blocks[:count, :widest])
