"""The way between the leader and its ranks: numbered messages, in order and to every rank alike.

Each rank has two connections. Steps and what they give go over one. Nothing goes over the other: it ends with the
process at its other end, which both sides watch.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import selectors
import socket
import struct
import threading
import time
from typing import Any, Literal, NamedTuple, get_args

from saw_trtllm.errors import RankError
from saw_trtllm.runtime.door import Address, Door, Who, exactly, knock

#: Before each message: its number, its command and its bytes, which of a prefill's logits may be over 4 GiB.
_HEAD = struct.Struct("!QBQ")
Command = Literal["open", "launch", "draw", "take", "transfer", "wait", "close"]
_COMMANDS: tuple[Command, ...] = get_args(Command)
#: What a connection is for.
_STEPS, _LIFE = 0, 1
#: Seconds that a rank looks for the next message before it sleeps: what a leader does between two steps takes less.
_MOMENT = 1e-3
#: Seconds that a rank tries to reach its leader.
_CONNECT_TIME = 60.0


class LeaderGoneError(Exception):
    """The leader's process has ended, or lets go of its ranks."""


class Message(NamedTuple):
    """What the leader sends to all ranks."""

    number: int
    command: Command
    body: bytearray


class LeaderChannel:
    """The leader's end.

    Parameters
    ----------
    size : int
        Ranks.
    host : str, optional
        This machine's address in the network of the ranks; None where all of them are on this machine.
    """

    def __init__(self, size: int, host: str | None = None) -> None:
        self._size = size
        self._door = Door(host, backlog=2 * size)
        self.address = self._door.address
        self._arrived: dict[tuple[int, int], socket.socket] = {}
        self._steps: list[socket.socket] = []
        self._answering = selectors.DefaultSelector()
        self._number = 0

    def accept(self, timeout: float) -> bool:
        """Let in who knocks within so many seconds; whether all ranks have come."""
        if (came := self._door.let_in(timeout)) is not None:
            who, connection = came
            self._arrived[who.purpose, who.rank] = connection
        return len(self._arrived) == 2 * self._size

    def begin(self, timeout: float) -> list[socket.socket]:
        """Once all have come, let in nobody else. The connections that end with the ranks' processes.

        From then on a rank that takes nothing of a message for ``timeout`` seconds, or stops for as long in one of its
        own, counts as lost.
        """
        self._door.close()
        self._steps = [self._arrived[_STEPS, rank] for rank in range(self._size)]
        # In the kernel: a timeout of Python's would be one more call for each message.
        limit = struct.pack("ll", int(timeout), int(timeout % 1 * 1e6))
        for rank, connection in enumerate(self._steps):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            self._answering.register(connection, selectors.EVENT_READ, rank)
        return [self._arrived[_LIFE, rank] for rank in range(self._size)]

    def send(self, command: Command, body: bytes = b"") -> int:
        """Send a command to all ranks, and give its number.

        Raises
        ------
        RankError
            If a rank has gone, or has not read so much before that there is no room for more.
        """
        self._number += 1
        message = _packed(self._number, _COMMANDS.index(command), body)
        for rank, connection in enumerate(self._steps):
            try:
                connection.sendall(message)
            except OSError as e:
                raise RankError(f"the process of rank {rank} has ended or hangs") from e
        return self._number

    def receive(self, timeout: float) -> list[tuple[int, int, Any]]:
        """What ranks say, within so many seconds: rank, number of the message that it answers, and the answer.

        Raises
        ------
        RankError
            If a rank has gone, or hangs in the middle of an answer.
        """
        said = []
        for key, _ in self._answering.select(timeout):
            rank: int = key.data
            try:
                number, _, answer = _receive(self._steps[rank])
            except OSError as e:
                raise RankError(f"the process of rank {rank} has ended or hangs") from e
            said.append((rank, number, pickle.loads(answer)))
        return said

    def close(self) -> None:
        """Let go of it; ranks that still listen end."""
        self._door.close()
        self._answering.close()
        for connection in self._arrived.values():
            connection.close()


class RankChannel:
    """A rank's end.

    Attributes
    ----------
    host : str
        This machine's address in the network of the ranks.

    Raises
    ------
    OSError
        If the leader is not there.
    """

    def __init__(self, address: Address, rank: int, size: int) -> None:
        ends = [knock(address, Who(purpose, rank, size), _CONNECT_TIME) for purpose in (_STEPS, _LIFE)]
        self._steps, self._life = ends
        unix = self._steps.family == socket.AF_UNIX
        self.host: str = "127.0.0.1" if unix else self._steps.getsockname()[0]
        self._number = 0

    def say(self, content: Any) -> None:
        """Answer the last message."""
        self._steps.sendall(_packed(self._number, 0, pickle.dumps(content, 5)))

    def receive(self) -> Message:
        """Wait for the next message.

        Raises
        ------
        LeaderGoneError
        RankError
            If it is not the one after the last.
        """
        try:
            self._await_message()
            number, command, body = _receive(self._steps)
        except OSError as e:
            raise LeaderGoneError from e
        if number != self._number + 1:
            raise RankError(f"message {number} came after {self._number}")
        self._number = number
        return Message(number, _COMMANDS[command], body)

    def _await_message(self) -> None:
        """Look for one for a moment, in which a leader that decodes sends the next: to be woken takes longer."""
        end = time.monotonic() + _MOMENT
        while time.monotonic() < end:
            try:
                self._steps.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
                return
            except BlockingIOError:
                os.sched_yield()

    def end_with_leader(self) -> None:
        """End this process, whatever it does, when the leader's has ended."""

        def watch() -> None:
            with contextlib.suppress(OSError):
                self._life.recv(1)
            os._exit(1)

        threading.Thread(target=watch, name="saw-leader", daemon=True).start()


def _packed(number: int, command: int, body: bytes) -> bytes:
    """A message whole, so that it takes one call to send."""
    return _HEAD.pack(number, command, len(body)) + body


def _receive(end: socket.socket) -> tuple[int, int, bytearray]:
    """Number, command and body of the next message."""
    number, command, length = _HEAD.unpack(exactly(end, _HEAD.size))
    return number, command, exactly(end, length)
