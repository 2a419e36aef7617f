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
    pieces: list[tuple[OutputQueue, QueuedPiece | Exception]] | None = None


_held = _Held()


@contextlib.contextmanager
def whole_step() -> Iterator[None]:
    """Hold what this thread puts in the context until it ends: then all pieces are there before anyone is woken.

    Whoever is woken by a step's first piece wants the interpreter, and has it as soon as some library lets go of it for
    a moment: then each piece is taken by itself, with a message of its own. And whoever has a text's last piece finds
    that it runs no more and holds no block.
    """
    pieces: list[tuple[OutputQueue, QueuedPiece | Exception]] = []
    _held.pieces = pieces
    try:
        yield
    finally:
        _held.pieces = None
        for queue, piece in pieces:
            queue.pieces.append(piece)
        for queue, _ in pieces:
            queue.wake()


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
        if _held.pieces is not None:
            _held.pieces.append((self, piece))
            return
        self.pieces.append(piece)
        self.wake()

    def wake(self) -> None:
        """Tell those who wait of what has come."""
        with self.changed:
            self.changed.notify_all()
            for wake in self.wakers:
                wake()
