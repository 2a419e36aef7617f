"""All ranks of an engine in threads of this process, as one executor."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from saw_trtllm.backends.registry import open_executor
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.engine.step import StepInputs
from saw_trtllm.runtime.collectives import ALONE, Collectives, SocketCollectives
from saw_trtllm.runtime.executor import FinishedStep, StepOutput
from saw_trtllm.runtime.host_cache import CopiesMade
from saw_trtllm.runtime.kv_cache_config import KvCacheConfig
from saw_trtllm.runtime.sampling import SamplingState


def local_group(size: int) -> list[Collectives]:
    """A group within this process, for a thread each."""
    if size == 1:
        return [ALONE]
    pairs = [socket.socketpair() for _ in range(size - 1)]
    others: list[Collectives] = [SocketCollectives(i + 1, size, [theirs]) for i, (_, theirs) in enumerate(pairs)]
    return [SocketCollectives(0, size, [ours for ours, _ in pairs]), *others]


def on_ranks(group: Sequence[Collectives], work: Callable[[Collectives], Any]) -> list[Any]:
    """What ``work`` gives on each rank, all of them at once; if one fails, its exception, and nobody waits for it."""

    def guarded(ours: Collectives) -> Any:
        try:
            return work(ours)
        except BaseException:
            ours.abort()
            raise

    with ThreadPoolExecutor(len(group)) as pool:
        return list(pool.map(guarded, group))


class RankThreads:
    """An :class:`saw_trtllm.runtime.executor.Executor` that has one for each rank, and finds them of one mind."""

    asynchronous = False

    def __init__(self, folder: Path, config: EngineConfig, kv_cache: KvCacheConfig) -> None:
        self._group = local_group(config.tp_size)
        self.ranks = on_ranks(self._group, lambda ours: open_executor(folder, config, kv_cache, ours))
        (self.num_blocks,) = {executor.num_blocks for executor in self.ranks}
        (self.num_host_blocks,) = {executor.num_host_blocks for executor in self.ranks}

    def launch(
        self, step: StepInputs, sampling: Sequence[SamplingState | None] | None, context_logits: Sequence[bool]
    ) -> FinishedStep:
        """Run a step on all ranks."""

        def run(draws: Sequence[SamplingState | None]) -> StepOutput:
            outputs = on_ranks(
                self._group, lambda ours: self.ranks[ours.rank].launch(step, draws, context_logits).result()
            )
            for output in outputs[1:]:
                assert_same(output, outputs[0])
            return outputs[0]

        return FinishedStep(run, sampling)

    def transfer(self, *copies: Any) -> CopiesMade:
        """Copy blocks on all ranks."""
        for executor in self.ranks:
            executor.transfer(*copies)
        return CopiesMade()

    def shutdown(self) -> None:
        """Release all of them."""
        for executor in self.ranks:
            executor.shutdown()
        for ours in self._group:
            ours.close()


def assert_same(ours: StepOutput, theirs: StepOutput) -> None:
    """Bit for bit."""
    assert (ours.token_ids, ours.logprobs) == (theirs.token_ids, theirs.logprobs)
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        assert np.array_equal(a, b) if a is not None else b is None
