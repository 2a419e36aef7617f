"""The loop that drives an executor: schedule, launch, hand out tokens.

An asynchronous executor always has the next step before the result of the last one is taken: what the host does between
two steps, it does while one of them runs. Where a draw of the next step depends on a token of the last one, as with the
mask of a guided text, the next step's layers run meanwhile, and its draws follow once that token has been handed out.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from saw_trtllm.engine.step import PREFILL, StepPacker
from saw_trtllm.errors import EngineError, QueueFullError, RankError, SawError, ShutdownError
from saw_trtllm.runtime.executor import Executor, PendingStep, StepOutput
from saw_trtllm.runtime.generation_result import require_process
from saw_trtllm.runtime.guided_decoding import MaskThreads
from saw_trtllm.runtime.output_queue import whole_step
from saw_trtllm.runtime.request import Request
from saw_trtllm.runtime.sampling import SamplingState
from saw_trtllm.runtime.scheduler import Scheduler
from saw_trtllm.runtime.sequence import Scheduled
from saw_trtllm.runtime.stats import Stats

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Step:
    """A step in flight, and whose it is."""

    parts: list[Scheduled]
    pending: PendingStep
    draws_late: bool


class EngineCore:
    """A thread that runs the steps. All state of the scheduler lives in that thread.

    Parameters
    ----------
    executor : Executor
    scheduler : Scheduler
    packer : StepPacker
        For the engine's pools.
    max_queue_size : int
        Requests that may wait for their first step; 0 is any number.
    interrupt : callable, optional
        Called by whoever shuts down: it ends what the executor's calls wait for beyond their steps.
    """

    def __init__(
        self,
        executor: Executor,
        scheduler: Scheduler,
        packer: StepPacker,
        max_queue_size: int = 0,
        interrupt: Callable[[], object] | None = None,
    ) -> None:
        self._executor = executor
        self._interrupt = interrupt
        self._scheduler = scheduler
        self._packer = packer
        self._under_way: deque[_Step] = deque()
        self._masks = MaskThreads()
        self._guided: list[Request] = []  # whose masks are to be worked out
        self._requests: dict[int, Request] = {}
        self._max_queue_size = max_queue_size
        self._arrived: deque[Request] = deque()
        self._aborted: deque[int] = deque()
        lock = threading.RLock()  # a handle that is collected while its thread holds the lock may be an LLM's last
        self._changed = threading.Condition(lock)
        self._has_room = threading.Condition(lock)
        self._closing = False
        self._pid = os.getpid()
        self._stats = Stats()
        self._thread = threading.Thread(target=self._run, name="saw-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, wait: bool = False) -> None:
        """Queue a request whose size the scheduler has been asked about. Requests run in the order of these calls.

        Parameters
        ----------
        request : Request
        wait : bool
            Whether to wait while the queue is full.

        Raises
        ------
        QueueFullError
            If the queue is full.
        ShutdownError
            If the runtime has been shut down.
        EngineError
            In a forked child, which has no engine.
        """
        require_process(self._pid)  # before the lock, which the fork may have left taken
        with self._changed:
            if wait:
                self._has_room.wait_for(lambda: self._closing or not self._is_full)
            if self._closing:
                raise ShutdownError("the runtime has been shut down: make a new LLM")
            if self._is_full:
                raise QueueFullError(
                    f"{self._num_waiting} requests wait already, and max_queue_size is {self._max_queue_size}: send "
                    "this one again later, or raise max_queue_size"
                )
            self._arrived.append(request)
            self._changed.notify()

    def abort(self, request_id: int) -> None:
        """End a request; nothing happens if it has already ended.

        It takes no lock, so that the collector of garbage may call it at any point of any thread. Nor does it wake the
        engine's thread: while there is a request to end, that does not sleep.
        """
        self._aborted.append(request_id)

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return not self._closing

    def stats(self) -> Stats:
        """The gauges as they are now, and the counters."""
        blocks, host = self._scheduler.blocks, self._scheduler.host
        tier = {} if host is None else host.stats()
        return replace(
            self._stats,
            **tier,
            num_running=len(self._scheduler.running),
            num_waiting=self._num_waiting,
            used_blocks=blocks.num_blocks - blocks.num_free,
            free_blocks=blocks.num_free,
            max_blocks=blocks.num_blocks,
            tokens_per_block=blocks.tokens_per_block,
            evicted_blocks_total=blocks.num_evicted,
            preemptions_total=self._scheduler.num_preemptions,
        )

    def shutdown(self) -> None:
        """Cancel what runs, stop the thread, release the executor."""
        if os.getpid() != self._pid:  # all of them are the parent's
            return
        self._close()
        if self._interrupt is not None:
            self._interrupt()
        if threading.current_thread() is not self._thread:  # it may be the last that lets go of an LLM
            self._thread.join()

    def _close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
            self._has_room.notify_all()

    @property
    def _num_waiting(self) -> int:
        return len(self._scheduler.waiting) + len(self._arrived)

    @property
    def _is_full(self) -> bool:
        return 0 < self._max_queue_size <= self._num_waiting

    def _run(self) -> None:
        try:
            while self._goes_on():
                pass
            for request_id in list(self._requests):
                self._cancel(request_id)
            with contextlib.suppress(RankError):  # nothing is left to lose
                self._finish(steps_left=0)
                self._settle()
        except Exception as e:
            logger.exception("the runtime failed")
            self._close()
            # Nobody may wait forever, those who have just come neither.
            self._take_in()
            for request in self._requests.values():
                request.outputs.put(EngineError(f"the runtime failed ({e}): make a new LLM"))
            for step in self._under_way:
                with contextlib.suppress(Exception):  # it may be what failed
                    step.pending.result()
        if self._scheduler.host is not None:
            self._scheduler.host.close()
        self._masks.close()
        self._executor.shutdown()

    def _goes_on(self) -> bool:
        try:
            return self._turn()
        except RankError as e:
            self._begin_anew(e)
            return True

    def _begin_anew(self, e: RankError) -> None:
        """The executor has lost all that it held: who had begun does so once more, or ends with the error."""
        parts = [s for step in self._under_way for s in step.parts]
        self._under_way.clear()
        self._stats.restarts_total += 1
        for sequence in self._scheduler.reset(parts):
            request = self._requests[sequence.request_id]
            if request.retries > 0:
                request.retries -= 1
            else:
                error = RankError(f"{e} while it computed this request: send it again, or start with retry=1")
                self._drop(sequence.request_id).outputs.put(error)

    def _turn(self) -> bool:
        """Take in what has come, begin a step and end one; false when it is time to close."""
        if not self._has_work:
            self._settle()
        with self._changed:
            if not self._is_full:
                self._has_room.notify_all()
            self._changed.wait_for(lambda: self._arrived or self._closing or self._has_work)
            closing = self._closing
        self._take_in()
        if not closing and self._has_work:
            begun = self._begin()
            if not begun and not self._under_way and self._scheduler.host is not None:
                self._scheduler.host.wait()  # what the next request needs is on its way
            self._finish(steps_left=1 if begun and self._executor.asynchronous else 0)
            if begun and self._under_way and (step := self._under_way[-1]).draws_late:
                step.pending.draw(self._sampling(step.parts))
        return not closing

    def _settle(self) -> None:
        """Let no block be held for a copy while nothing runs."""
        while self._scheduler.host is not None and self._scheduler.host.wait():
            pass

    @property
    def _has_work(self) -> bool:
        return self._scheduler.has_work or bool(self._under_way)

    def _take_in(self) -> None:
        # Before the requests: one that comes from now on, and is to end at once, has that wait for the next time.
        aborted = [self._aborted.popleft() for _ in range(len(self._aborted))]
        with self._changed:  # so that each request is counted as waiting, and once
            while self._arrived:
                self._add(self._arrived.popleft())
        for request_id in aborted:
            self._cancel(request_id)

    def _add(self, request: Request) -> None:
        self._stats.requests_total += 1
        self._stats.prompt_tokens_total += len(request.sequence.prompt)
        self._requests[request.sequence.request_id] = request
        self._scheduler.add(request.sequence)

    def _cancel(self, request_id: int) -> None:
        if request_id in self._requests:
            request = self._drop(request_id)
            try:
                request.cancel()
            except Exception as e:
                self._report_lost_text(request, e)

    def _report_lost_text(self, request: Request, e: Exception) -> None:
        """One text that cannot be made must not take the server down: its request ends with the error."""
        if isinstance(e, SawError):  # what it follows cannot be followed: that is its own matter
            request.outputs.put(e)
            return
        logger.error("the text of request %d could not be made", request.sequence.request_id, exc_info=e)
        request.outputs.put(EngineError(f"the runtime failed while it made this request's text: {e}"))

    def _drop(self, request_id: int) -> Request:
        request = self._requests.pop(request_id)
        self._scheduler.remove(request.sequence)
        return request

    def _begin(self) -> bool:
        """Launch the next step; false if no sequence can go on before the one in flight is done."""
        parts = self._scheduler.schedule()
        if not parts:
            return False
        draws_late = self._scheduler.draws_late
        sampling = None if draws_late else self._sampling(parts)
        context = [self._wants_context(s) for s in parts]
        try:
            step = self._packer.pack(parts, self._scheduler.copies)
            pending = self._executor.launch(step, sampling, context)
        except RankError:
            raise
        except Exception as e:
            self._fail(parts, e)
            return False
        self._scheduler.launched(parts)
        self._under_way.append(_Step(parts, pending, draws_late))
        return True

    def _sampling(self, parts: list[Scheduled]) -> list[SamplingState | None]:
        return [self._draw_of(s) if s.samples else None for s in parts]

    def _draw_of(self, s: Scheduled) -> SamplingState | None:
        sequence = s.sequence
        request = self._requests.get(sequence.request_id)
        if request is None:  # it ended while this was in flight
            return None
        banned = request.banned(s.num_drawn) if sequence.params.bans else ()
        mask = request.guide.mask if request.guide else None
        return SamplingState(sequence.params, sequence.prompt, sequence.generated, banned, s.num_drawn, mask)

    def _wants_context(self, s: Scheduled) -> bool:
        wants = s.sequence.params.needs_context_logits
        return wants and not s.sequence.generated and s.kind == PREFILL

    def _finish(self, steps_left: int) -> None:
        """Wait for the steps in flight but for so many, and hand out what they gave."""
        while len(self._under_way) > steps_left:
            step = self._under_way[0]
            try:
                output = step.pending.result()
            except RankError:
                raise
            except Exception as e:
                self._under_way.popleft()
                for s in step.parts:
                    self._scheduler.done(s)
                self._fail(step.parts, e)
                continue
            self._under_way.popleft()
            self._scheduler.advance(step.parts)
            with whole_step():
                for i, s in enumerate(step.parts):
                    self._hand_out(s, output, i)
            if self._guided:
                self._work_out_masks()

    def _work_out_masks(self) -> None:
        guided, self._guided = self._guided, []
        failures = self._masks.work_out([request.guide for request in guided if request.guide is not None])
        for request, failure in zip(guided, failures, strict=True):
            if failure is not None:
                self._report_lost_text(self._drop(request.sequence.request_id), failure)

    def _fail(self, parts: list[Scheduled], e: Exception) -> None:
        """One bad step must not take the server down: its requests end with the error, the others go on."""
        logger.error("a step of %d sequences failed", len(parts), exc_info=e)
        for s in parts:
            if s.sequence.request_id in self._requests:
                error = EngineError(f"the engine failed while it computed this request: {e}")
                self._drop(s.sequence.request_id).outputs.put(error)

    def _hand_out(self, s: Scheduled, output: StepOutput, i: int) -> None:
        request = self._requests.get(s.sequence.request_id)
        if request is None:  # it ended while this was in flight
            return
        if s.start == s.sequence.num_reused and not s.sequence.generated:
            request.num_reused_tokens = s.sequence.num_reused
            self._stats.reused_tokens_total += s.sequence.num_reused
        logits = output.logits[i]
        if logits is not None:
            request.keep_logits(logits, s.start, s.samples)
        if not s.samples:
            return
        if not s.sequence.generated:
            self._stats.ttft_seconds_sum += time.monotonic() - request.arrival
            self._stats.ttft_count += 1
        self._stats.generated_tokens_total += 1
        top = output.top_logprobs[i] if output.top_logprobs else ()
        try:
            ended = request.push(output.token_ids[i], output.logprobs[i], top)
        except Exception as e:
            self._report_lost_text(request, e)
            ended = True
        if ended:
            self._drop(s.sequence.request_id)
        elif request.guide is not None:
            self._guided.append(request)
