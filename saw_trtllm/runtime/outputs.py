"""What a request gives back, in the words of TensorRT-LLM's LLM API."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class CompletionOutput:
    """The generated text, up to and with the newest piece.

    Attributes
    ----------
    index : int
        Always 0: one completion a request.
    text, token_ids : str, list of int
        All so far.
    text_diff, token_ids_diff : str, list of int
        This piece. Without streaming it is the whole text.
    context_ids : list of int
        Tokens to decode the piece behind: ``text_diff`` is what ``token_ids_diff`` add to their text, cut where a stop
        string began.
    finish_reason : {"stop", "length", "cancelled"} or None
        None while more is to come.
    stop_reason : str, int or None
        The stop string or token that ended the text; None for the end token.
    cumulative_logprob, logprobs : float, list of float
        With ``logprobs=True``: log-probabilities of ``token_ids``, and their sum.
    generation_logits : numpy.ndarray or None
        fp32 ``[len(token_ids), vocab_size]``, with the last piece.
    """

    text: str
    token_ids: list[int]
    text_diff: str
    token_ids_diff: list[int]
    context_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    cumulative_logprob: float | None = None
    logprobs: list[float] | None = None
    generation_logits: np.ndarray | None = None
    index: int = 0


@dataclass(frozen=True)
class RequestOutput:
    """A request's state at a piece of its output.

    Attributes
    ----------
    request_id : int
    prompt : str or None
        None when token ids were given.
    prompt_token_ids : list of int
    outputs : list of CompletionOutput
        One.
    finished : bool
    context_logits : numpy.ndarray or None
        fp32 ``[len(prompt_token_ids), vocab_size]``, with the last piece.
    """

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    context_logits: np.ndarray | None = None


class GenerationResult:
    """The handle of a running request.

    Iterate over it, with ``for`` or ``async for``, for its :class:`RequestOutput` pieces: each when streaming, else one
    at the end. Iterating again goes on where the last iteration stopped.

    Parameters
    ----------
    request_id : int
    abort : callable
        Ends the request.
    """

    def __init__(self, request_id: int, abort: Callable[[], None]) -> None:
        self.request_id = request_id
        self._abort = abort
        self._pieces: deque[Callable[[], RequestOutput] | Exception] = deque()
        self._changed = threading.Condition()
        self._done = False
        self._last: RequestOutput | Exception | None = None
        self._wakers: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    def abort(self) -> None:
        """Stop generating; the last piece has finish_reason ``cancelled``. Without effect on a finished request."""
        self._abort()

    def put(self, piece: Callable[[], RequestOutput] | Exception) -> None:
        """Called by the engine, from its thread; the output is made when it is read."""
        with self._changed:
            self._pieces.append(piece)
            self._changed.notify_all()
            for loop, event in self._wakers:
                with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody waits there
                    loop.call_soon_threadsafe(event.set)

    def join(self, output: RequestOutput) -> RequestOutput:
        """A piece just read and those that have come since, as one."""
        pieces = [output]
        with self._changed:
            while self._pieces and not self._done and not isinstance(self._pieces[0], Exception):
                pieces.append(self._pop())
        if len(pieces) == 1:
            return output
        parts = [piece.outputs[0] for piece in pieces]
        joined = replace(
            parts[-1],
            text_diff="".join(part.text_diff for part in parts),
            token_ids_diff=[token for part in parts for token in part.token_ids_diff],
            context_ids=parts[0].context_ids,
        )
        return replace(pieces[-1], outputs=[joined])

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

    def __iter__(self) -> Iterator[RequestOutput]:
        while (piece := self._next(None)) is not None:
            yield piece

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        event = asyncio.Event()
        waker = (asyncio.get_running_loop(), event)
        with self._changed:
            self._wakers.append(waker)
        try:
            while True:
                event.clear()
                with self._changed:
                    ready = bool(self._pieces) or self._done
                    piece = self._pop() if ready else None
                if not ready:
                    await event.wait()
                elif piece is None:
                    return
                else:
                    yield piece
        finally:
            with self._changed:
                self._wakers.remove(waker)

    def _next(self, timeout: float | None) -> RequestOutput | None:
        with self._changed:
            if not self._changed.wait_for(lambda: self._pieces or self._done, timeout):
                raise TimeoutError(f"no output within {timeout} s")
            return self._pop()

    def _pop(self) -> RequestOutput | None:
        """The next piece; None behind the last. The lock is held."""
        if self._done:
            return None
        piece = self._pieces.popleft()
        self._last = piece if isinstance(piece, Exception) else piece()
        if isinstance(self._last, Exception):
            self._done = True
            raise self._last
        self._done = self._last.finished
        return self._last

    def _final(self) -> RequestOutput:
        if isinstance(self._last, Exception):
            raise self._last
        return self._last
