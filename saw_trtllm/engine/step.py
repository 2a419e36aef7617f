"""The tensors of one engine step, named and shaped as TensorRT-LLM's executor feeds them."""

from __future__ import annotations

from collections.abc import Sequence
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
        Blocks that hold the sequence, at least up to its last token of this step. One and the same object from step to
        step has only grown.
    """

    token_ids: Sequence[int]
    start: int
    prompt_len: int
    kind: int
    block_table: Sequence[int]


class RowCopy(NamedTuple):
    """Rows to copy within every pool: the first ``rows`` of each layer's and head's keys and values of a block."""

    source: int
    target: int
    rows: int


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
        ``block · num_layers · 2 + (0 K, 1 V)``, num_layers being those of the pool; entries beyond a sequence's blocks
        are not read. A block has the same index in every pool.
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
        """Pack a step's sequences, prefills first, for pools of so many layers each."""
        return StepPacker(num_layers).pack(sequences)


class StepPacker:
    """Packs step after step. Of a block table that is in its old row only what is new is converted.

    Parameters
    ----------
    num_layers : sequence of int
        Layers of each pool.
    """

    def __init__(self, num_layers: Sequence[int]) -> None:
        self._per_block = 2 * np.array(num_layers, dtype=np.int32)[:, None, None, None]
        self._blocks = np.zeros((0, 1, 0), dtype=np.int32)
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
            self._blocks = np.zeros((rows, 1, width), dtype=np.int32)
            self._tables, self._known = [()] * rows, [0] * rows
        for i, table in enumerate(tables):
            if table is not self._tables[i]:
                self._tables[i], self._known[i] = table, 0
            if self._known[i] != len(table):
                self._blocks[i, 0, self._known[i] : len(table)] = table[self._known[i] :]
                self._known[i] = len(table)
        offsets = np.empty((len(self._per_block), count, 2, widest), dtype=np.int32)
        np.multiply(self._blocks[:count, :, :widest], self._per_block, out=offsets)
        offsets[:, :, 1] += 1
        return offsets
