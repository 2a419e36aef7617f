"""The handle of a running request."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, cast
from weakref import WeakKeyDictionary, ref

import numpy as np

from saw_trtllm.errors import EngineError
from saw_trtllm.runtime.output_queue import OutputQueue
from saw_trtllm.runtime.outputs import CompletionOutput, RequestOutput
from saw_trtllm.runtime.parts import Part


class _LoopWaker:
    """Sets events of an event loop from other threads, in one call all that come before the loop has its turn.

    Each call is one of the system, after which both threads want the interpreter: a step gives a piece to each request.
    """

    _of: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopWaker]] = WeakKeyDictionary()

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = ref(loop)
        self._due: deque[asyncio.Event] = deque()
        self._is_called = False

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> _LoopWaker:
        """The one of the loop that runs in this thread."""
        waker = cls._of.get(loop)
        if waker is None:
            waker = cls._of[loop] = cls(loop)
        return waker

    def wake(self, event: asyncio.Event) -> None:
        """Set an event, from any thread."""
        self._due.append(event)
        if not self._is_called and (loop := self._loop()) is not None:
            self._is_called = True
            with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody waits there
                loop.call_soon_threadsafe(self._set)

    def _set(self) -> None:
        self._is_called = False  # before the last look: what comes from now on is another call's
        while self._due:
            self._due.popleft().set()


def require_process(pid: int) -> None:
    """Raise EngineError in another process than ``pid``, where the engine runs."""
    if os.getpid() != pid:
        raise EngineError(
            f"the engine runs in process {pid}, and process {os.getpid()} is a fork of it: make the LLM in the process "
            "that uses it, or start that one with the method spawn"
        )


class GenerationResult:
    """The handle of a running request.

    Iterate over it, with ``for`` or ``async for``, for its :class:`RequestOutput` pieces: each when streaming, else one
    at the end. Iterating again goes on where the last iteration stopped. ``await`` gives what :meth:`aresult` does.

    A request that nobody waits for ends: when its handle is dropped, and when the last task that waits for a piece is
    cancelled, be it by ``asyncio.wait_for``.

    Parameters
    ----------
    request_id : int
    outputs : OutputQueue
    abort : callable
        Ends the request.
    n : int
        Texts that come.
    """

    def __init__(self, request_id: int, outputs: OutputQueue, abort: Callable[[], None], n: int = 1) -> None:
        self.request_id = request_id
        self._n = n
        self._completions: dict[int, CompletionOutput] = {}
        self._num_finished = 0
        self._outputs = outputs
        self._abort = abort
        self._num_blocked = 0  # threads that wait for a piece
        self._done = False
        self._last: RequestOutput | Exception | None = None
        self._pid = os.getpid()

    def __del__(self) -> None:
        if not self._done:
            self._abort()

    def abort(self) -> None:
        """Stop generating; the last piece has finish_reason ``cancelled``. Without effect on a finished request."""
        self._abort()

    def join(self, output: RequestOutput) -> RequestOutput:
        """A piece just read and those of the same text that have come since, as one."""
        if self._n > 1:
            return output
        pieces = [output]
        queue = self._outputs
        with queue.changed:
            while queue.pieces and not self._done and not isinstance(queue.pieces[0], Exception):
                pieces.append(cast(RequestOutput, self._pop()))
        if len(pieces) == 1:
            return output
        parts = [piece.outputs[0] for piece in pieces]
        new: dict[str, Any] = {"text_diff": "".join(part.text_diff for part in parts)}
        for name in ("token_ids_diff", "logprobs_diff", "top_logprobs_diff"):
            if getattr(parts[-1], name) is not None:
                new[name] = [value for part in parts for value in getattr(part, name)]
        if parts[-1].generation_logits is not None:
            new["generation_logits"] = np.concatenate([part.generation_logits for part in parts])
        return replace(pieces[-1], outputs=[replace(parts[-1], **new)])

    def subscribe(self, wake: Callable[[], None]) -> None:
        """Have ``wake`` called whenever a piece has come, from the engine's thread, which it must not hold up."""
        with self._outputs.changed:
            self._outputs.wakers.append(wake)
            if self._outputs.pieces:
                wake()

    def take_parts(self) -> list[Part | Exception]:
        """What is new in all pieces that have come, without waiting; an error that ended the request is the last."""
        parts: list[Part | Exception] = []
        with self._outputs.changed:
            while self._outputs.pieces and not self._done:
                piece = self._outputs.pieces.popleft()
                if isinstance(piece, Exception):
                    self._fail()
                    parts.append(piece)
                else:
                    part = piece.part()
                    self._count(part.finished)
                    parts.append(part if self._n == 1 else part._replace(finished=self._done))
        return parts

    def result(self, timeout: float | None = None) -> RequestOutput:
        """Wait for the last piece.

        Raises
        ------
        TimeoutError
            If a piece takes longer than ``timeout`` seconds.
        SawError
            What ended the request.
        """
        while self._next(timeout) is not None:
            pass
        return self._final()

    async def aresult(self) -> RequestOutput:
        """Like :meth:`result`, on the running event loop."""
        async for _ in self:
            pass
        return self._final()

    def __await__(self) -> Generator[Any, None, RequestOutput]:
        return self.aresult().__await__()

    def __iter__(self) -> Iterator[RequestOutput]:
        while (piece := self._next(None)) is not None:
            yield piece

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        require_process(self._pid)
        event, queue = asyncio.Event(), self._outputs
        wake = partial(_LoopWaker.of(asyncio.get_running_loop()).wake, event)
        with queue.changed:
            queue.wakers.append(wake)
        try:
            while True:
                event.clear()
                with queue.changed:
                    ready = bool(queue.pieces) or self._done
                    piece = self._pop() if ready else None
                if not ready:
                    await self._wait(event)
                elif piece is None:
                    return
                else:
                    yield piece
        finally:
            with queue.changed:
                queue.wakers.remove(wake)

    async def _wait(self, event: asyncio.Event) -> None:
        """Wait for the next piece; the last that is cancelled while it does so ends the request."""
        try:
            await event.wait()
        except asyncio.CancelledError:
            with self._outputs.changed:
                alone = len(self._outputs.wakers) == 1 and not self._num_blocked
            if alone:
                self.abort()
            raise

    def _next(self, timeout: float | None) -> RequestOutput | None:
        require_process(self._pid)
        queue = self._outputs
        with queue.changed:
            self._num_blocked += 1
            try:
                if not queue.changed.wait_for(lambda: queue.pieces or self._done, timeout):
                    raise TimeoutError(f"no output within {timeout} s")
            finally:
                self._num_blocked -= 1
            return self._pop()

    def _pop(self) -> RequestOutput | None:
        """The next piece; None after the last. The lock is held."""
        if self._done:
            return None
        piece = self._outputs.pieces.popleft()
        self._last = piece if isinstance(piece, Exception) else piece.output()
        if isinstance(self._last, Exception):
            self._fail()
            raise self._last
        self._count(self._last.finished)
        if self._n > 1:
            self._completions[self._last.outputs[0].index] = self._last.outputs[0]
            self._last = replace(self._last, finished=self._done)
        return self._last

    def _count(self, finished: bool) -> None:
        """Note whether a text of the request has ended."""
        self._num_finished += finished
        self._done = self._num_finished == self._n

    def _fail(self) -> None:
        """Note that an error has ended the request."""
        self._done = True
        if self._n > 1:  # the others have nobody to wait for them
            self._abort()

    def _final(self) -> RequestOutput:
        if isinstance(self._last, Exception):
            raise self._last
        last = cast(RequestOutput, self._last)
        if self._n == 1:
            return last
        return replace(last, outputs=[self._completions[i] for i in range(self._n)])
