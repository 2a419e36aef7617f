"""An executor of an engine of several ranks: the first in this process, which times it, the others beside it."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.engine.processes import SECONDS, start_ranks
from saw_trtllm.backends.tensorrt.executor import TensorRTExecutor
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.engine.step import StepInputs
from saw_trtllm.runtime.collectives import Collectives
from saw_trtllm.runtime.kv_cache_config import KvCacheConfig


class RankedExecutor:
    """Rank 0 of an engine, whose calls the other ranks make too.

    Parameters
    ----------
    folder : Path
    config : EngineConfig

    Attributes
    ----------
    num_blocks, stream : int
    memory : MemoryPlan
        Of rank 0.
    """

    def __init__(self, folder: Path, config: EngineConfig) -> None:
        pipes = [multiprocessing.Pipe() for _ in range(1, config.tp_size)]
        self._others = [ours for ours, _ in pipes]
        arguments = [(folder, theirs) for _, theirs in pipes]
        self._collectives, self._processes = start_ranks(config.tp_size, _follow, arguments)
        self._executor = _open(folder, config, self._collectives)
        self.num_blocks, self.stream = self._executor.num_blocks, self._executor.stream
        self.memory = self._executor.memory

    def launch(self, *step: Any) -> Any:
        """Begin a step on all ranks."""
        self._tell("launch", step)
        return self._executor.launch(*step)

    def profile(self, step: StepInputs) -> list[tuple[str, float]]:
        """Times of rank 0's layers; a sum between ranks waits for all of them."""
        self._tell("profile", (step,))
        return self._executor.profile(step)

    def close(self) -> None:
        """End all ranks."""
        self._tell("shutdown", ())
        self._executor.shutdown()
        self._collectives.close()
        for process in self._processes:
            process.join(SECONDS)
            process.kill()

    def _tell(self, call: str, arguments: Sequence[Any]) -> None:
        for other in self._others:
            other.send((call, arguments))


def _open(folder: Path, config: EngineConfig, collectives: Collectives) -> TensorRTExecutor:
    return TensorRTExecutor(folder, config, None, KvCacheConfig.free_gpu_memory_fraction, collectives=collectives)


def _follow(collectives: Collectives, folder: Path, calls: Connection) -> None:
    """Another rank's process: it makes the calls that it is told of until the first has ended."""
    executor = _open(folder, EngineConfig.load(folder), collectives)
    with contextlib.suppress(EOFError):
        while True:
            call, arguments = calls.recv()
            getattr(executor, call)(*arguments)  # a result that nobody takes is dropped at the second launch after it
            if call == "shutdown":
                return
