"""The runtime's executor over a group of ranks, which it starts anew when one of them is lost."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.engine.step import StepInputs
from saw_trtllm.errors import EngineError, RankError
from saw_trtllm.parallel.config import ParallelConfig
from saw_trtllm.parallel.group import Launch, RankGroup
from saw_trtllm.runtime.executor import StepOutput
from saw_trtllm.runtime.host_cache import BlockCopy
from saw_trtllm.runtime.kv_cache_config import KvCacheConfig
from saw_trtllm.runtime.sampling import SamplingState

log = logging.getLogger(__name__)

NO_DISK = "disk_cache_dir is for engines of one rank, and this one is split over several: leave it out"


class GroupExecutor:
    """Leads the ranks of a tensor parallel engine; see :class:`saw_trtllm.runtime.executor.Executor`.

    When a rank is lost, whoever calls next gets a :class:`RankError`, once: all that was in flight and all that the
    pools held is lost. Meanwhile the group starts anew, in a thread, and the next launch waits for it.

    Parameters
    ----------
    folder : Path
        The engine folder.
    config : EngineConfig
    kv_cache : KvCacheConfig
    launch : callable
        Finds room for the ranks; see :data:`saw_trtllm.parallel.group.Launch`.
    options : ParallelConfig

    Raises
    ------
    SawError
        If the ranks do not start.
    """

    def __init__(
        self, folder: Path, config: EngineConfig, kv_cache: KvCacheConfig, launch: Launch, options: ParallelConfig
    ) -> None:
        self._folder, self._config, self._launch, self._options = folder, config, launch, options
        self._changed = threading.Condition()
        self._group: RankGroup | None = None
        self._unreported: RankError | None = None  # a loss that no caller knows of
        self._failure: Exception | None = None  # what the last start failed with
        self._starting: threading.Thread | None = None
        self._closed = False
        self._ended = threading.Event()  # nobody waits for a start any more
        self._kv_cache = kv_cache
        group = RankGroup(folder, config, kv_cache, launch, options, self._ended)
        self.num_blocks, self.num_host_blocks = _least(group)
        self.asynchronous = all(opened.asynchronous for opened in group.opened)
        if kv_cache.max_tokens is None:
            # The same number when it starts anew, whatever the memory then looks like: both directions round down.
            self._kv_cache = replace(kv_cache, max_tokens=config.tokens_of_blocks(self.num_blocks) + 1)
        self._take_over(group)

    def launch(
        self, step: StepInputs, sampling: Sequence[SamplingState | None] | None, context_logits: Sequence[bool]
    ) -> PendingGroupStep:
        """Have all ranks launch a step, once they are there.

        Raises
        ------
        RankError
            If a rank has been lost.
        EngineError
            If the group could not be started again; the next launch tries it once more.
        """
        group = self._await_group()
        try:
            group.launch(step, sampling, context_logits)
        except RankError as e:
            raise self.lose(group, e) from e
        return PendingGroupStep(self, group)

    def transfer(self, stores: Sequence[BlockCopy], loads: Sequence[BlockCopy]) -> PendingGroupTransfer:
        """Have all ranks copy blocks."""
        group = self._await_group()
        try:
            return PendingGroupTransfer(self, group, group.transfer(stores, loads))
        except RankError as e:
            raise self.lose(group, e) from e

    @property
    def num_ready_host_blocks(self) -> int:
        """Places for blocks on the host that are ready on all ranks; none while they start anew."""
        group = self._group
        return 0 if group is None else group.num_ready_host_blocks

    @property
    def pids(self) -> list[int]:
        """The processes of the ranks; none while they start anew."""
        group = self._group
        return [] if group is None else [opened.pid for opened in group.opened]

    def host_block(self, slot: int) -> np.ndarray:
        """No rank's blocks are whole.

        Raises
        ------
        EngineError
        """
        raise EngineError(NO_DISK)

    def interrupt(self) -> None:
        """From any thread, before :meth:`shutdown`: end a start of the ranks, and who waits for it.

        Ranks that are there are let finish what they do.
        """
        with self._changed:
            self._closed = True
            if self._group is None:
                self._ended.set()
            self._changed.notify_all()

    def shutdown(self) -> None:
        """End the ranks."""
        self.interrupt()
        with self._changed:
            group, self._group = self._group, None
        if group is not None:
            group.close()
        if self._starting is not None:
            self._starting.join()

    def lose(self, group: RankGroup, error: RankError, reported: bool = True) -> RankError:
        """Begin to start a group anew, of which a call has failed, and give what is to be raised."""
        error = RankError(f"the group of {self._config.tp_size} ranks was lost ({error}) and starts anew")
        with self._changed:
            if group is self._group and not self._closed:
                log.error("%s", error)
                self._group, self._unreported = None, error
                self._start(group)
            if reported:
                self._unreported = None
        return error

    def _take_over(self, group: RankGroup) -> None:
        """Lead a group that has just started."""
        with self._changed:
            self._failure = None
            closed = self._closed
            self._group = None if closed else group
            self._changed.notify_all()
        if closed:
            group.close()
        else:
            group.watch(lambda error: self.lose(group, error, reported=False))

    def _await_group(self) -> RankGroup:
        with self._changed:
            if self._unreported is not None:
                error, self._unreported = self._unreported, None
                raise error
            self._changed.wait_for(lambda: self._group is not None or self._failure is not None or self._closed)
            if self._group is not None:
                return self._group
            if self._closed:
                raise RankError("the runtime is being shut down")
            failure, self._failure = self._failure, None
            self._start(None)
            raise EngineError(
                f"the ranks could not be started again ({failure}), which is tried once more"
            ) from failure

    def _start(self, lost: RankGroup | None) -> None:
        self._starting = threading.Thread(target=self._run, args=(lost,), name="saw-restart", daemon=True)
        self._starting.start()

    def _run(self, lost: RankGroup | None) -> None:
        try:
            if lost is not None:
                lost.abort()
            group = RankGroup(self._folder, self._config, self._kv_cache, self._launch, self._options, self._ended)
            blocks, host_blocks = _least(group)
            if blocks < self.num_blocks or host_blocks < self.num_host_blocks:
                group.close()
                raise EngineError(f"there is memory for {blocks} blocks of {self.num_blocks}")
        except Exception as e:
            if not self._ended.is_set():
                log.error("the ranks could not be started again: %s", e)
            with self._changed:
                self._failure = e
                self._changed.notify_all()
            return
        log.info("the group of %d ranks is back", self._config.tp_size)
        self._take_over(group)


def _least(group: RankGroup) -> tuple[int, int]:
    """Blocks that all ranks have, of the pool and of the host."""
    return min(o.num_blocks for o in group.opened), min(o.num_host_blocks for o in group.opened)


@dataclass(frozen=True)
class PendingGroupStep:
    """A step that all ranks have been told to launch; see :class:`saw_trtllm.runtime.executor.PendingStep`."""

    executor: GroupExecutor
    group: RankGroup

    def draw(self, sampling: Sequence[SamplingState | None]) -> None:
        """Tell all ranks.

        Raises
        ------
        RankError
            If one of them has been lost.
        """
        try:
            self.group.draw(sampling)
        except RankError as e:
            raise self.executor.lose(self.group, e) from e

    def result(self) -> StepOutput:
        """Wait for all ranks, and give what rank 0 computed.

        Raises
        ------
        RankError
            If one of them has been lost.
        """
        try:
            return self.group.take()
        except RankError as e:
            raise self.executor.lose(self.group, e) from e


@dataclass(frozen=True)
class PendingGroupTransfer:
    """Copies that all ranks have begun; see :class:`saw_trtllm.runtime.host_cache.PendingTransfer`."""

    executor: GroupExecutor
    group: RankGroup
    number: int

    def done(self) -> bool:
        """Whether they are known to be made: the ranks say so with the results of steps."""
        return self.group.transferred(self.number)

    def wait(self) -> None:
        """Wait for them on all ranks."""
        try:
            self.group.wait_for_transfer(self.number)
        except RankError as e:
            raise self.executor.lose(self.group, e) from e
