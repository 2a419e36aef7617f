"""An executor whose cache holds tokens, and whose texts are a function of all that it reads there."""

from __future__ import annotations

import pickle
import sys
import zlib
from pathlib import Path

import numpy as np

from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.parallel import rank
from saw_trtllm.parallel.processes import LocalProcesses
from saw_trtllm.runtime.collectives import ALONE, Collectives
from saw_trtllm.runtime.executor import FinishedStep, StepOutput
from saw_trtllm.runtime.host_cache import CopiesMade
from saw_trtllm.runtime.kv_cache_config import KvCacheConfig


class RememberingExecutor:
    """Its steps take no time but that of the ranks to meet. A token of a wrong block changes all that come after it."""

    asynchronous = True

    def __init__(
        self, folder: Path, config: EngineConfig, kv_cache: KvCacheConfig, collectives: Collectives = ALONE
    ) -> None:
        self._size, self._vocab = config.build_config.tokens_per_block, config.pretrained_config.vocab_size
        self._per_block = 2 * len(config.pools[0].layers)
        self.num_blocks = (kv_cache.max_tokens or 4096) // self._size
        self.num_host_blocks = kv_cache.host_cache_size
        self.num_ready_host_blocks = self.num_host_blocks
        self._rows = np.full((self.num_blocks, self._size), -1, np.int32)
        self._host = np.full((self.num_host_blocks, self._size), -1, np.int32)
        self._drawn = np.empty(0, np.int32)
        self._collectives = collectives

    def launch(self, step, sampling, context_logits):
        for source, target, rows in step.copies:
            self._rows[target, :rows] = self._rows[source, :rows]
        ids = step.input_ids.copy()
        ids[ids < 0] = self._drawn[-1 - ids[ids < 0]]
        blocks = step.kv_cache_block_offsets[0, :, 0] // self._per_block
        return FinishedStep(lambda draws: self._run(step, ids, blocks, draws), sampling)

    def _run(self, step, ids, blocks, sampling):
        tokens, start = [], 0
        for i, (end, length, state) in enumerate(zip(step.last_token_ids, step.sequence_length, sampling, strict=True)):
            at = np.arange(length - (end - start), length)
            self._rows[blocks[i, at // self._size], at % self._size] = ids[start:end]
            every = np.arange(length)
            text = self._rows[blocks[i, every // self._size], every % self._size]
            assert (text >= 0).all(), "a row is read that nobody has written"
            tokens.append(-1 if state is None else next_token(text, state.params.seed or 0, self._vocab))
            start = end
        # All ranks must be there, and of one mind.
        drawn = np.array(tokens, np.int32)
        total = self._collectives.all_reduce(drawn)
        assert (total == drawn * self._collectives.size).all()
        self._drawn = drawn
        return StepOutput(tokens, [0.0] * len(tokens), [None] * len(tokens))

    def transfer(self, stores, loads):
        for block, slot in stores:
            self._host[slot] = self._rows[block]
        for block, slot in loads:
            self._rows[block] = self._host[slot]
        return CopiesMade()

    def shutdown(self):
        pass


def next_token(text: np.ndarray, seed: int, vocab: int) -> int:
    """The token after a text: a hash of it, none of the first few, which are special."""
    return 8 + zlib.crc32(text.astype(np.int32).tobytes(), seed) % (vocab - 8)


def expected_text(prompt: list[int], seed: int, count: int, vocab: int) -> list[int]:
    """What an executor without faults gives."""
    text = list(prompt)
    for _ in range(count):
        text.append(next_token(np.array(text), seed, vocab))
    return text[len(prompt) :]


class RememberingProcesses(LocalProcesses):
    """Ranks with such executors."""

    code = "from tests.support.executor.remembering import main; main()"


def main() -> None:
    """Be a rank."""
    rank.open_executor = RememberingExecutor
    rank.run_rank(pickle.load(sys.stdin.buffer))
