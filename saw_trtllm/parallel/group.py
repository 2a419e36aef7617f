"""A group of ranks: its start, its calls, its end."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.engine.step import StepInputs
from saw_trtllm.errors import RankError, SawError
from saw_trtllm.parallel.channel import Command, LeaderChannel
from saw_trtllm.parallel.codec import StepEncoder
from saw_trtllm.parallel.config import ParallelConfig
from saw_trtllm.parallel.rank import Opened, Opening, RankSpec, Taken
from saw_trtllm.plan.ranks import build_id, check_build
from saw_trtllm.runtime.executor import StepOutput
from saw_trtllm.runtime.host_cache import BlockCopy
from saw_trtllm.runtime.kv_cache_config import KvCacheConfig
from saw_trtllm.runtime.sampling import SamplingState

#: Seconds after which whoever waits for ranks looks whether they are still wanted.
_PATIENCE = 0.2
#: Seconds that the ranks have to end by themselves.
_LEAVING_TIME = 10.0


class RankProcesses(Protocol):
    """The processes of a group, for which there is room.

    Attributes
    ----------
    host : str or None
        The leader's address in their network; None where all of them are on its machine.
    """

    host: str | None

    def start(self, specs: Sequence[RankSpec]) -> None:
        """Start a process for each rank, which calls :func:`saw_trtllm.parallel.rank.run_rank`."""
        ...

    def failure(self) -> str | None:
        """What became of a process that has ended, in words."""
        ...

    def end(self) -> None:
        """End all of them, whatever they do, and wait for it."""
        ...


#: Finds room for so many ranks, unless the event comes first.
Launch = Callable[[int, threading.Event], RankProcesses]


class RankGroup:
    """The ranks of an engine, all of which make the same calls in the same order.

    One thread calls it. Once it has raised :class:`RankError` it is good for nothing but :meth:`abort`.

    Parameters
    ----------
    folder : Path
        The engine folder.
    config : EngineConfig
    kv_cache : KvCacheConfig
    launch : callable
        See :data:`Launch`.
    options : ParallelConfig
    ended : threading.Event
        Comes when nobody wants the group any more: its start then fails.

    Attributes
    ----------
    opened : list of Opened
        What each rank has.
    num_ready_host_blocks : int
        Places for blocks on the host that were ready on all ranks when the last step was taken.

    Raises
    ------
    SawError
        If a rank does not start, with its own words.
    """

    def __init__(
        self,
        folder: Path,
        config: EngineConfig,
        kv_cache: KvCacheConfig,
        launch: Launch,
        options: ParallelConfig,
        ended: threading.Event,
    ) -> None:
        self._size = size = config.tp_size
        self._options, self._ended = options, ended
        self._encoder = StepEncoder(config.pool_layout)
        self._lock = threading.RLock()
        self._num_transfers = self._num_transferred = 0
        self._watcher: threading.Thread | None = None
        self._woken, self._wake = Pipe(duplex=False)
        self._processes = launch(size, ended)
        try:
            self._channel = LeaderChannel(size, self._processes.host)
        except BaseException:
            self._processes.end()
            raise
        try:
            address = self._channel.address
            self._processes.start([RankSpec(rank, size, str(folder.absolute()), address) for rank in range(size)])
            deadline = time.monotonic() + options.start_timeout
            self._lives = self._gather(deadline)
            self.opened = self._open(config, kv_cache, deadline)
            self.num_ready_host_blocks = min(opened.num_ready_host_blocks for opened in self.opened)
        except BaseException:
            self.abort()
            raise

    def watch(self, on_lost: Callable[[RankError], object]) -> None:
        """Have ``on_lost`` called, from another thread, when the process of a rank ends."""

        def run() -> None:
            ended = wait([*self._lives, self._woken])
            if self._woken not in ended:
                on_lost(RankError(f"the process of rank {self._lives.index(ended[0])} has ended"))

        self._watcher = threading.Thread(target=run, name="saw-watchdog", daemon=True)
        self._watcher.start()

    def launch(
        self, step: StepInputs, sampling: Sequence[SamplingState | None] | None, context_logits: Sequence[bool]
    ) -> None:
        """Have a step launched; see :class:`saw_trtllm.runtime.executor.Executor`."""
        with self._lock:
            self._channel.send("launch", self._encoder.encode(step, sampling, context_logits))

    def draw(self, sampling: Sequence[SamplingState | None]) -> None:
        """Say how the tokens of the step are chosen that was launched last."""
        with self._lock:
            self._channel.send("draw", self._encoder.encode_draws(sampling))

    def take(self) -> StepOutput:
        """The result of the oldest step that it was not taken of."""
        with self._lock:
            answers: list[Taken] = self._ask("take")
        output = answers[0].output
        for rank, answer in enumerate(answers):
            if answer.output.token_ids != output.token_ids:
                raise RankError(f"rank {rank} is out of step: it drew other tokens than rank 0")
        self._num_transferred = min(answer.num_transferred for answer in answers)
        self.num_ready_host_blocks = min(answer.num_ready_host_blocks for answer in answers)
        return output

    def transfer(self, stores: Sequence[BlockCopy], loads: Sequence[BlockCopy]) -> int:
        """Have copies begun, and give their number."""
        with self._lock:
            self._channel.send("transfer", pickle.dumps((list(stores), list(loads)), 5))
        self._num_transfers += 1
        return self._num_transfers

    def transferred(self, number: int) -> bool:
        """Whether the copies of a number are known to be made on all ranks."""
        return number <= self._num_transferred

    def wait_for_transfer(self, number: int) -> None:
        """Wait until they are."""
        if not self.transferred(number):
            with self._lock:
                self._num_transferred = min(self._ask("wait", pickle.dumps(number)))

    def close(self) -> None:
        """Have the ranks end."""
        with self._lock, suppress(RankError):
            self._channel.send("close")
            left, deadline = list(self._lives), time.monotonic() + _LEAVING_TIME
            while left and (remaining := deadline - time.monotonic()) > 0:
                ended = wait(left, remaining)
                left = [life for life in left if life not in ended]
        self.abort()

    def abort(self) -> None:
        """End the ranks, whatever they do. From any thread: a call that waits for them gets a RankError."""
        self._wake.send_bytes(b"")
        self._processes.end()
        if self._watcher not in (None, threading.current_thread()):
            self._watcher.join()
        with self._lock:
            self._channel.close()

    def _check_wanted(self) -> None:
        if self._ended.is_set():
            raise RankError("nobody waits for the ranks any more")

    def _gather(self, deadline: float) -> list[Any]:
        while not self._channel.accept(min(_PATIENCE, max(deadline - time.monotonic(), 0.001))):
            self._check_wanted()
            if failure := self._processes.failure():
                raise RankError(failure)
            if time.monotonic() > deadline:
                raise RankError(
                    f"not all of {self._size} ranks have come within {self._options.start_timeout:g} s: see their logs"
                )
        return self._channel.begin(self._options.step_timeout)

    def _open(self, config: EngineConfig, kv_cache: KvCacheConfig, deadline: float) -> list[Opened]:
        greetings, ours = self._collect(0, deadline), build_id(config)
        for rank, (theirs, _) in enumerate(greetings):
            check_build(rank, theirs, "the leader", ours)
        left = deadline - time.monotonic()
        verify = self._processes.host is not None
        opening = Opening(kv_cache, meeting=greetings[0][1], verify=verify, timeout=left)
        return self._collect(self._channel.send("open", pickle.dumps(opening)), deadline)

    def _ask(self, command: Command, body: bytes = b"") -> list[Any]:
        deadline = time.monotonic() + self._options.step_timeout
        try:
            return self._collect(self._channel.send(command, body), deadline)
        except RankError:
            raise
        except SawError as e:
            raise RankError(str(e)) from e

    def _collect(self, number: int, deadline: float) -> list[Any]:
        """What each rank answers to the message of a number."""
        answers: dict[int, Any] = {}
        while len(answers) < self._size:
            self._check_wanted()
            left = deadline - time.monotonic()
            if left <= 0:
                missing = ", ".join(str(rank) for rank in range(self._size) if rank not in answers)
                raise RankError(f"rank {missing} has not answered in time")
            for rank, answered, content in self._channel.receive(min(_PATIENCE, left)):
                if isinstance(content, SawError):
                    raise content
                if answered != number or rank in answers:
                    raise RankError(f"rank {rank} is out of step: it answers message {answered}, not {number}")
                answers[rank] = content
        return [answers[rank] for rank in range(self._size)]
