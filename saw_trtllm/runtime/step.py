"""The tensors of one engine step, named and shaped as TensorRT-LLM's executor feeds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

PREFILL, DECODE = 0, 1
#: TensorRT-LLM marks a block of its secondary (host) pool in this bit of an offset.
SECONDARY_POOL_BIT = 1 << 31


class StepSequence(NamedTuple):
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
        Blocks that hold the sequence, at least up to its last token of this step.
    """

    token_ids: Sequence[int]
    start: int
    prompt_len: int
    kind: int
    block_table: Sequence[int]


@dataclass(frozen=True)
class StepInputs:
    """B sequences, prefills first, packed without padding. All arrays are int32.

    Attributes
    ----------
    input_ids, position_ids : ``[num_tokens]``
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
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    last_token_ids: np.ndarray
    sequence_length: np.ndarray
    context_lengths: np.ndarray
    host_request_types: np.ndarray
    kv_cache_block_offsets: np.ndarray

    @classmethod
    def pack(cls, sequences: Sequence[StepSequence], *num_layers: int) -> StepInputs:
        """Pack a step's sequences, prefills first, for pools of so many layers each."""
        counts = np.array([len(s.token_ids) for s in sequences], dtype=np.int32)
        starts = np.array([s.start for s in sequences], dtype=np.int32)
        kinds = np.array([s.kind for s in sequences], dtype=np.int32)
        prompts = np.array([s.prompt_len for s in sequences], dtype=np.int32)
        widest = max(len(s.block_table) for s in sequences)
        offsets = np.zeros((len(num_layers), len(sequences), 2, widest), dtype=np.int32)
        per_block = 2 * np.array(num_layers, dtype=np.int32)[:, None]
        for i, s in enumerate(sequences):
            first = np.asarray(s.block_table, dtype=np.int32) * per_block
            offsets[:, i, 0, : len(s.block_table)] = first
            offsets[:, i, 1, : len(s.block_table)] = first + 1
        return cls(
            input_ids=np.concatenate([np.asarray(s.token_ids, dtype=np.int32) for s in sequences]),
            position_ids=np.concatenate(
                [np.arange(s.start, s.start + len(s.token_ids), dtype=np.int32) for s in sequences]
            ),
            last_token_ids=np.cumsum(counts, dtype=np.int32),
            sequence_length=starts + counts,
            context_lengths=np.where(kinds == PREFILL, counts, prompts).astype(np.int32),
            host_request_types=kinds,
            kv_cache_block_offsets=offsets,
        )
