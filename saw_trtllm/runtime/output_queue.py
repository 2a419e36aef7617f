"""Pieces of outputs on their way from the engine's thread to those who wait for them."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol

from saw_trtllm.runtime.outputs import RequestOutput
from saw_trtllm.runtime.parts import Part


class _Held(threading.local):
    wakers: list[Callable[[], None]] | None = None


_held = _Held()


@contextlib.contextmanager
def whole_step() -> Iterator[None]:
    """Wake those who wait for pieces that this thread puts in the context when it ends.

    Whoever is woken by a step's first piece wants the interpreter, and has it as soon as some library lets go of it for
    a moment: then each piece is taken by itself, with a message of its own.
    """
    wakers: list[Callable[[], None]] = []
    _held.wakers = wakers
    try:
        yield
    finally:
        _held.wakers = None
        for wake in wakers:
            wake()


class QueuedPiece(Protocol):
    """A piece on its way, made when it is read: with all that came before it, or without."""

    def output(self) -> RequestOutput:
        """The request's state at this piece."""
        ...

    def part(self) -> Part:
        """What is new, at a cost that does not grow with the text."""
        ...


class OutputQueue:
    """A request's pieces, on their way from the engine to the handle that gives them out.

    The engine only knows this end, so that a handle which nobody holds any more is collected.
    """

    def __init__(self) -> None:
        self.pieces: deque[QueuedPiece | Exception] = deque()
        self.changed = threading.Condition()
        self.wakers: list[Callable[[], None]] = []

    def put(self, piece: QueuedPiece | Exception) -> None:
        """Called by the engine, from its thread."""
        with self.changed:
            self.pieces.append(piece)
            self.changed.notify_all()
            if _held.wakers is not None:
                _held.wakers += self.wakers
                return
            for wake in self.wakers:
                wake()
